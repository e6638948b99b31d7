"""Multi-tensor LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2).

    t <- t + 1
    m <- beta1 * m + (1 - beta1) * g                       1 * g without grad_averaging
    v <- beta2 * v + (1 - beta2) * g * g
    u <- m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p           or * (p - anchor)
    p <- p - lr * trust_ratio * u                          trust_ratio = |p| / |u|, norms over the tensor

for every tensor in one parallel region (CPU) or a few launches (GPU), in two passes: moments and norms first, then
the parameters. The rule for one element and the order of the sums are csrc/math/lamb.h; low-precision elements are
computed in float32 and rounded once per store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from superfine_kernels._library import Cost
from superfine_kernels._moments import Group, MomentOp, Plan, checked_hyperparameters
from superfine_kernels._storage import Stored


def cost(
    numel: int, param_dtype: torch.dtype = torch.float32, state_dtype: torch.dtype | None = None
) -> Cost:
    """Bytes and flops of one step over `numel` elements: reads p, g, m, v; writes p, m, v.

    That is where p, m and v stay on chip between the passes. A tensor too large for that moves p, m and v once more.
    """
    param, state = param_dtype.itemsize, (state_dtype or param_dtype).itemsize
    scales = 4 * numel // 64 if state == 1 else 0  # as in adamw.py
    return Cost(bytes=numel * (3 * param + 4 * state) + scales, flops=numel * 28)


# --- reference ------------------------------------------------------------------------------------


def reference(
    x: Stored,
    step: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    grad_averaging: bool,
    adapt: bool,
    trust_clip: bool,
) -> None:
    """The step of one parameter in eager torch."""
    x.m = x.m * beta1 + x.g * (1 - beta1 if grad_averaging else 1.0)
    x.v = x.v.mul(beta2).addcmul(x.g, x.g, value=1 - beta2)
    x.save_moments(reload=True)
    bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    update = (x.m / bias1) / (x.v.sqrt() / math.sqrt(bias2) + eps) + weight_decay * x.distance
    if adapt:
        param_norm, update_norm = torch.linalg.vector_norm(x.p), torch.linalg.vector_norm(update)
        trust_ratio = torch.where((param_norm > 0) & (update_norm > 0), param_norm / update_norm, 1.0)
        update = update * (trust_ratio.clamp(max=1.0) if trust_clip else trust_ratio)
    x.p = x.p.sub(update, alpha=lr)


OP = MomentOp(
    "lamb",
    reference,
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool bias_correction, bool grad_averaging, "
    "bool adapt, bool trust_clip",
    of_whole="adapt",
)
OP.register()


# --- public -------------------------------------------------------------------------------------------


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    adapt: bool = True,
    trust_clip: bool = False,
    maximize: bool = False,
    gradient_scale: float | Tensor = 1.0,
    zero_grads: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    anchors: Sequence[Tensor] = (),
    remainders: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    backend: str | None = None,
) -> None:
    """One LAMB step over lists of tensors, in place.

    Args:
        params: parameters on one device; float32, bfloat16, float16 or float64, any dense layout. Other dtypes
            (complex, whose norms are over real and imaginary parts) and layouts (slices) take the eager reference,
            with one warning.
        grads: one per parameter, same shape, dtype and device.
        exp_avgs, exp_avg_sqs: first and second moments, of the parameter's shape and the dtypes of `adamw_`.
        steps: float32 scalars on the parameters' device, the steps taken so far; each grows by one.
        lr, beta1, beta2, eps, weight_decay: as in `adamw_`.
        bias_correction: divide the moments by 1 - beta^t.
        grad_averaging: weigh the gradient by 1 - beta1 in the first moment, else by 1.
        adapt: scale each tensor's update by its trust ratio, which is 1 where a norm is zero or NaN.
        trust_clip: trust ratios are at most 1.
        maximize: ascend; the same as a gradient_scale of the other sign.
        gradient_scale, zero_grads, stochastic_rounding, seed, anchors, remainders, scales: as in `adamw_`; norms are
            those of the parameters, not of their distances from the anchors.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Raises:
        ValueError: lists of unequal length, tensors of the wrong shape, dtype or device, tensors that overlap in
            memory, hyperparameters out of range. Nothing has been written then.
    """
    hyper = {
        "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
        "bias_correction": bias_correction, "grad_averaging": grad_averaging, "adapt": adapt,
        "trust_clip": trust_clip,
        "maximize": maximize, "gradient_scale": gradient_scale, "zero_grads": zero_grads,
        "stochastic_rounding": stochastic_rounding, "seed": seed,
    }  # fmt: skip
    lists = (params, grads, exp_avgs, exp_avg_sqs, (), anchors, remainders, scales, steps)
    OP(tuple(map(list, lists)), checked_hyperparameters("lamb_", hyper), backend)


def lamb_groups_(
    groups: Sequence[Group], state: dict[Tensor, dict[str, Tensor]], plan: Plan | None = None
) -> None:
    """`lamb_` over all parameters of an optimizer that have a gradient; as `adamw_groups_`."""
    OP.step_groups(
        [(params, checked_hyperparameters("lamb_", hyper)) for params, hyper in groups], state, plan
    )
