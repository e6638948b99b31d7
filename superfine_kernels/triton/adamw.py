"""Multi-tensor AdamW in Triton: one launch for all tensors of one storage.

    g <- gradient_scale * g
    p <- p * (1 - lr * weight_decay)              or toward an anchor a: a + (p - a) * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Adam adds weight_decay * p, or * (p - a), to g instead of the second line.

Every rounding is that of csrc/math/adamw.h: contraction is off, two fmas are spelled out, division and square
root round to nearest. A small launch goes ahead and computes each tensor's scalars from its count of steps, on the
device. Addresses travel in a small table that the host copies when they change, so a step does not belong into a
CUDA graph (one of the CUDA kernel does).

Traffic per parameter: 28 bytes in float32, 14 in bfloat16 or float16, 22 there with float32 moments; 16 and 10 with
moments in 8 bits. A remainder adds 4 bytes, an anchor one element, and zeros for g one.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803, SIM300 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels.triton import on
from superfine_kernels.triton._moments import (
    COLUMNS,
    COUNTED,
    FIRST_CHUNK,
    NUMEL,
    UNSPECIALIZED,
    arguments,
    as_bits,
    chunk_of,
    count_step,
    find_tensor,
    number,
    power,
    prepare,
    zero_chunk,
)
from superfine_kernels.triton._storage import (
    QUANT_BLOCK,
    load_moments,
    load_param,
    load_scales,
    magnitude_bits,
    quant_scale,
    quantize_first,
    quantize_second,
    random_key,
    store_param,
)

#: Elements per program: enough to amortise the search for its tensor; 1M parameters still make 256 programs.
CHUNK = 4096
#: Elements per iteration: 4 a thread with 4 warps, one 16-byte access in float32. Twice as many take twice
#: the registers (AOT, sm_90), which halves the number of programs that hide each other's latency.
BLOCK = 512
WARPS = 4

# Columns of the table of scalars, in the type of computation: AdamWScalars of csrc/math/adamw.h, in its order; and
# whether the step is taken, and its random key.
TAKEN = tl.constexpr(9)
KEY = tl.constexpr(10)
SCALARS = tl.constexpr(11)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _adamw_scalars(
    table, scalars, count, seed: tl.int64,
    lr, beta1, beta2, gradient_scale, eps: tl.int64, weight_decay: tl.int64,
    DECOUPLED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Counts a step of each tensor; `scalars` of csrc/math/adamw.h, rounded once."""
    index = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    step, taken = count_step(table, index, count, gradient_scale)
    lr, beta1, beta2 = number(lr), number(beta1), number(beta2)
    weight_decay = number(weight_decay)
    mask = index < count
    scalars += index * SCALARS
    tl.store(scalars, 1 - lr * weight_decay if DECOUPLED else 1.0, mask=mask)
    tl.store(scalars + 1, 1 - beta1, mask=mask)
    tl.store(scalars + 2, beta2, mask=mask)
    tl.store(scalars + 3, 1 - beta2, mask=mask)
    tl.store(scalars + 4, number(eps), mask=mask)
    tl.store(scalars + 5, -(lr / (1 - power(beta1, step))), mask=mask)
    tl.store(scalars + 6, tl.sqrt(1 - power(beta2, step)), mask=mask)
    tl.store(scalars + 7, number(gradient_scale), mask=mask)
    tl.store(scalars + 8, 0.0 if DECOUPLED else weight_decay, mask=mask)
    tl.store(scalars + TAKEN, taken.to(tl.float64), mask=mask)
    tl.store(as_bits(scalars + KEY), random_key(seed, step), mask=mask)


