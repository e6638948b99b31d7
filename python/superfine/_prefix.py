"""The frozen prefix of a model: the leading blocks of its layer stack that hold nothing that trains.

What they compute depends on the input alone, so it needs no graph, no gradients, and can be kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from superfine.selectors import Stack, layer_stack

__all__ = ["Prefix", "frozen_prefix"]


@dataclass(frozen=True)
class Prefix:
    """The layer stack, how many of its leading blocks are frozen, and why there are no more."""

    stack: Stack
    blocks: int
    stopped_by: str | None  # name of the first parameter that trains in or before the next block


def frozen_prefix(model: nn.Module, trained: Collection[str]) -> Prefix:
    """The prefix of `model` when the parameters named in `trained` (under any of their names) train.

    Parameters registered before the layer stack (embeddings) count as read before it, those after it (final norm,
    pooler, head) as read after it: a tied head that trains leaves no prefix.

    Raises `ValueError` where the layer stack cannot be found.
    """
    stack = layer_stack(model)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    training = {name for names in tied.values() if not set(names).isdisjoint(trained) for name in names}
    inside = [path + "." for path in stack.blocks]
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.startswith(inside[0]):
            break
        if name in training:
            return Prefix(stack, 0, name)
    for blocks, path in enumerate(inside):
        found = next((name for name in sorted(training) if name.startswith(path)), None)
        if found is not None:
            return Prefix(stack, blocks, found)
    after = next((name for name, _ in model.named_parameters() if name in training), None)
    return Prefix(stack, len(inside), after)
