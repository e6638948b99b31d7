"""Forward, loss and backward of partly trained models: as they are, and with modules that save less for backward.

Every provider has a copy of the same model and trains the same parameters on the same batch, without dropout.
``python -m superfine_bench.fused_modules`` prints the bytes that each one keeps between forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from superfine import fused_modules
from superfine._activations import saved_bytes
from superfine.select import Plan, select
from torch import Tensor, nn

from superfine_kernels._library import Cost

from .harness import Case, Provider, UnavailableError
from .peers import require
from .train_step import Size, _model

#: Of gradients, relative to their norm. In bfloat16 what is compared is the error against float32, eager's being the
#: measure: both round, at different places.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
SIZE = Size(layers=8, hidden=256, heads=4, vocabulary=8192, rows=8, tokens=128)
LORA = "LoRA, all linear layers"
SELECTIONS = {"norms": "norms", "biases": "biases", LORA: "*lora_*"}

Gradients = list[Tensor]


@dataclass
class Inputs:
    """A model, what trains, a batch, and gradients in float32 by eager autograd."""

    model: nn.Module
    selector: str
    batch: dict[str, Tensor]
    dtype: torch.dtype
    expected: Gradients


def _inputs(
    device: torch.device, *, family: str, size: Size, selection: str, dtype: torch.dtype
) -> Inputs | UnavailableError:
    torch.manual_seed(0)
    try:
        model: Any = _model(family, size, "")
        if selection == LORA:
            peft = require("peft", "peft")
            # Random B, as after some steps: with zeros there, A has no gradient.
            config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(model.to(dtype), config).train()
    except UnavailableError as reason:
        return reason
    model.to(device)
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens), device=device)
    labels = torch.randint(3, (size.rows,), device=device) if family == "bert" else ids
    inputs = Inputs(model, SELECTIONS[selection], {"input_ids": ids, "labels": labels}, dtype, [])
    exact = Inputs(copy.deepcopy(model).float(), inputs.selector, inputs.batch, torch.float32, [])
    inputs.expected = _build(exact, change=_nothing)()
    return inputs


def _nothing(model: Any, plan: Plan) -> None:
    """Eager autograd, which keeps what its nodes save; LoRA by PEFT."""


def _fused(model: Any, plan: Plan, *, recompute: bool) -> None:
    fused_modules.install(model, plan, recompute=recompute)


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
    plan = select(model, inputs.selector)
    change(model, plan)
    return lambda: model(**inputs.batch).loss, plan


def _check(inputs: Inputs, call: Callable[[], Gradients]) -> float:
    found = call()
    if len(found) != len(inputs.expected):
        return float("inf")
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, inputs.expected, strict=True)])
    total = torch.cat([gradient.flatten() for gradient in inputs.expected])
    return float(difference.norm() / total.norm()) / TOLERANCE[inputs.dtype]


CHANGES: dict[str, Callable[[Any, Plan], None]] = {
    "eager": _nothing,
    "superfine": partial(_fused, recompute=False),
    "superfine, recompute": partial(_fused, recompute=True),
}
PROVIDERS = tuple(Provider(name, partial(_build, change=change)) for name, change in CHANGES.items())


def _flops(family: str, size: Size) -> Cost:
    """Of the products that eager makes: forward, and the gradient of every layer's input."""
    try:
        with torch.device("meta"):
            model = _model(family, size, "")
    except UnavailableError:
        return Cost(0, 0)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return Cost(bytes=0, flops=4 * weights * size.rows * size.tokens)


def _case(family: str, selection: str, dtype: torch.dtype, size: Size = SIZE) -> Case:
    weights = 2 * size.vocabulary * size.hidden + 12 * size.layers * size.hidden**2
    token = size.layers * (40 * size.hidden + size.heads * size.tokens) + 4 * size.vocabulary
    name = str(dtype).removeprefix("torch.")
    return Case(
        op="fused_modules",
        name=f"{family} {size.layers}x{size.hidden}, {selection}",
        dtype=name,
        work=f"forward, loss and backward on {size.rows}x{size.tokens} tokens",
        cost=partial(_flops, family, size),
        traffic="",
        memory=4 * (weights * (2 + len(PROVIDERS)) + token * size.rows * size.tokens),
        inputs=partial(_inputs, family=family, size=size, selection=selection, dtype=dtype),
        before=lambda inputs: None,
        check=_check,
        providers=PROVIDERS,
        in_quick=family == "llama" and dtype == torch.bfloat16,
        gemm=name,
    )


def cases() -> list[Case]:
    """Return the cases: an encoder of which little trains, and a causal model with adapters."""
    return [
        _case("llama", LORA, torch.bfloat16),
        _case("llama", LORA, torch.float32),
        _case("bert", "norms", torch.float32),
        _case("bert", "biases", torch.float32),
    ]


def saved(case: Case) -> dict[str, int]:
    """Bytes that each provider's forward keeps for its backward; nothing where a package is missing."""
    inputs = case.inputs(torch.device("cpu"))
    if isinstance(inputs, UnavailableError):
        return {}
    found = {}
    for name, change in CHANGES.items():
        forward, plan = _forward(inputs, change)
        found[name] = saved_bytes(forward, [*plan.model.parameters(), *inputs.batch.values()])
    return found


if __name__ == "__main__":
    for case in cases():
        print(f"{case.name}, {case.dtype}: kept for backward")
        for name, count in saved(case).items():
            print(f"  {name:24}{count / 1e6:9.1f} MB")
