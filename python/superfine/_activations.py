"""How many bytes a forward keeps for its backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["saved_bytes"]


def saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of what `forward()` returns: the activations.

    A storage counts once, and whole, however many nodes save views of it. Parameters and views of them do not count,
    nor does what shares memory with a tensor of `exclude` (inputs, buffers, parameters that only custom nodes see).

    `forward` runs once and must return what holds the graph (a loss, an output), or nothing is left to be counted.
    Of a part under torch.utils.checkpoint its inputs are counted: what is held between forward and backward.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()  # a node that is freed takes along what it saved
    counted_elsewhere = {_storage(tensor) for tensor in exclude}

    def pack(tensor: Tensor) -> _Held:
        kept = _Held(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = forward()
    storages: dict[Any, int] = {}
    for kept in held:
        if kept.of_parameter:
            counted_elsewhere.add(_storage(kept.tensor))
        storages[_storage(kept.tensor)] = kept.tensor.untyped_storage().nbytes()
    del output
    return sum(size for storage, size in storages.items() if storage not in counted_elsewhere)


class _Held:
    """A saved tensor, for as long as the node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        # A product saves weight.t(), whose base is the parameter.
        self.of_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        self.tensor = tensor.detach()  # an output that its own node saves would keep the node alive


def _storage(tensor: Tensor) -> Any:
    # By the storage object, not its address: empty storages all lie at 0.
    return tensor.untyped_storage()._cdata
