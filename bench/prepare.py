"""Forward, loss and backward of a partly trained model: as it is, with transformers' checkpointing, and prepared.

Every provider has a copy of the same model and trains the same parameters on the same batch, without dropout.
``python -m superfine_bench.prepare`` prints the bytes that each one keeps between forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import superfine
import torch
from superfine._activations import saved_bytes
from superfine.select import Plan, select
from torch import Tensor, nn

from superfine_kernels._library import Cost

from .harness import Case, Provider, UnavailableError
from .train_step import Size, _model, flops_of_token

# Of gradients, relative to their norm: products in another order.
TOLERANCE = 1e-4
# 8 layers, of which the last 2 train: what a prefix costs where it need not cost anything.
SIZE = Size(layers=8, hidden=256, heads=4, vocabulary=8192, rows=8, tokens=128)
TRAINED = {"bert": ("last:2", "head"), "llama": ("*layers.6.*lora_*", "*layers.7.*lora_*")}
MADE = {"bert": "last:2", "llama": "LoRA"}  # in the words of train_step
NAMES = {"bert": "last:2 + head", "llama": "LoRA on the last 2"}

Gradients = list[Tensor]


@dataclass
class Inputs:
    """A model, the selectors of what trains, a batch, and the gradients that eager autograd computes."""

    model: nn.Module
    selectors: tuple[str, ...]
    batch: dict[str, Tensor]
    expected: Gradients


def _inputs(device: torch.device, *, family: str, size: Size) -> Inputs | UnavailableError:
    torch.manual_seed(0)
    try:
        model = _model(family, size, MADE[family]).to(device)
    except UnavailableError as reason:
        return reason
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens), device=device)
    labels = torch.randint(3, (size.rows,), device=device) if family == "bert" else ids
    inputs = Inputs(model, TRAINED[family], {"input_ids": ids, "labels": labels}, [])
    inputs.expected = _build(inputs, change=_nothing)()
    return inputs


def _nothing(model: Any, plan: Plan) -> None:
    """Eager autograd, which keeps what its nodes save."""


def _by_transformers(model: Any, plan: Plan) -> None:
    """All layers, with gradients of the inputs: what Trainer and PEFT do when asked for checkpointing."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def _prepared(model: Any, plan: Plan, **options: Any) -> None:
    superfine.prepare(model, plan, **options)


def _build(
    inputs: Inputs | UnavailableError, *, change: Callable[[Any, Plan], None]
) -> Callable[[], Gradients]:
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


def _forward(inputs: Inputs, change: Callable[[Any, Plan], None]) -> tuple[Callable[[], Tensor], Plan]:
    model: Any = copy.deepcopy(inputs.model).train()
    plan = select(model, *inputs.selectors)
    change(model, plan)
    return lambda: model(**inputs.batch).loss, plan


def _check(inputs: Inputs, call: Callable[[], Gradients]) -> float:
    found = call()
    if len(found) != len(inputs.expected):
        return float("inf")
    # Biases of keys have no gradient but rounding.
    floor = max(float(expected.norm()) for expected in inputs.expected) * 1e-4
    errors = [
        float((actual - expected).norm()) / max(float(expected.norm()), floor)
        for actual, expected in zip(found, inputs.expected, strict=True)
    ]
    return max(errors) / TOLERANCE


CHANGES: dict[str, Callable[[Any, Plan], None]] = {
    "transformers checkpointing": _by_transformers,
    "eager": _nothing,
    "superfine": _prepared,
    "superfine, checkpointing": partial(_prepared, checkpointing=True),
    "superfine, checkpointing alone": partial(_prepared, checkpointing=True, fuse=False, shortcut=False),
}
PROVIDERS = tuple(Provider(name, partial(_build, change=change)) for name, change in CHANGES.items())


def _cost(family: str, size: Size) -> Cost:
    """Of eager autograd; what is run again, and what the short-cut leaves out, does not count."""
    try:
        with torch.device("meta"):
            model = _model(family, size, MADE[family])
    except UnavailableError:
        return Cost(0, 0)
    select(model, *TRAINED[family])
    return Cost(bytes=0, flops=flops_of_token(model) * size.rows * size.tokens)


def _case(family: str, size: Size = SIZE) -> Case:
    weights = 2 * size.vocabulary * size.hidden + 12 * size.layers * size.hidden**2
    token = size.layers * (24 * size.hidden + size.heads * size.tokens) + 4 * size.vocabulary
    return Case(
        op="prepare",
        name=f"{family} {size.layers}x{size.hidden}, {NAMES[family]}",
        dtype="float32",
        work=f"forward, loss and backward on {size.rows}x{size.tokens} tokens",
        cost=partial(_cost, family, size),
        traffic="",
        memory=4 * (weights * (1 + len(PROVIDERS)) + token * size.rows * size.tokens),
        inputs=partial(_inputs, family=family, size=size),
        before=lambda inputs: None,
        check=_check,
        providers=PROVIDERS,
        gemm="float32",
    )


def cases() -> list[Case]:
    """Return the cases: an encoder with a classifier, and a causal model with adapters."""
    return [_case(family) for family in TRAINED]


def saved(family: str, size: Size = SIZE) -> dict[str, int]:
    """Bytes that each provider's forward keeps for its backward; nothing where a package is missing."""
    inputs = _inputs(torch.device("cpu"), family=family, size=size)
    if isinstance(inputs, UnavailableError):
        return {}
    found = {}
    for name, change in CHANGES.items():
        forward, plan = _forward(inputs, change)
        forward()  # the first one looks at the graph
        found[name] = saved_bytes(forward, [*plan.model.parameters(), *inputs.batch.values()])
    return found


if __name__ == "__main__":
    for family in TRAINED:
        print(
            f"{family} {SIZE.layers}x{SIZE.hidden}, {NAMES[family]}: kept on {SIZE.rows}x{SIZE.tokens} tokens"
        )
        for name, count in saved(family).items():
            print(f"  {name:32}{count / 1e6:9.1f} MB")
