"""Multi-tensor LAMB in Triton: three launches for all tensors of one storage.

    g <- gradient_scale * g
    m <- beta1 * m + beta3 * g                             beta3 = 1 - beta1, or 1 without grad_averaging
    v <- beta2 * v + (1 - beta2) * g * g
    u <- (m / bias1) / (sqrt(v) / sqrt(bias2) + eps) + weight_decay * p            or p - a, toward an anchor a
    p <- p - lr * trust_ratio * u                          trust_ratio = |p| / |u|, norms over the tensor

The first launch steps the moments and sums up the squares of each chunk, the second makes step sizes of these sums,
the third updates the parameters. Every rounding, and the order of the sums, is that of csrc/math/lamb.h.

Traffic per parameter: 40 bytes in float32, less what the third launch, which starts at the end, finds in the L2
cache. The CUDA kernel goes through batches that fit into the cache, so that 28 bytes remain; here the host would take
as long to launch a batch as the GPU to step it.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803, SIM300 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels.triton._moments import (
    COLUMNS,
    FIRST_CHUNK,
    NUMEL,
    chunk_of,
    find_tensor,
    on,
    prepare,
)
from superfine_kernels.triton._storage import (
    QUANT_BLOCK,
    load_moments,
    load_param,
    load_scales,
    magnitude_bits,
    moments_as_stored,
    quant_scale,
    quantize_first,
    quantize_second,
    store_param,
)

# The order of the sums, as in csrc/math/lamb.h.
LANES = 32
SUM_BLOCK = 2048  # elements that one set of lanes sums up
SUM_BLOCKS = 4  # of a chunk
CHUNK = SUM_BLOCKS * SUM_BLOCK  # elements per program
#: One warp a program in the first launch: its 4 x 32 lanes are one 16-byte access a thread in float32.
MOMENTS_WARPS = 1
#: Elements per iteration of the third launch: 4 a thread, as in AdamW.
BLOCK = 512
WARPS = 4

# Columns of the table of scalars (float64): LambScalars of csrc/math/lamb.h, in its order; the last is the largest
# trust ratio.
SCALARS = tl.constexpr(12)


@triton.jit
def _tree_sum(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """The sum of each row of 2^LEVELS numbers: halves are added, as the shuffles of a warp do."""
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [ROWS, 2, x.shape[1] // 2]), axis=1)
    return tl.reshape(x, [ROWS])


@triton.jit
def _sum_block_lanes(lanes, SUM_BLOCKS: tl.constexpr):
    """The sum over 32 lanes of each block, then over the blocks; one element."""
    return _tree_sum(tl.reshape(_tree_sum(lanes, SUM_BLOCKS, 5), [1, SUM_BLOCKS]), 1, 2)


@triton.jit
def _direction(p, anchor, m, v, offsets, mask, scalars, ANCHORED: tl.constexpr, OPMATH: tl.constexpr):
    distance = p
    if ANCHORED:
        distance = p - tl.load(anchor + offsets, mask=mask).to(OPMATH)
    inverse_bias1 = tl.load(scalars + 5).to(OPMATH)
    inverse_sqrt_bias2 = tl.load(scalars + 6).to(OPMATH) + tl.zeros_like(p)
    eps = tl.load(scalars + 7).to(OPMATH) + tl.zeros_like(p)
    weight_decay = tl.load(scalars + 8).to(OPMATH) + tl.zeros_like(p)
    if p.dtype == tl.float64:  # the plain operations round to nearest
        quotient = (m * inverse_bias1) / tl.fma(tl.sqrt(v), inverse_sqrt_bias2, eps)
    else:
        quotient = tl.div_rn(m * inverse_bias1, tl.fma(tl.sqrt_rn(v), inverse_sqrt_bias2, eps))
    return tl.fma(weight_decay, distance, quotient)


@triton.jit
def _step_moments(
    grad, exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, scalars,
    EVICT: tl.constexpr, OPMATH: tl.constexpr,
):  # fmt: skip
    gradient_scale = tl.load(scalars).to(OPMATH)
    beta1 = tl.load(scalars + 1).to(OPMATH)
    beta3 = tl.load(scalars + 2).to(OPMATH)
    beta2 = tl.load(scalars + 3).to(OPMATH)
    one_minus_beta2 = tl.load(scalars + 4).to(OPMATH)
    g = tl.load(grad + offsets, mask=mask, eviction_policy=EVICT).to(OPMATH)
    m, v = load_moments(exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, OPMATH)
    g = g * gradient_scale
    m = tl.fma(beta1 + tl.zeros_like(m), m, beta3 * g)
    v = tl.fma(one_minus_beta2 * g, g, v * beta2)
    return m, v


@triton.jit
def _update_moments(
    row, scalars, begin, MASKED: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    ANCHORED: tl.constexpr, ZERO_GRAD: tl.constexpr,
    SUM_BLOCKS: tl.constexpr, SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Steps the moments of a chunk; returns the sums of squares of parameter and direction in each lane."""
    param, grad, exp_avg, exp_avg_sq, _, anchor, remainders, m_scales, v_scales, left, key = chunk_of(
        row, begin, SUM_BLOCKS * SUM_BLOCK, PARAM, STATE, MASTER, ALIGNED
    )

    lanes = tl.arange(0, LANES)[None, :]
    param_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    direction_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    for start in range(0, SUM_BLOCK, QUANT_BLOCK):
        first = start + tl.arange(0, SUM_BLOCKS)[:, None] * SUM_BLOCK
        block = first // QUANT_BLOCK
        block_mask = first < left if MASKED else None
        m_scale, v_scale = load_scales(m_scales, v_scales, block, block_mask, STATE)
        new_m_scale, new_v_scale = m_scale, v_scale
        if STATE == tl.uint8:
            # A scale follows from all of its block, whose moments are then computed again: to keep them would take
            # too many registers, and what they follow from is in the L1 cache.
            m_largest = tl.zeros((SUM_BLOCKS, LANES), tl.uint32)
            v_largest = tl.zeros((SUM_BLOCKS, LANES), tl.uint32)
            for i in range(0, QUANT_BLOCK, LANES):
                offsets = first + i + lanes
                mask = offsets < left if MASKED else None
                m, v = _step_moments(
                    grad, exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, scalars, "", OPMATH
                )
                m_largest = tl.maximum(m_largest, magnitude_bits(m, mask))
                v_largest = tl.maximum(v_largest, magnitude_bits(v, mask))
            new_m_scale, m_inverse = quant_scale(m_largest, 7)
            new_v_scale, v_inverse = quant_scale(v_largest, 8)
            tl.store(m_scales + block, new_m_scale, mask=block_mask)
            tl.store(v_scales + block, new_v_scale, mask=block_mask)
        for i in range(0, QUANT_BLOCK, LANES):
            offsets = first + i + lanes
            mask = offsets < left if MASKED else None
            p = load_param(param, remainders, offsets, mask, MASTER, OPMATH)
            m, v = _step_moments(
                grad, exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, scalars, "evict_first", OPMATH
            )
            if ZERO_GRAD:
                zeros = tl.zeros(p.shape, PARAM)
                tl.store(grad + offsets, zeros, mask=mask, eviction_policy="evict_first")
            if STATE == tl.uint8:
                m = quantize_first(m, m_inverse)
                v = quantize_second(v, v_inverse, begin + offsets, key)
            m, v = m.to(STATE), v.to(STATE)
            tl.store(exp_avg + offsets, m, mask=mask)
            tl.store(exp_avg_sq + offsets, v, mask=mask)

            m, v = moments_as_stored(m, v, new_m_scale, new_v_scale, OPMATH)
            u = _direction(p, anchor, m, v, offsets, mask, scalars, ANCHORED, OPMATH)
            param_squares = tl.fma(p, p, param_sum)
            direction_squares = tl.fma(u, u, direction_sum)
            param_sum = tl.where(mask, param_squares, param_sum) if MASKED else param_squares
            direction_sum = tl.where(mask, direction_squares, direction_sum) if MASKED else direction_squares
    return param_sum, direction_sum


