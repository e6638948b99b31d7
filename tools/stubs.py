"""Writes superfine_kernels/_cpu.pyi and _cuda.pyi from the built modules, or checks that they are current.

    python tools/stubs.py [--check]

A module that is not built here keeps its stub.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "superfine_kernels"


def generate(module: str) -> str:
    """The stub of one module, as pybind11-stubgen writes it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", module, "-o", folder, "--exit-code"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"pybind11-stubgen failed on {module}:\n{done.stdout}{done.stderr}")
        return (Path(folder) / (module.replace(".", "/") + ".pyi")).read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when a stub is out of date"
    )
    check = parser.parse_args().check
    stale = 0
    for name in ("_cpu", "_cuda"):
        module = f"superfine_kernels.{name}"
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"{module} is not built here; its stub stays as it is")
            continue
        path, new = PACKAGE / f"{name}.pyi", generate(module)
        old = path.read_text() if path.exists() else ""
        if not check:
            path.write_text(new)
        elif old != new:
            stale += 1
            sys.stdout.writelines(
                difflib.unified_diff(
                    old.splitlines(keepends=True), new.splitlines(keepends=True), str(path), "generated"
                )
            )
    if stale:
        print("stubs are out of date; run: make stubs")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
