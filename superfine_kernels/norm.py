"""The norm of all elements of many tensors, as gradients are clipped by.

Squares are added in the tensors' type of computation (float32; float64 for float64) over pieces of 2048 elements, and
in float64 over pieces and tensors, always in the same order: the bits depend on neither threads nor instruction set.
One read of everything, so the floor is memory bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from superfine_kernels import _cpu
from superfine_kernels._library import READER, Cost, is_plain, threads
from superfine_kernels._sharded import by_place, sum_of_parts


def cost(numel: int, dtype: torch.dtype = torch.float32) -> Cost:
    """Bytes and flops for `numel` elements: one read, one multiplication, one addition."""
    return Cost(bytes=numel * dtype.itemsize, flops=numel * 2)


@torch.no_grad()
def reference(tensors: Sequence[Tensor]) -> Tensor:
    """By eager torch, on any devices and of any dtypes; complex numbers count as pairs of real ones.

    Of tensors that lie on several processes it is the norm of the whole, for which all of them have to call.

    Returns:
        A float64 scalar on the device of the first, for which nothing waits where all are on one device.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for place, parts in by_place(tensors):
        squares += sum_of_parts(_sum_of_squares(parts), place).to(device)
    return squares.sqrt()


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        dense = tensor.to_dense() if tensor.is_sparse else tensor
        real = torch.view_as_real(dense) if dense.is_complex() else dense
        by_kind.setdefault((real.device, real.dtype), []).append(real)
    device = tensors[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for (_, dtype), alike in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        each = torch._foreach_norm(alike, 2, dtype=wide)
        squares += torch.stack(each).double().square().sum().to(device)
    return squares


def total_norm(tensors: Sequence[Tensor], backend: str | None = None) -> float:
    """The 2-norm of all elements of all tensors; 0 without any. Waits for a GPU's result.

    Args:
        tensors: of any shapes, dtypes, devices and layouts. With DTensors all their processes have to call.
        backend: None for the kernel where it takes all tensors (dense ones on the CPU), else eager torch; `reference`
            for eager torch; `cpu:<isa>` for one instruction set.
    """
    if backend != "reference" and is_plain(tensors):
        _, _, isa = (backend or "").partition(":")
        squares = _cpu.sum_of_squares(READER, list(tensors), threads=threads(), isa=isa)
        if squares is not None:
            return math.sqrt(squares)
    return reference(tensors).item()
