"""Forward, loss and backward of a partly trained model: as it is, with transformers' checkpointing, and prepared.

``python -m superfine_bench.prepare`` prints the bytes that each provider keeps between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import superfine
import torch
from superfine.select import Plan, select

from superfine_kernels._library import Cost

from .harness import Case, Provider, UnavailableError
from .train_step import Size, _model, flops_of_token
from .trained_part import SIZE, Change, Gradients, Inputs, build, make_inputs, print_saved, saved, unchanged

# Of gradients, relative to their norm: products in another order.
TOLERANCE = 1e-4
# Of 8 layers the last 2 train: what a prefix costs where it need not cost anything.
TRAINED = {"bert": ("last:2", "head"), "llama": ("*layers.6.*lora_*", "*layers.7.*lora_*")}
MADE = {"bert": "last:2", "llama": "LoRA"}  # in the words of train_step
NAMES = {"bert": "last:2 + head", "llama": "LoRA on the last 2"}


def _inputs(device: torch.device, *, family: str, size: Size) -> Inputs | UnavailableError:
    torch.manual_seed(0)
    try:
        model = _model(family, size, MADE[family]).to(device)
    except UnavailableError as reason:
        return reason
    return make_inputs(model, family, TRAINED[family], size, torch.float32)


def _by_transformers(model: Any, plan: Plan) -> None:
    """All layers, with gradients of the inputs: what Trainer and PEFT do when asked for checkpointing."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def _prepared(model: Any, plan: Plan, **options: Any) -> None:
    superfine.prepare(model, plan, **options)


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


CHANGES: dict[str, Change] = {
    "transformers checkpointing": _by_transformers,
    "eager": unchanged,
    "superfine": _prepared,
    "superfine, checkpointing": partial(_prepared, checkpointing=True),
    "superfine, checkpointing alone": partial(_prepared, checkpointing=True, fuse=False, shortcut=False),
}
PROVIDERS = tuple(Provider(name, partial(build, change=change)) for name, change in CHANGES.items())


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


if __name__ == "__main__":
    for case in cases():
        print_saved(case.name, saved(case.inputs(torch.device("cpu")), CHANGES))
