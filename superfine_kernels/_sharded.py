"""Tensors of which each process holds a part: torch's DTensor, as `fully_shard` makes them of parameters.

A kernel works on the part that is here. What is of the whole, a norm, is added up over the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from superfine_kernels._library import describe


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; also one of which each process holds all."""
    loaded = sys.modules.get("torch.distributed.tensor")  # where it is not, no tensor is one of its
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_split(tensor: Any) -> bool:
    """Whether other processes hold other parts of it."""
    return is_sharded(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def local_part(tensor: Any) -> Tensor:
    """What this process holds: the tensor's own memory, detached."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_parts(op: str, name: str, tensors: Sequence[Any], params: Sequence[Any]) -> list[Tensor]:
    """The parts of `tensors`, one for each parameter; ValueError where one does not lie as its parameter does."""
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if is_sharded(tensor) and (not is_sharded(param) or _place(tensor) != _place(param)):
            found = ", ".join(map(str, tensor.placements))
            expected = ", ".join(map(str, param.placements)) if is_sharded(param) else "one process"
            raise ValueError(f"{op}: {name}[{i}] is {describe(tensor)}, placed {found}; expected {expected}")
    return [local_part(tensor) for tensor in tensors]


def whole(tensor: Any) -> Tensor:
    """All of it, in every process, each of which has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def by_place(tensors: Sequence[Any]) -> list[tuple[Any, list[Tensor]]]:
    """The parts that are here, and how each group of them lies on the processes; None for plain tensors.

    In the order in which places first occur, which is that of every other process.
    """
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        place = _place(tensor) if is_sharded(tensor) else None
        found.setdefault(place, []).append(local_part(tensor))
    return list(found.items())


def sum_of_parts(part: Tensor, place: Any) -> Tensor:
    """The sum over the processes of what each of them has summed over its own parts of tensors in one place."""
    if place is None:
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = place
    summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(part, mesh, summed, run_check=False).full_tensor()


def _place(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements
