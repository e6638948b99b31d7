"""LAMB cases: one optimizer step on parameters, gradients and moments that are all there already.

Tensors, sizes and the restoring of values are those of :mod:`adamw`; the check compares with the formula in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from superfine.optim import LAMB

from superfine_kernels.lamb import cost

from . import adamw
from .adamw import BERT_ENCODER, BETA1, BETA2, EPS, LR, SMALL_TENSORS, TOLERANCE, WEIGHT_DECAY, Inputs
from .harness import Case, Provider

# Of the update: torch's norm of the 2.4 million elements of a matrix, in fp32 on the CPU, is off by 3e-4.
UPDATE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _AdamW:
    """A call that steps by another rule than the case's, and is checked against that."""

    step: Callable[[], int]

    def __call__(self) -> int:
        return self.step()


@torch.no_grad()
def _check(inputs: Inputs, call: Callable[[], int]) -> float:
    """Largest error of parameters and moments, relative to the tolerance, against the formula in fp64."""
    if isinstance(call, _AdamW):
        return adamw._check(inputs, call)
    adamw._fill(inputs)
    step = call()
    worst = 0.0
    for index, param in enumerate(inputs.params):
        p, g, m, v = (inputs.pooled(name, index).double() for name in inputs.pools)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        update = m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPS) + WEIGHT_DECAY * p
        update *= LR * p.norm() / update.norm()
        p -= update
        for actual, expected in ((param, p), (inputs.exp_avgs[index], m), (inputs.exp_avg_sqs[index], v)):
            floor = expected.abs().mean()  # a difference near zero keeps the error of its terms
            tolerance = TOLERANCE[param.dtype] * (expected.abs() + floor)
            if actual is param:
                tolerance += UPDATE_TOLERANCE * update.abs()
            worst = max(worst, ((actual.double() - expected).abs() / tolerance).max().item())
    return worst


def _eager(inputs: Inputs) -> Callable[[], int]:
    """One tensor after the other, as the implementations in PyTorch that people copy."""
    steps = 0

    @torch.no_grad()
    def call() -> int:
        nonlocal steps
        steps += 1
        bias1, bias2 = 1 - BETA1**steps, 1 - BETA2**steps
        for p, m, v in zip(inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs, strict=True):
            assert p.grad is not None
            m.mul_(BETA1).add_(p.grad, alpha=1 - BETA1)
            v.mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
            update = (m / bias1).div_((v / bias2).sqrt_().add_(EPS)).add_(p, alpha=WEIGHT_DECAY)
            p_norm, update_norm = p.norm(), update.norm()
            trust_ratio = torch.where((p_norm > 0) & (update_norm > 0), p_norm / update_norm, 1.0)
            p.sub_(update.mul_(trust_ratio), alpha=LR)
        return steps

    return call


def _foreach(inputs: Inputs) -> Callable[[], int]:
    """All tensors in every operation, as torch's own optimizers do by default on GPUs."""
    params, exp_avgs, exp_avg_sqs = inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs
    grads = [param.grad for param in params if param.grad is not None]
    steps = 0

    @torch.no_grad()
    def call() -> int:
        nonlocal steps
        steps += 1
        torch._foreach_lerp_(exp_avgs, grads, 1 - BETA1)
        torch._foreach_mul_(exp_avg_sqs, BETA2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - BETA2)
        denominators = torch._foreach_div(exp_avg_sqs, 1 - BETA2**steps)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, EPS)
        updates = torch._foreach_div(exp_avgs, 1 - BETA1**steps)
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(updates, params, alpha=WEIGHT_DECAY)
        param_norms = torch.stack(torch._foreach_norm(params))
        update_norms = torch.stack(torch._foreach_norm(updates))
        both = (param_norms > 0) & (update_norms > 0)
        torch._foreach_mul_(updates, list(torch.where(both, param_norms / update_norms, 1.0).unbind()))
        torch._foreach_add_(params, updates, alpha=-LR)
        return steps

    return call


def _superfine(inputs: Inputs) -> Callable[[], int]:
    return adamw._counted(adamw._optimizer(inputs, LAMB).step)


PROVIDERS = (
    Provider("eager LAMB", _eager),
    Provider("foreach LAMB", _foreach),
    Provider("superfine", _superfine),
)


def _case(name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, in_quick: bool = True) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    same = adamw.make_case(name, shapes, dtype)
    for_scale = Provider("superfine AdamW", lambda inputs: _AdamW(adamw._superfine(inputs)), cost=same.cost)
    return replace(
        same,
        op="lamb",
        work="one step; gradients there already, no clipping, no zero_grad (AdamW: another rule, for scale)",
        cost=partial(cost, numel, dtype),
        check=_check,
        providers=(*PROVIDERS, for_scale),
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: an encoder the size of BERT-base, in two precisions, and many small tensors."""
    return [
        _case("bert-base encoder, 85M", BERT_ENCODER, torch.float32, in_quick=False),
        _case("bert-base encoder, 85M", BERT_ENCODER, torch.bfloat16, in_quick=False),
        _case("300 tensors of 768", SMALL_TENSORS, torch.float32),
    ]
