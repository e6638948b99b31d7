"""The frozen prefix of a model: what is registered before the first parameter that trains.

What it computes depends on the input alone, so it needs no graph and no gradients, and can be kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from superfine.selectors import Stack, layer_stack

__all__ = ["Boundary", "Prefix", "frozen_prefix"]


class Boundary:
    """Where training begins in `model` when the parameters named in `trained` (under any of their names) train.

    `first`: name of the first of them in the order of registration, which counts as the order of use; None where
    nothing trains. So embeddings count as read before the layers, the final norm, pooler and head as read after
    them, and a tied head that trains as an embedding.
    """

    def __init__(self, model: nn.Module, trained: Collection[str]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        training = {id(parameters[name]) for name in trained if name in parameters}
        self.first = next((name for name, p in parameters.items() if id(p) in training), None)
        self._order = {name: position for position, name in enumerate(parameters)}

    def is_after(self, path: str) -> bool:
        """Whether nothing trains in the module at `path`, which has parameters, nor before it."""
        last = max(position for name, position in self._order.items() if name.startswith(path + "."))
        return self.first is None or last < self._order[self.first]


@dataclass(frozen=True)
class Prefix:
    """A layer stack, how many of its leading blocks are frozen, and what trains first: why there are no more."""

    stack: Stack
    blocks: int
    stopped_by: str | None


def frozen_prefix(model: nn.Module, trained: Collection[str]) -> Prefix:
    """The leading blocks of the layer stack of `model` before the :class:`Boundary`.

    Raises `ValueError` where the layer stack cannot be found.
    """
    stack, boundary = layer_stack(model), Boundary(model, trained)
    return Prefix(stack, sum(map(boundary.is_after, stack.blocks)), boundary.first)