@triton.jit
def _update_chunk(
    row, scalars, begin, MASKED: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr, ANCHORED: tl.constexpr, COUPLED: tl.constexpr, ZERO_GRAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, remainders, scales, second, left = chunk_of(
        row, begin, CHUNK, PARAM, STATE, MASTER, ALIGNED
    )
    key = tl.load(as_bits(scalars + KEY))

    for start in range(0, CHUNK, BLOCK):
        block = start // QUANT_BLOCK + tl.arange(0, BLOCK // QUANT_BLOCK)[:, None]
        offsets = block * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
        block_mask = block * QUANT_BLOCK < left if MASKED else None
        mask = offsets < left if MASKED else None

        decay = tl.load(scalars)
        one_minus_beta1 = tl.load(scalars + 1)
        beta2 = tl.load(scalars + 2)
        one_minus_beta2 = tl.load(scalars + 3)
        eps = tl.load(scalars + 4)
        negative_step_size = tl.load(scalars + 5)
        sqrt_bias_correction2 = tl.load(scalars + 6)
        gradient_scale = tl.load(scalars + 7)

        p = load_param(param, remainders, offsets, mask, MASTER, OPMATH)
        g = tl.load(grad + offsets, mask=mask).to(OPMATH)
        m_scale, v_scale = load_scales(scales, second, block, block_mask, STATE)
        m, v = load_moments(exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, OPMATH)

        if ZERO_GRAD:
            tl.store(grad + offsets, tl.zeros(g.shape, PARAM), mask=mask)
        g = g * gradient_scale
        if ANCHORED:
            a = tl.load(anchor + offsets, mask=mask).to(OPMATH)
        if COUPLED:
            coupled_decay = tl.load(scalars + 8) + tl.zeros_like(p)
            g = tl.fma(coupled_decay, p - a if ANCHORED else p, g)
        elif ANCHORED:
            p = tl.fma(decay + tl.zeros_like(p), p - a, a)
        else:
            p = p * decay
        m = tl.fma(one_minus_beta1 + tl.zeros_like(m), g - m, m)
        v = tl.fma(one_minus_beta2 * g, g, v * beta2)
        second_moment = v
        if AMSGRAD:
            v_max = tl.load(max_exp_avg_sq + offsets, mask=mask).to(OPMATH)
            second_moment = tl.where((v_max < v) | (v != v), v, v_max)  # NaN wins, as in torch.maximum
            tl.store(max_exp_avg_sq + offsets, second_moment.to(STATE), mask=mask)
        if p.dtype == tl.float64:  # the plain operations round to nearest
            denominator = tl.sqrt(second_moment) / sqrt_bias_correction2 + eps
            p = p + (negative_step_size * m) / denominator
        else:
            denominator = tl.div_rn(tl.sqrt_rn(second_moment), sqrt_bias_correction2 + tl.zeros_like(m)) + eps
            p = p + tl.div_rn(negative_step_size * m, denominator)

        store_param(param, remainders, offsets, p, mask, key, begin, MASTER)
        if STATE == tl.uint8:
            m_scale, inverse = quant_scale(magnitude_bits(m, mask), 7)
            tl.store(scales + block, m_scale, mask=block_mask)
            m = quantize_first(m, inverse)
            v_scale, inverse = quant_scale(magnitude_bits(v, mask), 8)
            tl.store(scales + (second + block), v_scale, mask=block_mask)
            v = quantize_second(v, inverse, begin + offsets, key)
        tl.store(exp_avg + offsets, m.to(STATE), mask=mask)
        tl.store(exp_avg_sq + offsets, v.to(STATE), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _adamw(
    table, scalars, count,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr, ANCHORED: tl.constexpr, COUPLED: tl.constexpr, ZERO_GRAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    index = find_tensor(table, count, chunk)
    row = table + index * COLUMNS
    scalars += index * SCALARS
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    if tl.load(scalars + TAKEN) == 0:
        if ZERO_GRAD:
            zero_chunk(row, begin, CHUNK, BLOCK, PARAM, ALIGNED)
    elif begin + CHUNK <= tl.load(row + NUMEL):  # without a mask, accesses are 16 bytes wide
        _update_chunk(
            row, scalars, begin, False,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, AMSGRAD, ANCHORED, COUPLED, ZERO_GRAD, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _update_chunk(
            row, scalars, begin, True,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, AMSGRAD, ANCHORED, COUPLED, ZERO_GRAD, CHUNK, BLOCK,
        )  # fmt: skip


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    anchors: Sequence[Tensor],
    remainders: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    zero_grads: bool,
    stochastic_rounding: bool,
    seed: int,
    **hyper: Any,
) -> list[int]:
    """One AdamW step over lists of tensors of one device, in place.

    Shapes, dtypes, hyperparameters and errors are those of `superfine_kernels.adamw_`; optional lists are empty where
    they are absent. Returns the positions that it left alone, steps included: dtypes that it has no kernel for, and
    tensors that are not dense or lie in another order than their parameter.

    Raises:
        RuntimeError: the current stream is being captured into a CUDA graph.
    """
    rest, launches = prepare(
        "adamw_",
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps),
        hyper,
        chunk=CHUNK,
        zero_grads=zero_grads,
        stochastic_rounding=stochastic_rounding,
    )
    coupled = not hyper["decoupled"] and hyper["weight_decay"] != 0
    for launch in launches:
        table, count = launch.table, len(launch.table)
        scalars = torch.empty(count, SCALARS.value, dtype=launch.opmath, device=table.device)
        with on(table.device):
            _adamw_scalars[(triton.cdiv(count, COUNTED),)](
                table, scalars, count, seed, *arguments(hyper),
                DECOUPLED=hyper["decoupled"], COUNTED=COUNTED, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            if launch.chunks > 0:
                _adamw[(launch.chunks,)](
                    table, scalars, count, **launch.constants,
                    AMSGRAD=len(max_exp_avg_sqs) > 0, COUPLED=coupled, ZERO_GRAD=zero_grads,
                    CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip
    return rest
