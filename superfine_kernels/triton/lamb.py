"""Multi-tensor LAMB in Triton: four launches for all tensors of one storage.

    g <- gradient_scale * g
    m <- beta1 * m + beta3 * g                             beta3 = 1 - beta1, or 1 without grad_averaging
    v <- beta2 * v + (1 - beta2) * g * g
    u <- (m / bias1) / (sqrt(v) / sqrt(bias2) + eps) + weight_decay * p            or p - a, toward an anchor a
    p <- p - lr * trust_ratio * u                          trust_ratio = |p| / |u|, norms over the tensor

The first launch computes each tensor's scalars from its count of steps, the second steps the moments and sums up
the squares of each chunk, the third makes step sizes of these sums, the fourth updates the parameters. Every
rounding, and the order of the sums, is that of csrc/math/lamb.h.

Traffic per parameter: 40 bytes in float32, less what the fourth launch, which starts at the end, finds in the L2
cache. The CUDA kernel goes through batches that fit into the cache, so that 28 bytes remain; here the host would take
as long to launch a batch as the GPU to step it.
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
    moments_as_stored,
    quant_scale,
    quantize_first,
    quantize_second,
    random_key,
    store_param,
)

# The order of the sums, as in csrc/math/lamb.h.
LANES = 32
SUM_BLOCK = 2048  # elements that one set of lanes sums up
SUM_BLOCKS = 4  # of a chunk
CHUNK = SUM_BLOCKS * SUM_BLOCK  # elements per program
#: One warp a program where moments are stepped: its 4 x 32 lanes are one 16-byte access a thread in float32.
MOMENTS_WARPS = 1
#: Elements per iteration where parameters are updated: 4 a thread, as in AdamW.
BLOCK = 512
WARPS = 4

# Columns of the table of scalars (float64): LambScalars of csrc/math/lamb.h, in its order; the largest trust ratio
# is infinity, or 1 to clip. And whether the step is taken, and its random key.
TAKEN = tl.constexpr(12)
KEY = tl.constexpr(13)
SCALARS = tl.constexpr(14)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _lamb_scalars(
    table, scalars, count, seed: tl.int64,
    lr, beta1, beta2, gradient_scale, eps: tl.int64, weight_decay: tl.int64,
    BIAS_CORRECTION: tl.constexpr, GRAD_AVERAGING: tl.constexpr, ADAPT: tl.constexpr, TRUST_CLIP: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """Counts a step of each tensor; `scalars` of csrc/math/lamb.h, which the kernels round once."""
    index = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    step, taken = count_step(table, index, count, gradient_scale)
    beta1, beta2 = number(beta1), number(beta2)
    mask = index < count
    scalars += index * SCALARS
    tl.store(scalars, number(gradient_scale), mask=mask)
    tl.store(scalars + 1, beta1, mask=mask)
    tl.store(scalars + 2, 1 - beta1 if GRAD_AVERAGING else 1.0, mask=mask)
    tl.store(scalars + 3, beta2, mask=mask)
    tl.store(scalars + 4, 1 - beta2, mask=mask)
    if BIAS_CORRECTION:
        tl.store(scalars + 5, 1 / (1 - power(beta1, step)), mask=mask)
        tl.store(scalars + 6, 1 / tl.sqrt(1 - power(beta2, step)), mask=mask)
    else:
        tl.store(scalars + 5, 1.0, mask=mask)
        tl.store(scalars + 6, 1.0, mask=mask)
    tl.store(scalars + 7, number(eps), mask=mask)
    tl.store(scalars + 8, number(weight_decay), mask=mask)
    tl.store(scalars + 9, number(lr), mask=mask)
    tl.store(scalars + 10, 1.0 if ADAPT else 0.0, mask=mask)
    tl.store(scalars + 11, 1.0 if TRUST_CLIP else float("inf"), mask=mask)
    tl.store(scalars + TAKEN, taken.to(tl.float64), mask=mask)
    tl.store(as_bits(scalars + KEY), random_key(seed, step), mask=mask)


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
    param, grad, exp_avg, exp_avg_sq, _, anchor, remainders, scales, second, left = chunk_of(
        row, begin, SUM_BLOCKS * SUM_BLOCK, PARAM, STATE, MASTER, ALIGNED
    )

    lanes = tl.arange(0, LANES)[None, :]
    param_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    direction_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    for start in range(0, SUM_BLOCK, QUANT_BLOCK):
        first = start + tl.arange(0, SUM_BLOCKS)[:, None] * SUM_BLOCK
        block = first // QUANT_BLOCK
        block_mask = first < left if MASKED else None
        m_scale, v_scale = load_scales(scales, second, block, block_mask, STATE)
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
            tl.store(scales + block, new_m_scale, mask=block_mask)
            tl.store(scales + (second + block), new_v_scale, mask=block_mask)
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
                key = tl.load(as_bits(scalars + KEY))  # before the loop it would hold a register
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
    if tl.load(scalars + TAKEN) == 0:
        param_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
        direction_sum = param_sum
        if ZERO_GRAD:
            zero_chunk(row, begin, SUM_BLOCKS * SUM_BLOCK, SUM_BLOCKS * LANES, PARAM, ALIGNED)
    elif begin + SUM_BLOCKS * SUM_BLOCK <= tl.load(row + NUMEL):  # without a mask, accesses are 16 bytes wide
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
    most = tl.load(scalars + 11)

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
    param, _, exp_avg, exp_avg_sq, _, anchor, remainders, scales, second, left = chunk_of(
        row, begin, CHUNK, PARAM, STATE, MASTER, ALIGNED
    )
    key = tl.load(as_bits(scalars + KEY))

    for start in range(0, CHUNK, BLOCK):
        block = start // QUANT_BLOCK + tl.arange(0, BLOCK // QUANT_BLOCK)[:, None]
        offsets = block * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
        block_mask = block * QUANT_BLOCK < left if MASKED else None
        mask = offsets < left if MASKED else None
        p = load_param(param, remainders, offsets, mask, MASTER, OPMATH)
        m_scale, v_scale = load_scales(scales, second, block, block_mask, STATE)
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
    if tl.load(scalars + TAKEN) != 0:
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

    Raises:
        RuntimeError: the current stream is being captured into a CUDA graph.
    """
    rest, launches = prepare(
        "lamb_",
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps),
        hyper,
        chunk=CHUNK,
        zero_grads=zero_grads,
        stochastic_rounding=stochastic_rounding,
    )
    for launch in launches:
        table, count, device = launch.table, len(launch.table), launch.table.device
        scalars = torch.empty(count, SCALARS.value, dtype=torch.float64, device=device)
        sums = torch.empty(launch.chunks, 2, dtype=torch.float64, device=device)
        step_sizes = torch.empty(count, dtype=torch.float64, device=device)
        with on(device):
            _lamb_scalars[(triton.cdiv(count, COUNTED),)](
                table, scalars, count, seed, *arguments(hyper),
                BIAS_CORRECTION=hyper["bias_correction"], GRAD_AVERAGING=hyper["grad_averaging"],
                ADAPT=hyper["adapt"], TRUST_CLIP=hyper["trust_clip"], COUNTED=COUNTED,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            if launch.chunks == 0:
                continue
            _lamb_moments[(launch.chunks,)](
                table, scalars, count, sums, **launch.constants, ZERO_GRAD=zero_grads,
                SUM_BLOCKS=SUM_BLOCKS, SUM_BLOCK=SUM_BLOCK, LANES=LANES,
                num_warps=MOMENTS_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_step_size[(count,)](
                table, scalars, sums, step_sizes, CHUNK=CHUNK, SUM_BLOCKS=SUM_BLOCKS, LANES=LANES,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_param[(launch.chunks,)](
                table, scalars, count, step_sizes, **launch.constants, CHUNK=CHUNK, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return rest
