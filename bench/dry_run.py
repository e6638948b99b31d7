"""What every GPU kernel uses on GPUs that are not here, and the least time of the ops at their bandwidth.

No GPU is needed: Triton kernels are compiled, CUDA kernels are read from the built module or compiled by nvcc.
What this cannot show is how fast they run.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .binaries import (
    Usage,
    built_usage,
    capability_of,
    cuobjdump,
    demangle,
    first_error,
    resource_usage,
    short_name,
    toolkit_program,
)

if TYPE_CHECKING:
    from rich.console import Console

SOURCES = Path(__file__).resolve().parent.parent / "csrc"


@dataclass(frozen=True)
class KernelRow:
    """One kernel for one architecture, or, in `note`, why a backend has none.

    Attributes:
        kernel: name of the function.
        variant: what distinguishes it from others of that name: template or constexpr arguments.
        registers: per thread.
        stack: bytes per thread of spilled registers; 0 is what it should be.
        shared: bytes per block; of a CUDA kernel the static ones, the launch may add to them.
        least_ms: for each bench case of the op, the time in which its bytes pass at the given bandwidth: the
            whole op, of which this kernel may be a part. Empty without a bandwidth.
    """

    op: str
    kernel: str
    variant: str
    backend: str  # cuda | triton
    arch: str
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    least_ms: dict[str, float] = field(default_factory=dict)
    note: str = ""


def dry_run(archs: Sequence[str], bandwidth_gb_s: float | None = None) -> list[KernelRow]:
    """Compile or read every GPU kernel for `archs`, such as `["sm_80", "sm_90"]`; takes seconds for each.

    `bandwidth_gb_s`, in 10^9 bytes a second, gives the least times.

    Raises:
        ValueError: an architecture is unknown, or the bandwidth is not above zero.
    """
    if bandwidth_gb_s is not None and not bandwidth_gb_s > 0:
        raise ValueError(f"dry_run: bandwidth_gb_s is {bandwidth_gb_s}; expected a number above 0, or None")
    for arch in archs:
        capability_of(arch)
    least = {} if bandwidth_gb_s is None else _least_times(bandwidth_gb_s)
    rows = []
    for arch in archs:
        for op, kernel, variant, backend, usage in (*_cuda(arch), *_triton(arch)):
            if isinstance(usage, str):
                rows.append(KernelRow(op, kernel, variant, backend, arch, note=usage))
            else:
                numbers = (usage.registers, usage.stack, usage.shared)
                rows.append(KernelRow(op, kernel, variant, backend, arch, *numbers, least.get(op, {})))
    return rows


def print_dry_run(console: Console, rows: Sequence[KernelRow]) -> None:
    """Print one line for each kernel and architecture, its variants together, and the least times below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "kernel", "backend", "arch"):
        table.add_column(name, no_wrap=True)
    for name in ("variants", "registers", "stack bytes", "shared bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[KernelRow]] = {}
    for row in rows:
        if not row.note:
            groups.setdefault((row.op, row.kernel, row.backend, row.arch), []).append(row)
    for key, variants in sorted(groups.items()):
        numbers = ([getattr(row, name) for row in variants] for name in ("registers", "stack", "shared"))
        table.add_row(*map(escape, key), str(len(variants)), *map(_range, numbers))
    if groups:
        console.print(table)
    for row in rows:
        if row.stack:
            text = f"{row.kernel} {row.variant} ({row.backend}, {row.arch}) spills {row.stack} bytes a thread"
            console.print(text, markup=False, highlight=False)
        if row.note:
            console.print(f"{row.backend}, {row.arch}: {row.note}", markup=False, highlight=False)
    _print_least_times(console, rows)


def _print_least_times(console: Console, rows: Sequence[KernelRow]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    least = {row.op: row.least_ms for row in rows if row.least_ms}
    if not least:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("case")
    table.add_column("least ms", justify="right", no_wrap=True)
    for op, cases in sorted(least.items()):
        for case, milliseconds in cases.items():
            table.add_row(escape(op), escape(case), f"{milliseconds:.4g}")
    console.print(table)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _least_times(bandwidth_gb_s: float) -> dict[str, dict[str, float]]:
    from . import FILES, all_cases

    least: dict[str, dict[str, float]] = {}
    for case in all_cases():
        if case.traffic:  # else its memory is not what bounds it
            milliseconds = case.cost().bytes / bandwidth_gb_s / 1e6
            file = FILES[case.op]
            name = case.name if file == case.op else f"{case.op} {case.name}"
            least.setdefault(file, {})[f"{name}, {case.dtype}"] = milliseconds
    return least


#: Op, kernel, variant, backend, and the usage or why there is none.
Found = tuple[str, str, str, str, Usage | str]


def _triton(arch: str) -> Iterator[Found]:
    if importlib.util.find_spec("triton") is None:
        yield "", "", "", "triton", "not compiled: triton is not installed"
        return
    from .aot import try_triton

    kernels, failed = try_triton(arch)
    for kernel in kernels:
        types = [f"{name}: {kind}" for name, kind in kernel.pointers.items()]
        constants = [f"{name}={value}" for name, value in kernel.constants.items()]
        aligned = [f"16 divides {name}" for name in kernel.aligned]
        variant = ", ".join([*types, *constants, *aligned])
        usage = Usage(kernel.registers, kernel.stack, kernel.shared)
        yield kernel.op, kernel.kernel, variant, "triton", usage
    for one in failed:
        name = ": ".join(filter(None, (one.op, one.kernel))) or "a file"
        yield one.op, one.kernel, "", "triton", f"{name} does not compile: {one.reason}"


def _cuda(arch: str) -> Iterator[Found]:
    if cuobjdump() is None:
        yield "", "", "", "cuda", "not read: cuobjdump is missing; it comes with triton and the CUDA toolkit"
        return
    found = built_usage(arch)
    if found:
        for name, usage in found.items():
            # The compiler names an anonymous namespace after the source file's length and name.
            source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", name)
            yield _cuda_row(source[1] if source else "", name, usage)
        return
    nvcc, sources = toolkit_program("nvcc"), sorted((SOURCES / "cuda").glob("*.cu"))
    missing = "was not built" if found is None else "has no code for it"
    if nvcc is None or not sources:
        lacking = "nvcc is missing" if nvcc is None else "the sources are not installed"
        yield "", "", "", "cuda", f"not read: the CUDA module {missing}, and {lacking}"
        return
    for source_file in sources:
        try:
            for name, usage in _compile_cuda(nvcc, source_file, arch).items():
                yield _cuda_row(source_file.stem, name, usage)
        except subprocess.CalledProcessError as error:
            note = f"{source_file.name} does not compile: {first_error(error.stderr)}"
            yield source_file.stem, "", "", "cuda", note


def _compile_cuda(nvcc: str, source: Path, arch: str) -> dict[str, Usage]:
    """Usage by mangled name, compiled with the options of CMakeLists.txt that change the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        options = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{SOURCES}"]
        subprocess.run(
            [nvcc, "-cubin", f"-arch={arch}", *options, "-o", str(cubin), str(source)],
            capture_output=True,
            text=True,
            check=True,
        )
        return {name: usage for (_, name), usage in resource_usage(cubin).items()}


def _cuda_row(op: str, mangled: str, usage: Usage) -> Found:
    kernel, _, variant = short_name(demangle(mangled)).partition("<")
    return op, kernel, variant.removesuffix(">"), "cuda", usage
