"""Compiles Triton kernels for GPUs that are not here, and reads what they use.

`triton.compile` needs no driver. It does not check shared memory against the device, and says nothing of
registers that were spilled to the stack: `compile_for` reads both from the finished machine code, with the
cuobjdump that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

#: Shared memory that one block may ask for, in bytes, by compute capability times ten.
#: Source: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_MEMORY_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Usage:
    """What one kernel uses: registers per thread, stack per thread and shared memory per block in bytes."""

    registers: int
    stack: int
    shared: int
    ptx: str = ""


def resource_usage(binary: str | Path) -> dict[str, Usage]:
    """Usage of every kernel in a cubin, object or shared library, by architecture and mangled name."""
    report = subprocess.run(
        [str(CUOBJDUMP), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    usages: dict[str, Usage] = {}
    architecture = name = ""
    for line in report.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = f"{found[1]} "
        elif found := re.match(r"\s*Function (\S+):", line):
            name = architecture + found[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            usages[name] = Usage(
                numbers["REG"], numbers["STACK"] + numbers.get("LOCAL", 0), numbers["SHARED"]
            )
    return usages


def compile_for(
    capability: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible_by_16: Sequence[str] = (),
    **options: Any,
) -> Usage:
    """Compiles `kernel` for sm_`capability`.

    `signature` gives the type of every run-time argument as Triton writes it (`*bf16`, `i32`), `constants`
    the values of the constexpr ones; `divisible_by_16` names arguments that a launch would find so.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(file.name).values()
    return Usage(usage.registers, usage.stack, compiled.metadata.shared, compiled.asm["ptx"])