@triton.jit(do_not_specialize=["count"])
def _lamb_moments(
    table, scalars, count, sums,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    ANCHORED: tl.constexpr, ZERO_GRAD: tl.constexpr,
    SUM_BLOCKS: tl.constexpr, SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    index = find_tensor(table, count, chunk)
    row = table + index * COLUMNS
    scalars += index * SCALARS
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * (SUM_BLOCKS * SUM_BLOCK)
    if begin + SUM_BLOCKS * SUM_BLOCK <= tl.load(row + NUMEL):  # without a mask, accesses are 16 bytes wide
        param_sum, direction_sum = _update_moments(
            row, scalars, begin, False,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, ANCHORED, ZERO_GRAD, SUM_BLOCKS, SUM_BLOCK, LANES,
        )  # fmt: skip
    else:
        param_sum, direction_sum = _update_moments(
            row, scalars, begin, True,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, ANCHORED, ZERO_GRAD, SUM_BLOCKS, SUM_BLOCK, LANES,
        )  # fmt: skip
    one = tl.arange(0, 1)
    tl.store(sums + 2 * chunk + one, _sum_block_lanes(param_sum.to(tl.float64), SUM_BLOCKS))
    tl.store(sums + 2 * chunk + 1 + one, _sum_block_lanes(direction_sum.to(tl.float64), SUM_BLOCKS))


@triton.jit
def _lamb_step_size(
    table, scalars, sums, step_sizes, CHUNK: tl.constexpr, SUM_BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    index = tl.program_id(0)
    row = table + index * COLUMNS
    chunks = (tl.load(row + NUMEL) + CHUNK - 1) // CHUNK
    sums += 2 * tl.load(row + FIRST_CHUNK)
    scalars += index * SCALARS
    lr = tl.load(scalars + 9)
    adapt = tl.load(scalars + 10)
    most = tl.load(scalars + 11)  # infinity, or 1 to clip

    param = tl.zeros((SUM_BLOCKS * LANES,), tl.float64)
    direction = tl.zeros((SUM_BLOCKS * LANES,), tl.float64)
    for start in range(0, chunks, SUM_BLOCKS * LANES):
        i = start + tl.arange(0, SUM_BLOCKS * LANES)
        param += tl.load(sums + 2 * i, mask=i < chunks, other=0.0)
        direction += tl.load(sums + 2 * i + 1, mask=i < chunks, other=0.0)
    param_norm = tl.sqrt(_sum_block_lanes(tl.reshape(param, [SUM_BLOCKS, LANES]), SUM_BLOCKS))
    direction_norm = tl.sqrt(_sum_block_lanes(tl.reshape(direction, [SUM_BLOCKS, LANES]), SUM_BLOCKS))
    trust_ratio = tl.where(direction_norm > 0, param_norm / direction_norm, 1.0)
    trust_ratio = tl.where(param_norm > 0, trust_ratio, 1.0)
    trust_ratio = tl.where(adapt > 0, trust_ratio, 1.0)
    trust_ratio = tl.where(trust_ratio > most, 1.0, trust_ratio)
    tl.store(step_sizes + index + tl.arange(0, 1), -lr * trust_ratio)


@triton.jit
def _update_param(
    row, scalars, begin, negative_step_size, MASKED: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    ANCHORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    param, _, exp_avg, exp_avg_sq, _, anchor, remainders, m_scales, v_scales, left, key = chunk_of(
        row, begin, CHUNK, PARAM, STATE, MASTER, ALIGNED
    )

    for start in range(0, CHUNK, BLOCK):
        block = start // QUANT_BLOCK + tl.arange(0, BLOCK // QUANT_BLOCK)[:, None]
        offsets = block * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
        block_mask = block * QUANT_BLOCK < left if MASKED else None
        mask = offsets < left if MASKED else None
        p = load_param(param, remainders, offsets, mask, MASTER, OPMATH)
        m_scale, v_scale = load_scales(m_scales, v_scales, block, block_mask, STATE)
        m, v = load_moments(exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, OPMATH)
        u = _direction(p, anchor, m, v, offsets, mask, scalars, ANCHORED, OPMATH)
        p = tl.fma(tl.broadcast_to(negative_step_size, p.shape), u, p)  # -0 stays -0
        store_param(param, remainders, offsets, p, mask, key, begin, MASTER)


@triton.jit(do_not_specialize=["count"])
def _lamb_param(
    table, scalars, count, step_sizes,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    ANCHORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    index = find_tensor(table, count, chunk)
    row = table + index * COLUMNS
    scalars += index * SCALARS
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    step_size = tl.load(step_sizes + index).to(OPMATH)
    if begin + CHUNK <= tl.load(row + NUMEL):
        _update_param(
            row, scalars, begin, step_size, False,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, ANCHORED, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _update_param(
            row, scalars, begin, step_size, True,
            PARAM, STATE, OPMATH, MASTER, ALIGNED, ANCHORED, CHUNK, BLOCK,
        )  # fmt: skip


def lamb_(
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
    """One LAMB step over lists of tensors of one device, in place.

    Shapes, dtypes, hyperparameters and errors are those of `superfine_kernels.lamb_`; optional lists are empty where
    they are absent, as `max_exp_avg_sqs` always is. Returns the positions that it left alone, steps included: dtypes
    that it has no kernel for, and tensors that are not dense or lie in another order than their parameter.
    """
    rest, launches = prepare(
        "lamb_",
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps),
        chunk=CHUNK,
        scalars_of=lambda step: _scalars(**hyper, step=step),
        scalar_dtype=torch.float64,
        zero_grads=zero_grads,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
    )
    for launch in launches:
        tables, count, device = (launch.table, launch.scalars), len(launch.table), launch.table.device
        sums = torch.empty(launch.chunks, 2, dtype=torch.float64, device=device)
        step_sizes = torch.empty(count, dtype=torch.float64, device=device)
        with on(device):
            _lamb_moments[(launch.chunks,)](
                *tables, count, sums, **launch.constants, ZERO_GRAD=zero_grads,
                SUM_BLOCKS=SUM_BLOCKS, SUM_BLOCK=SUM_BLOCK, LANES=LANES,
                num_warps=MOMENTS_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_step_size[(count,)](
                *tables, sums, step_sizes, CHUNK=CHUNK, SUM_BLOCKS=SUM_BLOCKS, LANES=LANES,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_param[(launch.chunks,)](
                *tables, count, step_sizes, **launch.constants, CHUNK=CHUNK, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return rest


def _scalars(
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
    step: float,
) -> list[float]:
    """`lamb_scalars` of csrc/math/lamb.h, in double; the kernels round them once."""
    return [
        gradient_scale,
        beta1,
        1 - beta1 if grad_averaging else 1.0,
        beta2,
        1 - beta2,
        1 / (1 - beta1**step) if bias_correction else 1.0,
        1 / math.sqrt(1 - beta2**step) if bias_correction else 1.0,
        eps,
        weight_decay,
        lr,
        float(adapt),
        1.0 if trust_clip else math.inf,
    ]
