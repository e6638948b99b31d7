"""Forward, loss and backward of partly trained models: as they are, and with modules that save less for backward.

``python -m superfine_bench.fused_modules`` prints the bytes that each provider keeps between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from superfine import fused_modules
from superfine.select import Plan
from torch import nn

from superfine_kernels._library import Cost

from .harness import Case, Provider, UnavailableError
from .peers import require
from .train_step import Size, _model
from .trained_part import SIZE, Change, Gradients, Inputs, build, make_inputs, print_saved, saved, unchanged

#: Of gradients, relative to their norm. In bfloat16 what is compared is the error against float32, eager's being the
#: measure: both round, at different places.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
LORA = "LoRA, all linear layers"
SELECTIONS = {"norms": "norms", "biases": "biases", LORA: "*lora_*"}


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
    return make_inputs(model.to(device), family, (SELECTIONS[selection],), size, dtype)


def _fused(model: Any, plan: Plan, *, recompute: bool) -> None:
    fused_modules.install(model, plan, recompute=recompute)


def _check(inputs: Inputs, call: Callable[[], Gradients]) -> float:
    found = call()
    if len(found) != len(inputs.expected):
        return float("inf")
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, inputs.expected, strict=True)])
    total = torch.cat([gradient.flatten() for gradient in inputs.expected])
    return float(difference.norm() / total.norm()) / TOLERANCE[inputs.dtype]


CHANGES: dict[str, Change] = {
    "eager": unchanged,
    "superfine": partial(_fused, recompute=False),
    "superfine, recompute": partial(_fused, recompute=True),
}
PROVIDERS = tuple(Provider(name, partial(build, change=change)) for name, change in CHANGES.items())


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


if __name__ == "__main__":
    for case in cases():
        print_saved(f"{case.name}, {case.dtype}", saved(case.inputs(torch.device("cpu")), CHANGES))
