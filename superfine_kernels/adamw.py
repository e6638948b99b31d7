"""Multi-tensor AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2).

    t <- t + 1
    p <- p * (1 - lr * weight_decay)                                 or p - lr * weight_decay * (p - anchor)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and Adam (Kingma & Ba 2015), which adds weight_decay * p to g instead of the second line; for every element of every
tensor in one parallel region (CPU) or launch (GPU). The rule for one element is csrc/math/adamw.h; low-precision
elements are computed in float32 and rounded once per store.
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
    numel: int,
    param_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    *,
    anchored: bool = False,
    remainders: bool = False,
    zero_grads: bool = False,
) -> Cost:
    """Bytes and flops of one step over `numel` elements: reads p, g, m, v; writes p, m, v; and what is asked for."""
    param, state = param_dtype.itemsize, (state_dtype or param_dtype).itemsize
    params = 3 + anchored + zero_grads  # tensors of the parameter's dtype that are read or written
    moved = params * param + (6 if amsgrad else 4) * state + 4 * remainders
    # Scales of both moments, read and written: 4 bytes for each 256 elements.
    scales = 4 * numel // 64 if state == 1 else 0
    return Cost(bytes=numel * moved + scales, flops=numel * (15 + amsgrad + 2 * anchored))


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
    decoupled: bool,
) -> None:
    """The step of one parameter in eager torch."""
    if decoupled:
        x.p = x.p - lr * weight_decay * x.distance
    else:
        x.g = x.g + weight_decay * x.distance
    x.m = x.m.lerp(x.g, 1 - beta1)
    x.v = x.v.mul(beta2).addcmul(x.g, x.g, value=1 - beta2)
    x.v_max = None if x.v_max is None else torch.maximum(x.v_max, x.v)
    second_moment = x.v if x.v_max is None else x.v_max
    denominator = second_moment.sqrt() / math.sqrt(1 - beta2**step) + eps
    x.p = x.p.addcdiv(x.m, denominator, value=-lr / (1 - beta1**step))
    x.save_moments()


OP = MomentOp(
    "adamw", reference, "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled"
)
OP.register()


# --- public -------------------------------------------------------------------------------------------


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
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
    """One AdamW step over lists of tensors, in place; equal to `torch.optim.AdamW`'s.

    Args:
        params: parameters on one device; float32, bfloat16, float16 or float64, any dense layout. Other dtypes
            (complex) and layouts (slices) take the eager reference, with one warning.
        grads: one per parameter, same shape, dtype and device.
        exp_avgs, exp_avg_sqs: first and second moments, of the parameter's shape and its dtype; float32 beside 16-bit
            parameters, bfloat16 beside float32 ones, or uint8 with `scales`.
        max_exp_avg_sqs: running maxima of the second moments for AMSGrad; empty without.
        steps: float32 scalars on the parameters' device, the steps taken so far; each grows by one.
        lr, beta1, beta2, eps, weight_decay, maximize: as in `torch.optim.AdamW`. lr, betas and `gradient_scale` may
            be float32 or float64 tensors of one element; kernels read those on their GPU when they run.
        decoupled: False adds weight_decay * parameter to the gradient instead, as `torch.optim.Adam` does.
        gradient_scale: factor of the gradients, for clipping and loss scaling; NaN and infinity are taken as numbers,
            but of a tensor mean that the step is not to be taken: only `zero_grads` is done.
        zero_grads: leave zeros in `grads`, which the kernel has in its cache; else they are not written.
        stochastic_rounding: round bfloat16 parameters that have no remainder at random, so that they are right on
            average (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision").
        seed: of all that is rounded at random, in [0, 2^32); the bits follow from it, the step, and an element's
            place and value.
        anchors: where weight decay pulls to (L2-SP, Li et al. 2018), of the parameters' shapes and dtypes; empty for
            zero.
        remainders: what rounding takes from 16-bit parameters, zeros to begin with; empty without. int16 beside
            bfloat16: their lower 16 bits, so that both are float32 parameters and follow the float32 trajectory bit
            for bit. The parameter's own dtype: its Kahan compensation.
        scales: float32 of shape (2, ceil(numel / 256)) beside uint8 moments: for each block of 256 elements in the
            order of memory the scales of the first moment, then of the second. Zeros to begin with.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Raises:
        ValueError: lists of unequal length, tensors of the wrong shape, dtype or device, tensors that overlap in
            memory, hyperparameters out of range. Nothing has been written then.
    """
    hyper = {
        "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled,
        "maximize": maximize, "gradient_scale": gradient_scale, "zero_grads": zero_grads,
        "stochastic_rounding": stochastic_rounding, "seed": seed,
    }  # fmt: skip
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps)
    OP(tuple(map(list, lists)), checked_hyperparameters("adamw_", hyper), backend)


def adamw_groups_(
    groups: Sequence[Group], state: dict[Tensor, dict[str, Tensor]], plan: Plan | None = None
) -> None:
    """`adamw_` over all parameters of an optimizer that have a gradient, in one parallel region on the CPU.

    Args:
        groups: pairs of a list of parameters and a dict of the keyword arguments of `adamw_` that are not lists, all
            of them, with `amsgrad` and `anchored`.
        state: for each parameter with a gradient a dict of `exp_avg`, `exp_avg_sq`, `step`; with amsgrad
            `max_exp_avg_sq`; with anchored `anchor`; and `remainder` and `scales` where the parameter has some.
        plan: one for all steps of an optimizer makes those cheaper which find its tensors as the last one left them.

    Raises:
        KeyError: a parameter with a gradient has no state. Otherwise as `adamw_`; where all lie on the CPU, nothing
            has been written in any group then.
    """
    OP.step_groups(
        [(params, checked_hyperparameters("adamw_", hyper)) for params, hyper in groups], state, plan
    )
