"""AdamW cases with what a loop does around the step: clipping, zeroing gradients, an anchor.

As in :mod:`adamw` every provider steps the same parameters. Moments are each optimizer's own, since some are wider
than others; the check starts from values that hold whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from superfine.optim import AdamW

from superfine_kernels import Cost, adamw, norm
from superfine_kernels._storage import dequantize

from .adamw import BERT_ENCODER, BETA1, EPS, HYPERPARAMETERS, LR, Inputs, make_case
from .harness import Case, Provider

MAX_NORM = 1.0
ANCHORED_DECAY = 10.0  # large, so that the check sees where it pulls to
# Mean errors: of a parameter's change relative to lr, and of the first moment. A bf16 parameter is rounded by up to a
# tenth of lr; without master weights bf16 moments lose a few per cent over many steps, and 8-bit ones are numbers of
# 3 bits of mantissa.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.uint8: 0.3}


@dataclass
class _Step:
    """One provider's call; returns the number of steps it has made."""

    optimizer: torch.optim.Optimizer
    call: Callable[[], Any]
    steps: int = 0

    def __call__(self) -> int:
        self.call()
        self.steps += 1
        return self.steps


def _superfine(inputs: Inputs, **options: Any) -> _Step:
    optimizer = AdamW(inputs.params, **{**HYPERPARAMETERS, **options})
    return _Step(optimizer, optimizer.step)


def _torch_fused(inputs: Inputs) -> _Step:
    optimizer = torch.optim.AdamW(inputs.params, **HYPERPARAMETERS, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(inputs.params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return _Step(optimizer, step)


@torch.no_grad()
def _restore(inputs: Inputs) -> None:
    for index, param in enumerate(inputs.params):
        assert param.grad is not None
        param.grad.copy_(inputs.pooled("grad", index))


@torch.no_grad()
def _check(inputs: Inputs, call: _Step, *, clipped: bool) -> float:
    """Mean error of parameters and first moments, relative to the tolerance; infinite if zeros are missing.

    While gradients stay the same, both moments are exact after bias correction: the update is
    ``lr * g / (|g| + eps)``.
    """
    for index, param in enumerate(inputs.params):
        param.copy_(inputs.pooled("param", index))
        state = call.optimizer.state.get(param, {})
        if "remainder" in state:
            state["remainder"].zero_()
        if "anchor" in state:
            state["anchor"].copy_(param)
    call()
    scale = 1.0
    if clipped:
        grads = (inputs.pooled("grad", index) for index in range(len(inputs.params)))
        scale = MAX_NORM / (sum(g.double().square().sum().item() for g in grads) ** 0.5 + 1e-6)
    group = call.optimizer.param_groups[0]
    decay = 0.0 if getattr(call.optimizer, "anchored", False) else group["weight_decay"]
    worst = 0.0
    for index, param in enumerate(inputs.params):
        p, g = (inputs.pooled(name, index).double() for name in ("param", "grad"))
        g = g * scale
        expected = p * (1 - LR * decay) - LR * g / (g.abs() + EPS)
        moment, dtype = _first_moment(call.optimizer.state[param])
        first_moment = moment.double() / (1 - BETA1**call.steps)
        tolerance = max(TOLERANCE[param.dtype], TOLERANCE[dtype])
        worst = max(
            worst,
            ((param.double() - expected).abs().mean() / (LR * tolerance)).item(),
            ((first_moment - g).abs().mean() / (g.abs().mean() * tolerance)).item(),
        )
        assert param.grad is not None
        if clipped and param.grad.any():
            return float("inf")
    return worst


def _first_moment(state: dict[str, Any]) -> tuple[torch.Tensor, torch.dtype]:
    """A first moment as numbers, and the dtype in which it is stored."""
    stored = state["exp_avg"]
    if stored.dtype != torch.uint8:
        return stored, stored.dtype
    return dequantize(stored, state["exp_avg_sq"], state["scales"])[0], stored.dtype


def _clipped(dtype: torch.dtype) -> Case:
    ours = partial(_superfine, max_grad_norm=MAX_NORM, zero_grads=True)
    providers = [Provider("torch fused", _torch_fused), Provider("superfine", ours)]
    if dtype == torch.bfloat16:  # torch's has no master weights, so this is more work
        split = partial(ours, master_weights="split")
        providers.append(Provider("superfine, split master", split))
        lean = partial(split, state_dtype=torch.uint8)
        providers.append(Provider("superfine, split master, 8-bit moments", lean))
    base = make_case("bert-base encoder, 85M, clip + step + zero_grad", BERT_ENCODER, dtype)
    numel = sum(torch.Size(shape).numel() for shape in BERT_ENCODER)

    def cost() -> Cost:
        parts = adamw.cost(numel, dtype, zero_grads=True), norm.cost(numel, dtype)
        return Cost(sum(part.bytes for part in parts), sum(part.flops for part in parts))

    return replace(
        base,
        work="norm of all gradients, clipping to 1, one step, zeros into the gradients",
        cost=cost,
        before=_restore,
        check=partial(_check, clipped=True),
        providers=tuple(providers),
        in_quick=False,
    )


def _anchored() -> Case:
    base = make_case("bert-base encoder, 85M, anchored", BERT_ENCODER, torch.float32)
    return replace(
        base,
        work="one step; weight decay toward zero, and toward the first values (4 bytes a parameter more)",
        before=_restore,
        check=partial(_check, clipped=False),
        providers=(
            Provider("superfine, to zero", partial(_superfine, weight_decay=ANCHORED_DECAY)),
            Provider("superfine, anchored", partial(_superfine, weight_decay=ANCHORED_DECAY, anchored=True)),
        ),
        in_quick=False,
    )


def cases() -> list[Case]:
    """Return the cases: clip + step + zero_grad in two precisions, and decay toward an anchor."""
    return [_clipped(torch.float32), _clipped(torch.bfloat16), _anchored()]
