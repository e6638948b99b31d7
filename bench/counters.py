"""Hardware counters of a case's kernels, by NVIDIA Nsight Compute (ncu), where it is there and allowed.

ncu repeats every kernel to read its counters, so it runs a process of its own in which nothing is timed.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass

from .binaries import short_name

DRAM_BYTES = "dram__bytes.sum"
SM_PERCENT = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


@dataclass(frozen=True)
class Counters:
    """Of one kernel: bytes to and from DRAM in all its launches together, and the mean load of the SMs in %."""

    dram_bytes: float
    sm_percent: float


def read_counters(key: str, provider: str, device: str) -> dict[str, Counters] | str:
    """Counters by short kernel name of one call of the case called `key`, or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return "no counters: ncu is not on the search path"
    command = [
        ncu, "--csv", "--profile-from-start", "off", "--metrics", f"{DRAM_BYTES},{SM_PERCENT}",
        sys.executable, "-m", "superfine_bench.counters", key, provider, device,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        return "no counters: the driver keeps them from this user (ERR_NVGPUCTRPERM)"
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return f"no counters: ncu ended with code {done.returncode}: {last}"
    return parse(done.stdout) or "no counters: ncu saw no kernel"


def parse(output: str) -> dict[str, Counters]:
    """The counters in what `ncu --csv` printed; lines before the table are the program's own."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values: dict[str, dict[str, list[float]]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        metrics = values.setdefault(short_name(line["Kernel Name"]), {DRAM_BYTES: [], SM_PERCENT: []})
        if line["Metric Name"] in metrics:
            value = float(line["Metric Value"].replace(",", ""))
            metrics[line["Metric Name"]].append(value * UNITS.get(line["Metric Unit"], 1))
    return {
        name: Counters(sum(metrics[DRAM_BYTES]), sum(metrics[SM_PERCENT]) / len(metrics[SM_PERCENT]))
        for name, metrics in values.items()
        if metrics[DRAM_BYTES] and metrics[SM_PERCENT]
    }


def _main(key: str, provider: str, device: str) -> None:
    """One call under the counters, after one that warms up."""
    import torch

    from . import all_cases
    from .timing import select

    select(torch.device(device))
    case = next(case for case in all_cases() if case.key == key)
    inputs = case.inputs(torch.device(device))
    call = next(p for p in case.providers if p.name == provider).build(inputs)
    case.before(inputs)
    call()
    case.before(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    _main(*sys.argv[1:])
