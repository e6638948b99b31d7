"""What finished GPU machine code uses: registers, stack, shared memory; and how many warps that leaves room for.

Reads cubins, objects and shared libraries with cuobjdump, which Triton brings along; no GPU is needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What one kernel uses: registers per thread; stack per thread and static shared memory per block in bytes.

    Stack means spilled registers: no kernel of ours has arrays that would need it otherwise.
    """

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds at a time, and what one block may take of its shared memory, in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int


LIMITS_SOURCE = "CUDA C++ Programming Guide, table 'Technical Specifications per Compute Capability'"
LIMITS = {
    80: Limits(warps=64, blocks=32, shared=167936, shared_per_block=166912),
    86: Limits(warps=48, blocks=16, shared=102400, shared_per_block=101376),
    89: Limits(warps=48, blocks=24, shared=102400, shared_per_block=101376),
    90: Limits(warps=64, blocks=32, shared=233472, shared_per_block=232448),
    100: Limits(warps=64, blocks=32, shared=233472, shared_per_block=232448),
    120: Limits(warps=48, blocks=24, shared=102400, shared_per_block=101376),
}

# The same for every capability above; units of allocation from the occupancy calculator (cuda_occupancy.h).
REGISTERS = 65536
REGISTER_UNIT = 256  # per warp
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # per block, by the system


def capability_of(arch: str) -> int:
    """`"sm_90"` -> 90.

    Raises:
        ValueError: `arch` is not one whose limits are known here.
    """
    found = re.fullmatch(r"sm_(\d+)", arch)
    if found is None or int(found[1]) not in LIMITS:
        raise ValueError(
            f"capability_of: arch is {arch!r}; expected one of {', '.join(map(arch_of, LIMITS))}"
        )
    return int(found[1])


def arch_of(capability: int) -> str:
    """90 -> `"sm_90"`."""
    return f"sm_{capability}"


def occupancy(capability: int, registers: int, shared: int, threads: int) -> float:
    """Resident warps of a multiprocessor as a share of those it can hold, for blocks of `threads` threads.

    `shared` is static and dynamic shared memory of a block together, in bytes.
    """
    limits = LIMITS[capability]
    warps = _round_up(threads, 32) // 32
    blocks = min(limits.blocks, limits.warps // warps)
    if registers:
        # Registers are handed out warp by warp, by each of the four schedulers for its own warps.
        warps_that_fit = REGISTERS // 4 // _round_up(registers * 32, REGISTER_UNIT) * 4
        blocks = min(blocks, warps_that_fit // warps)
    blocks = min(blocks, limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT))
    return blocks * warps / limits.warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def cuobjdump() -> str | None:
    """Path of cuobjdump: Triton's, else the one on the search path or of the CUDA toolkit; None without."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.is_file():
            return str(path)
    return toolkit_program("cuobjdump")


def toolkit_program(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def resource_usage(binary: str | Path) -> dict[tuple[str, str], Usage]:
    """Usage of every kernel in a cubin, object or shared library, by architecture and mangled name.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        subprocess.CalledProcessError: cuobjdump cannot read the file.
    """
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("resource_usage: cuobjdump is missing; expected triton or the CUDA toolkit")
    report = subprocess.run(
        [program, "--dump-resource-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    usages: dict[tuple[str, str], Usage] = {}
    arch = name = ""
    for line in report.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            stack = numbers["STACK"] + numbers.get("LOCAL", 0)
            usages[arch, name] = Usage(numbers["REG"], stack, numbers["SHARED"])
    return usages


def built_usage(arch: str) -> dict[str, Usage] | None:
    """Usage of the kernels that the built CUDA module has for `arch`, by mangled name.

    None where the module was not built or there is no cuobjdump.
    """
    built = importlib.util.find_spec("superfine_kernels._cuda")
    if built is None or built.origin is None or cuobjdump() is None:
        return None
    # Code that uses features of one architecture only has a suffix: sm_90a holds kernels for sm_90.
    usages = resource_usage(built.origin).items()
    return {name: usage for (of, name), usage in usages if re.fullmatch(f"{arch}[af]?", of)}


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong: the first that names an error, else the first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = (line for line in lines if re.search(r"\berror\b", line) and "error code" not in line)
    return next(named, lines[0] if lines else "no output")


def demangle(name: str) -> str:
    """A C++ symbol as it is written in source, by the C++ library that torch loads anyway; others unchanged."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return name
    function = library.__cxa_demangle
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    status = ctypes.c_int()
    address = function(name.encode(), None, None, ctypes.byref(status))
    if not address:
        return name
    try:
        return ctypes.string_at(address).decode()
    finally:
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(address)


def short_name(name: str) -> str:
    """A kernel's name and template arguments, without namespaces, return type and parameters.

    `void at::native::fill<4, at::Functor<float> >(int, float)` -> `fill<4, Functor<float>>`
    """
    text = demangle(name).replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"\b[A-Za-z_]\w*::", "", text)
    depth = 0
    for position, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and position > 0:
            text = text[:position]
            break
    return re.sub(r"\s+>", ">", text).strip()
