"""Multi-tensor AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2).

    t <- t + 1
    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

for every element of every tensor in one parallel region (CPU) or launch (GPU). The rule for one element is
csrc/math/adamw.h; low-precision elements are computed in float32 and rounded once per store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import LIBRARY, READER, Cost, is_plain, opmath_dtype, threads
from superfine_kernels._moments import (
    checked_hyperparameters,
    state_lists,
    state_lists_by_device,
    step_rest,
)


def cost(
    numel: int,
    param_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
) -> Cost:
    """Bytes and flops of one step over `numel` elements: reads p, g, m, v; writes p, m, v."""
    param, state = param_dtype.itemsize, (state_dtype or param_dtype).itemsize
    return Cost(bytes=numel * (3 * param + (6 if amsgrad else 4) * state), flops=numel * (15 + amsgrad))


# --- reference ------------------------------------------------------------------------------------


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """The step in eager torch; takes every dtype and layout. Complex numbers count as pairs of real ones."""
    for i, param in enumerate(params):
        steps[i].add_(1)
        step = steps[i].item()
        tensors = [param, grads[i], exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
        stored = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        p, g, m, v, *v_max = (t.to(opmath_dtype(t.dtype)) for t in stored)
        p = p * (1 - lr * weight_decay)
        g = -g if maximize else g
        m = m.lerp(g, 1 - beta1)
        v = v.mul(beta2).addcmul(g, g, value=1 - beta2)
        v_max = [torch.maximum(v_max[0], v)] if v_max else []
        denominator = (v_max[0] if v_max else v).sqrt() / math.sqrt(1 - beta2**step) + eps
        p = p.addcdiv(m, denominator, value=-lr / (1 - beta1**step))
        for old, new in zip(stored, (p, stored[1], m, v, *v_max), strict=True):
            if old is not stored[1]:
                old.copy_(new)


# --- backends ---------------------------------------------------------------------------------------


def _run(backend: str | None, lists: tuple[list[Tensor], ...], hyper: dict[str, Any]) -> None:
    # Without parameters there is no device to choose by; the CPU's reader still compares the lengths.
    chosen = _backends.choose("adamw_", lists[0][0].device, backend) if lists[0] else "cpu"
    name, _, isa = chosen.partition(":")
    if name == "cpu":
        rest = _cpu.adamw(READER, *lists, **hyper, threads=threads(), isa=isa)
    elif name == "cuda":
        from superfine_kernels import _cuda

        rest = _cuda.adamw(
            READER, *lists, **hyper, stream=torch.cuda.current_stream(lists[0][0].device).cuda_stream
        )
    elif name == "triton":
        from superfine_kernels.triton import adamw as kernels

        rest = kernels.adamw_(*lists, **hyper)
    else:
        return reference(*lists, **hyper)
    return step_rest("adamw_", reference, rest, lists, hyper)


# --- registration -----------------------------------------------------------------------------------

LIBRARY.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, *, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize, str backend='') -> ()"
)


def _dispatched(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    backend: str = "",
    **hyper: float | bool,
) -> None:
    _run(backend, tuple(map(list, (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps))), hyper)


torch.library.impl(LIBRARY, "adamw_", "CompositeExplicitAutograd")(_dispatched)
torch.library.register_fake("superfine::adamw_", lambda *args, **kwargs: None, lib=LIBRARY)


# --- public -------------------------------------------------------------------------------------------


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One AdamW step over lists of tensors, in place; equal to `torch.optim.AdamW`'s.

    Args:
        params: parameters on one device; float32, bfloat16, float16 or float64, any dense layout. Other dtypes
            (complex) and layouts (slices) take the eager reference, with one warning.
        grads: one per parameter, same shape, dtype and device.
        exp_avgs, exp_avg_sqs: first and second moments, of the parameter's shape and its dtype or float32.
        max_exp_avg_sqs: running maxima of the second moments for AMSGrad; empty without.
        steps: float32 scalars on the CPU, the steps taken so far; each grows by one.
        lr, beta1, beta2, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Raises:
        ValueError: lists of unequal length, tensors of the wrong shape, dtype or device, tensors that overlap in
            memory, hyperparameters out of range. Nothing has been written then.
    """
    hyper = {
        **checked_hyperparameters("adamw_", lr, beta1, beta2, eps, weight_decay),
        "maximize": maximize,
    }
    lists = tuple(list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps))
    with torch.no_grad():
        if is_plain(lists[0]):  # past the dispatcher, which costs about 0.2 us per tensor
            _run(backend, lists, hyper)
        else:
            torch.ops.superfine.adamw_(*lists, **hyper, backend=backend or "")


def adamw_group_(
    params: list[Tensor],
    state: dict[Tensor, dict[str, Tensor]],
    *,
    amsgrad: bool = False,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """`adamw_` over the parameters of an optimizer's group that have a gradient, with their `state`.

    Args:
        params: the group's parameters.
        state: for each parameter with a gradient a dict of `exp_avg`, `exp_avg_sq`, `step` and, with amsgrad,
            `max_exp_avg_sq`.

    Raises:
        KeyError: a parameter with a gradient has no state. Otherwise as `adamw_`.
    """
    hyper = {
        **checked_hyperparameters("adamw_", lr, beta1, beta2, eps, weight_decay),
        "maximize": maximize,
    }
    if not params:
        return
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else None, "step")
    if params[0].device.type == "cpu" and is_plain(()):
        done = _cpu.adamw_group(READER, params, state, amsgrad, **hyper, threads=threads(), isa="")
        if done is not None:
            used, rest = done
            if rest:
                step_rest("adamw_", reference, rest, state_lists(used, state, names), hyper)
            return
    for lists in state_lists_by_device(params, state, names):
        adamw_(*lists, **hyper)
