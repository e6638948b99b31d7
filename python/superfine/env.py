"""What this machine and this installation are: versions, CPU, GPUs, native modules, source commit.

Every reader below answers ``None`` for what it cannot find out, so that a report from a stranger's
machine is complete or says where it is not, and is never a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _gpu
from ._probe import attempt, output_of

if TYPE_CHECKING:
    import torch
    from rich.console import Console

PACKAGES = ("superfine", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
# What benchmarks compare with where it is installed; never imported here.
PEERS = (
    "liger-kernel", "torch-optimi", "bitsandbytes", "torchao", "cut-cross-entropy", "quack-kernels", "deepspeed",
    "peft", "apex",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Describe this machine and installation as a nested dictionary that JSON can hold.

    Returns:
        Sections ``python``, ``packages``, ``peers`` (those installed), ``platform``, ``cpu``, ``memory``, ``cuda``,
        ``native`` and ``git``. Sizes are in bytes. A value that cannot be read is None.
    """
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": {name: _version(name) for name in PACKAGES},
        "peers": {name: version for name in PEERS if (version := _version(name)) is not None},
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()).strip() or None,
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "cuda": _gpu.describe(),
        "native": _native(),
        "git": _git(),
    }


def print_environment(console: Console) -> None:
    """Print :func:`environment` as a table on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Environment", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column("section", style="bold")
    table.add_column("item")
    table.add_column("value", overflow="fold")
    for section, content in environment().items():
        for index, (item, value) in enumerate(_flatten(content)):
            shown = "[dim]unknown[/dim]" if value is None else escape(_readable(item, value))
            table.add_row(section if index == 0 else "", item, shown)
    console.print(table)


def available_memory() -> int | None:
    """Return the bytes of main memory that can be taken without swapping, or None where it cannot be read."""
    return _memory()["available"]


def clock_mhz(device: torch.device | str) -> float | None:
    """Return the clock that ``device`` runs at now: of a GPU's multiprocessors, or of the CPU's fastest core in use.

    Takes well under a millisecond for a few cores, so that it can be read between the turns of a benchmark.
    """
    return _gpu.sm_clock_mhz(device) if _is_cuda(device) else attempt(_cpu_mhz)


def last_level_cache(device: torch.device | str) -> int | None:
    """Return the bytes of a GPU's L2, or of a CPU's L3, of its L2 where it has none."""
    if _is_cuda(device):
        return _gpu.l2_cache(device)
    caches = attempt(_caches) or {}
    return caches.get("L3") or caches.get("L2")


def _is_cuda(device: torch.device | str) -> bool:
    return str(device).startswith("cuda")


def flat_environment(description: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the sections of :func:`environment` as ``(item, readable value)`` pairs, for tables."""
    return {
        section: [
            (item, "unknown" if value is None else _readable(item, value))
            for item, value in _flatten(content)
        ]
        for section, content in description.items()
    }


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and any(isinstance(value, dict) for value in content):
        for index, value in enumerate(content):
            yield from _flatten(value, f"{prefix}[{index}]")
    else:
        yield prefix, content


def _readable(item: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_size = item.startswith("caches.") or item.rsplit(".", 1)[-1] in (
        "total",
        "available",
        "memory",
        "memory_free",
        "l2_cache",
    )
    if is_size and isinstance(value, int):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.4g} {unit}"
    if isinstance(value, (list, dict)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _version(package: str) -> str | None:
    return attempt(lambda: importlib.metadata.version(package))


def _cpu() -> dict[str, Any]:
    def threads() -> int:
        import torch

        return torch.get_num_threads()

    return {
        "model": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "physical_cores": attempt(_physical_cores),
        "usable_cores": attempt(lambda: len(os.sched_getaffinity(0))),
        "threads": attempt(threads),
        "isa": attempt(_kernel_isa),
        "caches": attempt(_caches) or None,
        "mhz": attempt(_cpu_mhz),
        "max_mhz": attempt(_cpu_max_mhz),
        "governor": attempt(_governor),
        "numa_nodes": attempt(lambda: len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))) or None,
        "load_average": attempt(lambda: [round(load, 2) for load in os.getloadavg()]),
    }


def _kernel_isa() -> str | None:
    isa = importlib.import_module("superfine_kernels").isa()
    return None if isa is None else str(isa)


def _cpu_model() -> str | None:
    text = attempt(Path("/proc/cpuinfo").read_text) or ""
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match.group(1).strip()
    return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None


def _physical_cores() -> int | None:
    siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({path.read_text() for path in siblings}) or None


def _caches() -> dict[str, int]:
    """Sizes in bytes of the caches that the first core sees."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get((folder / "type").read_text().strip(), "")
        match = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
        if match:
            name = f"L{(folder / 'level').read_text().strip()}{kind}"
            sizes[name] = int(match.group(1)) * units[match.group(2)]
    return sizes


def _cpufreq(name: str) -> list[str]:
    """What the frequency driver says for each core that this process may use; empty in most virtual machines."""
    cores = (Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq/{name}") for core in os.sched_getaffinity(0))
    return [text.strip() for path in cores if (text := attempt(path.read_text)) is not None]


def _cpu_mhz() -> float | None:
    """Clock of the fastest core, which is the busiest one."""
    clocks = [int(kilohertz) / 1000 for kilohertz in _cpufreq("scaling_cur_freq")]
    if not clocks:
        text = Path("/proc/cpuinfo").read_text()
        clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    return max(clocks, default=None)


def _cpu_max_mhz() -> float | None:
    return max((int(kilohertz) / 1000 for kilohertz in _cpufreq("cpuinfo_max_freq")), default=None)


def _governor() -> str | None:
    return ", ".join(sorted(set(_cpufreq("scaling_governor")))) or None


def _memory() -> dict[str, int | None]:
    text = attempt(Path("/proc/meminfo").read_text) or ""
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    total = found.get("MemTotal") or attempt(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return {"total": total, "available": found.get("MemAvailable")}


def _native() -> dict[str, dict[str, Any] | None]:
    """Whether the compiled modules are there and work here, and why not; how they read lists of torch's tensors."""
    modules = {name: _native_module(name) for name in ("_cpu", "_cuda")}
    return modules | {"reader": attempt(_reader)}


def _reader() -> dict[str, bool]:
    """What of this torch's insides is where it is looked for; where nothing is, attributes tell, in 2 us a tensor."""
    reader = importlib.import_module("superfine_kernels._library").READER
    return {"torch_functions": reader.uses_shim, "torch_records": reader.compares_records}


def _native_module(name: str) -> dict[str, Any]:
    try:
        if importlib.util.find_spec(f"superfine_kernels.{name}") is None:
            return {"built": False, "usable": False, "reason": "not built"}
        module = importlib.import_module(f"superfine_kernels.{name}")
        reason = module.why_unavailable() if name == "_cuda" else None
    except Exception as error:  # whatever the loader raises is the reason
        return {"built": None, "usable": False, "reason": f"{type(error).__name__}: {error}"}
    return (
        {"built": True, "usable": True}
        if reason is None
        else {"built": True, "usable": False, "reason": reason}
    )


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this file belongs to; None for an installed copy.

    A virtual environment often lies inside another project's checkout, so the file must be tracked.
    """
    here = Path(__file__).resolve()
    if output_of("git", "ls-files", "--error-unmatch", here.name, cwd=here.parent) is None:
        return None
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=here.parent)
    return {
        "commit": output_of("git", "rev-parse", "HEAD", cwd=here.parent),
        "modified": None if changed is None else bool(changed),
    }
