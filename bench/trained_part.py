"""What the benchmarks of partly trained models share: one model for all providers, changed by each in its own way.

Every provider has a copy of the same model and trains the same parameters on the same batch, without dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from superfine._activations import saved_bytes
from superfine.select import Plan, select
from torch import Tensor, nn

from .harness import UnavailableError
from .train_step import Size

Gradients = list[Tensor]
#: What a provider makes of a model.
Change = Callable[[Any, Plan], None]

SIZE = Size(layers=8, hidden=256, heads=4, vocabulary=8192, rows=8, tokens=128)


@dataclass
class Inputs:
    """A model, the selectors of what trains, a batch, and the gradients of eager autograd in float32."""

    model: nn.Module
    selectors: tuple[str, ...]
    batch: dict[str, Tensor]
    dtype: torch.dtype
    expected: Gradients


def make_inputs(
    model: Any, family: str, selectors: tuple[str, ...], size: Size, dtype: torch.dtype
) -> Inputs:
    """A batch for the model, of a classifier ("bert") or a language model, and what eager autograd makes of it."""
    device = next(model.parameters()).device
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens), device=device)
    labels = torch.randint(3, (size.rows,), device=device) if family == "bert" else ids
    inputs = Inputs(model, selectors, {"input_ids": ids, "labels": labels}, dtype, [])
    exact = Inputs(copy.deepcopy(model).float(), selectors, inputs.batch, torch.float32, [])
    inputs.expected = build(exact, change=unchanged)()
    return inputs


def unchanged(model: Any, plan: Plan) -> None:
    """Eager autograd, which keeps what its nodes save."""


def build(inputs: Inputs | UnavailableError, *, change: Change) -> Callable[[], Gradients]:
    """Forward, loss and backward of a changed copy; a call returns the gradients."""
    if isinstance(inputs, UnavailableError):
        raise inputs
    forward, plan = _forward(inputs, change)
    trained = list(plan.parameters())

    def call() -> Gradients:
        for parameter in trained:
            parameter.grad = None
        forward().backward()
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    return call


def saved(inputs: Inputs | UnavailableError, changes: Mapping[str, Change]) -> dict[str, int]:
    """Bytes that each change keeps between forward and backward; nothing where a package is missing."""
    if isinstance(inputs, UnavailableError):
        return {}
    found = {}
    for name, change in changes.items():
        forward, plan = _forward(inputs, change)
        forward()  # the first one of a prepared model looks at the graph
        found[name] = saved_bytes(forward, [*plan.model.parameters(), *inputs.batch.values()])
    return found


def print_saved(name: str, found: Mapping[str, int]) -> None:
    """A line for each provider."""
    print(f"{name}: kept for backward")
    for provider, count in found.items():
        print(f"  {provider:32}{count / 1e6:9.1f} MB")


def _forward(inputs: Inputs, change: Change) -> tuple[Callable[[], Tensor], Plan]:
    model: Any = copy.deepcopy(inputs.model).train()
    plan = select(model, *inputs.selectors)
    change(model, plan)
    return lambda: model(**inputs.batch).loss, plan
