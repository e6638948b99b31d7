"""Which backend serves which device: one table, readable and printable.

A backend is `cpu` (C++, best instruction set), `cpu:<isa>` (that one), `cuda` (CUDA C++), `triton`, or
`reference` (eager torch). Ops take `backend=None` for the first of the device's list that is usable here.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from superfine_kernels import _cpu

#: In order of preference. docs/kernels.md has the measured ratios behind the order.
TABLE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


def isa() -> str:
    """The instruction set that the CPU kernels use here: `baseline`, `avx2` or `avx512`."""
    return _cpu.isas()[-1]


@functools.cache
def why_unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here, or None where it can."""
    name, _, variant = backend.partition(":")
    if name == "cpu":
        return (
            None if variant in ("", *_cpu.isas()) else f"this processor or build has {', '.join(_cpu.isas())}"
        )
    if backend == "reference":
        return None
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if backend == "cuda":
        try:
            from superfine_kernels import _cuda
        except ImportError as error:
            return f"built without CUDA kernels ({error})"
        return _cuda.why_unavailable()
    return "no such backend; expected cpu, cpu:<isa>, cuda, triton or reference"


def choose(op: str, device: torch.device, backend: str | None = None) -> str:
    """The backend for `op` on `device`: the one asked for, or the first that is usable."""
    if backend:
        reason = why_unavailable(backend)
        if reason is None and not _serves(backend, device):
            reason = f"it does not serve tensors on {device}"
        if reason is not None:
            raise ValueError(f"{op}: backend is {backend!r}; expected one that is usable here: {reason}")
        return backend
    for candidate in TABLE.get(device.type, ("reference",)):
        if why_unavailable(candidate) is None:
            return candidate
    return "reference"


def only_reference(device: torch.device) -> bool:
    """Whether no kernel serves a device here."""
    if device.type == "cpu" or torch.compiler.is_compiling():  # a compiler cannot follow the search
        return device.type not in TABLE
    return choose("", device) == "reference"


def _serves(backend: str, device: torch.device) -> bool:
    if backend == "reference":
        return True
    if backend == "triton" and device.type == "cpu":
        from triton import knobs  # the interpreter runs Triton kernels on CPU tensors

        return bool(knobs.runtime.interpret)
    return backend.split(":")[0] in TABLE.get(device.type, ())


def backends() -> str:
    """The table as text: device, backend, and whether it is usable here."""
    lines = [f"{'device':8}{'backend':12}usable here"]
    for device, names in TABLE.items():
        for name in names:
            reason = why_unavailable(name)
            detail = f"yes ({isa()})" if name == "cpu" else "yes"
            lines.append(f"{device:8}{name:12}{detail if reason is None else f'no: {reason}'}")
    return "\n".join(lines)
