"""Build, test, sanitize and time on a machine with an NVIDIA GPU, without a network: what ``make gpu`` runs.

    python3 tools/gpu.py [--out results/gpu]

Uses this Python's torch, triton, pybind11, scikit-build-core, cmake, ninja and pytest. The package is
installed into a throw-away folder, so nothing on the machine changes. Every stage has a time limit, and
all of them end within eight minutes; a stage that fails does not stop the next. The results folder is flat
and holds eleven files at most: environment.json, build.log, tests.log, junit.xml, sanitizer.log, bench.log,
bench.jsonl, bench.csv, bench.png, report.html and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 465  # of the eight minutes; the rest is for starting and writing
LOG_BYTES = 8 * 2**20
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENVIRONMENT = """
import json, os, sys
import superfine_kernels
from superfine.env import environment
target, file = sys.argv[1:]
found = os.path.dirname(os.path.dirname(os.path.realpath(superfine_kernels.__file__)))
if found != os.path.realpath(target):
    sys.exit(f"the installation in {found} hides the one just built; use a Python without superfine")
description = environment()
with open(file, "w") as output:
    json.dump(description, output, indent=1)
for section in ("cuda", "native", "packages"):
    print(section, json.dumps(description[section]))
sys.exit(0 if description["cuda"]["devices"] else "torch finds no GPU from the new installation")
"""


@dataclass
class Stage:
    """How one stage went: ``passed``, ``failed``, ``timed out`` or ``skipped``, and a word on it."""

    name: str
    result: str
    seconds: float = 0.0
    detail: str = ""


class Runner:
    """Runs stages in the order given, with the throw-away installation on the path."""

    def __init__(self, out: Path, target: Path, seconds: float = TOTAL_SECONDS) -> None:
        self.out = out
        self.target = target
        self.deadline = time.monotonic() + seconds
        self.stages: list[Stage] = []

    def run(self, name: str, command: list[str], *, log: str, limit: float, detail: str = "") -> Stage:
        """Run a command, its output appended to ``log``, for at most ``limit`` seconds."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit < 5:
            return self.add(Stage(name, "skipped", detail="no time left"))
        print(f"{name} ...", flush=True)
        # Started outside the repository: its folders of the same names would hide the installed packages.
        environment = os.environ | {"PYTHONPATH": str(self.target), "PYTHONUNBUFFERED": "1"}
        started = time.monotonic()
        with (self.out / log).open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=self.target,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit)
                result = "passed" if code == 0 else "failed"
                detail = detail if code == 0 else f"exit code {code}; see {log}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                result, detail = "timed out", f"after {limit:.0f} s; see {log}"
        _shorten(self.out / log)
        return self.add(Stage(name, result, time.monotonic() - started, detail))

    def add(self, stage: Stage) -> Stage:
        """Record a stage and say how it went."""
        self.stages.append(stage)
        print(f"{stage.name}: {stage.result} {stage.detail}".rstrip(), flush=True)
        return stage


def run_all(runner: Runner) -> None:
    """All stages; those after the build need it, those after that do not need each other."""
    python, out = sys.executable, runner.out
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade"]
    build = runner.run(
        "build", [*install, "--target", str(runner.target), str(ROOT)], log="build.log", limit=180
    )
    if build.result != "passed":
        return
    runner.run(
        "environment",
        [python, "-c", ENVIRONMENT, str(runner.target), str(out / "environment.json")],
        log="build.log",
        limit=60,
        detail="environment.json",
    )
    # These files alone: the others import what a GPU machine need not have.
    tests = [
        python,
        "-m",
        "pytest",
        *(
            str(ROOT / "tests" / f"test_{name}.py")
            for name in (
                "golden",
                "cuda_activation",
                "cuda_adamw",
                "cuda_lamb",
                "cuda_step",
                "cuda_optim",
                "cuda_cross_entropy",
                "cuda_cross_entropy_options",
                "cuda_elementwise_loss",
                "cuda_layer_norm",
            )
        ),
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    tests += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), f"--junitxml={out / 'junit.xml'}"]
    stage = runner.run("tests", tests, log="tests.log", limit=180)
    stage.detail = _counts(out / "junit.xml") or stage.detail
    _sanitize(runner)
    bench = [python, "-m", "superfine_bench", "--quick", "--device", "cuda", "--out", str(out)]
    runner.run("benchmark", bench, log="bench.log", limit=170, detail="bench.jsonl")


def _sanitize(runner: Runner) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        runner.add(Stage("sanitizer", "skipped", detail="compute-sanitizer was not found"))
        return
    # torch's allocator hands out parts of large blocks, inside which no stray access would be seen.
    cases = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "9"]
    for tool in SANITIZER_TOOLS:
        command = [*cases, "--tool", tool, sys.executable, str(ROOT / "tools" / "sanitize_cases.py")]
        runner.run(f"sanitizer {tool}", command, log="sanitizer.log", limit=60)


def _counts(junit: Path) -> str:
    """``12 tests, 0 failed, 1 skipped`` from a JUnit file; empty where there is none."""
    try:
        suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return ""
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return f"{total} tests, {failures + errors} failed, {skipped} skipped"


def _shorten(log: Path) -> None:
    """Keep the end of a log that grew too large to send."""
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        log.write_bytes(b"(the beginning is left out)\n" + content[-LOG_BYTES:])


def _print_table(stages: list[Stage], out: Path) -> None:
    width = max(len(stage.name) for stage in stages)
    print()
    for stage in stages:
        print(f"{stage.name:{width}}  {stage.result:9}  {stage.seconds:6.1f} s  {stage.detail}".rstrip())
    print(f"Results: {out}")


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 0 when no stage failed, 1 otherwise and where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder for the results")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        print("gpu: torch is missing; expected a Python with torch for CUDA", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        print(
            f"gpu: torch {torch.__version__} {built} and finds no GPU; expected an NVIDIA GPU",
            file=sys.stderr,
        )
        return 1

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = (
        "environment.json",
        "build.log",
        "tests.log",
        "junit.xml",
        "sanitizer.log",
        "bench.log",
        "bench.jsonl",
        "bench.csv",
        "bench.png",
        "report.html",
    )
    for name in (*names, "summary.json"):
        (out / name).unlink(missing_ok=True)  # results of an earlier run
    with tempfile.TemporaryDirectory(prefix="superfine-gpu-") as target:
        runner = Runner(out, Path(target))
        run_all(runner)
    summary = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
    }
    summary["stages"] = [asdict(stage) for stage in runner.stages]
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_table(runner.stages, out)
    return 0 if all(stage.result in ("passed", "skipped") for stage in runner.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
