"""Multi-tensor LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2).

    t <- t + 1
    m <- beta1 * m + (1 - beta1) * g                       1 * g without grad_averaging
    v <- beta2 * v + (1 - beta2) * g * g
    u <- m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p
    p <- p - lr * trust_ratio * u                          trust_ratio = |p| / |u|, norms over the tensor

for every tensor in one parallel region (CPU) or a few launches (GPU), in two passes: moments and norms first, then
the parameters. The rule for one element and the order of the sums are csrc/math/lamb.h; low-precision elements are
computed in float32 and rounded once per store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import LIBRARY, READER, Cost, is_plain, opmath_dtype, reject, threads
from superfine_kernels._moments import checked_hyperparameters, step_rest


def cost(
    numel: int, param_dtype: torch.dtype = torch.float32, state_dtype: torch.dtype | None = None
) -> Cost:
    """Bytes and flops of one step over `numel` elements: reads p, g, m, v; writes p, m, v.

    That is where p, m and v stay on chip between the passes. A tensor too large for that moves p, m and v once more.
    """
    param, state = param_dtype.itemsize, (state_dtype or param_dtype).itemsize
    return Cost(bytes=numel * (3 * param + 4 * state), flops=numel * 28)


# --- reference ------------------------------------------------------------------------------------


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
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
    gradient_scale: float,
) -> None:
    """The step in eager torch; takes every dtype and layout. Complex numbers count as pairs of real ones."""
    for i, param in enumerate(params):
        steps[i].add_(1)
        step = steps[i].item()
        tensors = [param, grads[i], exp_avgs[i], exp_avg_sqs[i]]
        stored = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        p, g, m, v = (t.to(opmath_dtype(t.dtype)) for t in stored)
        g = g * gradient_scale
        m = m * beta1 + g * (1 - beta1 if grad_averaging else 1.0)
        v = v.mul(beta2).addcmul(g, g, value=1 - beta2)
        stored[2].copy_(m)
        stored[3].copy_(v)
        m, v = stored[2].to(p.dtype), stored[3].to(p.dtype)  # the update is that of the moments as stored
        bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        update = (m / bias1) / (v.sqrt() / math.sqrt(bias2) + eps) + weight_decay * p
        if adapt:
            param_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
            trust_ratio = torch.where((param_norm > 0) & (update_norm > 0), param_norm / update_norm, 1.0)
            update = update * (trust_ratio.clamp(max=1.0) if trust_clip else trust_ratio)
        stored[0].copy_(p.sub(update, alpha=lr))


# --- backends ---------------------------------------------------------------------------------------


def _run(backend: str | None, lists: tuple[list[Tensor], ...], hyper: dict[str, Any]) -> None:
    # Without parameters there is no device to choose by; the CPU's reader still compares the lengths.
    chosen = _backends.choose("lamb_", lists[0][0].device, backend) if lists[0] else "cpu"
    name, _, isa = chosen.partition(":")
    if name == "cpu":
        rest = _cpu.lamb(READER, *lists, **hyper, threads=threads(), isa=isa)
    elif name == "cuda":
        rest = _run_cuda(lists, hyper)
    elif name == "triton":
        from superfine_kernels.triton import lamb as kernels

        rest = kernels.lamb_(*lists, **hyper)
    else:
        return reference(*lists, **hyper)
    return step_rest("lamb_", reference, rest, lists, hyper)


def _run_cuda(lists: tuple[list[Tensor], ...], hyper: dict[str, Any]) -> list[int]:
    from superfine_kernels import _cuda

    device = lists[0][0].device
    workspace: list[Tensor] = []

    def allocate(size: int) -> int:
        workspace.append(torch.empty(size, dtype=torch.uint8, device=device))
        return workspace[0].data_ptr()

    stream = torch.cuda.current_stream(device).cuda_stream
    return _cuda.lamb(READER, *lists, **hyper, allocate=allocate, stream=stream)


# --- registration -----------------------------------------------------------------------------------

LIBRARY.define(
    "lamb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool bias_correction, bool grad_averaging, bool adapt, bool trust_clip, float gradient_scale, "
    "str backend='') -> ()"
)


def _dispatched(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    backend: str = "",
    **hyper: float | bool,
) -> None:
    _run(backend, tuple(map(list, (params, grads, exp_avgs, exp_avg_sqs, steps))), hyper)


torch.library.impl(LIBRARY, "lamb_", "CompositeExplicitAutograd")(_dispatched)
torch.library.register_fake("superfine::lamb_", lambda *args, **kwargs: None, lib=LIBRARY)


# --- public -------------------------------------------------------------------------------------------


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    adapt: bool = True,
    trust_clip: bool = False,
    gradient_scale: float = 1.0,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One LAMB step over lists of tensors, in place.

    Args:
        params: parameters on one device; float32, bfloat16, float16 or float64, any dense layout. Other dtypes
            (complex, whose norms are over real and imaginary parts) and layouts (slices) take the eager reference,
            with one warning.
        grads: one per parameter, same shape, dtype and device.
        exp_avgs, exp_avg_sqs: first and second moments, of the parameter's shape and its dtype or float32.
        steps: float32 scalars on the CPU, the steps taken so far; each grows by one.
        lr, beta1, beta2, eps, weight_decay: as in AdamW.
        bias_correction: divide the moments by 1 - beta^t.
        grad_averaging: weigh the gradient by 1 - beta1 in the first moment, else by 1.
        adapt: scale each tensor's update by its trust ratio, which is 1 where a norm is zero or NaN.
        trust_clip: trust ratios are at most 1.
        gradient_scale: factor of the gradients, for clipping; they are not overwritten. NaN and infinity are taken.
        maximize: ascend; the same as a gradient_scale of the other sign.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Raises:
        ValueError: lists of unequal length, tensors of the wrong shape, dtype or device, tensors that overlap in
            memory, hyperparameters out of range. Nothing has been written then.
    """
    if not isinstance(gradient_scale, (int, float)):
        reject("lamb_", "gradient_scale", gradient_scale, "a number", TypeError)
    hyper = {
        **checked_hyperparameters("lamb_", lr, beta1, beta2, eps, weight_decay),
        "bias_correction": bias_correction,
        "grad_averaging": grad_averaging,
        "adapt": adapt,
        "trust_clip": trust_clip,
        "gradient_scale": -gradient_scale if maximize else gradient_scale,
    }
    lists = tuple(list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps))
    with torch.no_grad():
        if is_plain(lists[0]):  # past the dispatcher, which costs about 0.2 us per tensor
            _run(backend, lists, hyper)
        else:
            torch.ops.superfine.lamb_(*lists, **hyper, backend=backend or "")
