"""Multi-tensor LAMB in Triton: three launches for all tensors of one (parameter, state) pair of dtypes.

    g <- gradient_scale * g
    m <- beta1 * m + beta3 * g                             beta3 = 1 - beta1, or 1 without grad_averaging
    v <- beta2 * v + (1 - beta2) * g * g
    u <- (m / bias1) / (sqrt(v) / sqrt(bias2) + eps) + weight_decay * p
    p <- p - lr * trust_ratio * u                          trust_ratio = |p| / |u|, norms over the tensor

The first launch steps the moments and sums up the squares of each chunk, the second makes step sizes of these sums,
the third updates the parameters. Every rounding, and the order of the sums, is that of csrc/math/lamb.h.

Traffic per parameter: 40 bytes in float32, less what the third launch, which starts at the end, finds in the L2
cache. The CUDA kernel goes through batches that fit into the cache, so that 28 bytes remain; here the host would take
as long to launch a batch as the GPU to step it.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import opmath_dtype
from superfine_kernels.triton._moments import TRITON_DTYPES, check, find_tensor, on, pointer

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

# Columns of the table of addresses (int64), of the table of scalars (float64), and of the sums (float64).
TABLE_COLUMNS = 6  # param, grad, exp_avg, exp_avg_sq, numel, first chunk
SCALAR_COLUMNS = 12  # in the order of LambScalars in csrc/math/lamb.h; the last is the largest trust ratio


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
def _direction(p, m, v, scalars, OPMATH: tl.constexpr):
    inverse_bias1 = tl.load(scalars + 5).to(OPMATH)
    inverse_sqrt_bias2 = tl.load(scalars + 6).to(OPMATH) + tl.zeros_like(p)
    eps = tl.load(scalars + 7).to(OPMATH) + tl.zeros_like(p)
    weight_decay = tl.load(scalars + 8).to(OPMATH) + tl.zeros_like(p)
    if p.dtype == tl.float64:  # the plain operations round to nearest
        quotient = (m * inverse_bias1) / tl.fma(tl.sqrt(v), inverse_sqrt_bias2, eps)
    else:
        quotient = tl.div_rn(m * inverse_bias1, tl.fma(tl.sqrt_rn(v), inverse_sqrt_bias2, eps))
    return tl.fma(weight_decay, p, quotient)


@triton.jit
def _update_moments(
    param, grad, exp_avg, exp_avg_sq, offsets, mask, scalars, param_sum, direction_sum, OPMATH: tl.constexpr
):
    gradient_scale = tl.load(scalars).to(OPMATH)
    beta1 = tl.load(scalars + 1).to(OPMATH)
    beta3 = tl.load(scalars + 2).to(OPMATH)
    beta2 = tl.load(scalars + 3).to(OPMATH)
    one_minus_beta2 = tl.load(scalars + 4).to(OPMATH)

    p = tl.load(param + offsets, mask=mask).to(OPMATH)
    g = tl.load(grad + offsets, mask=mask, eviction_policy="evict_first").to(OPMATH)
    m = tl.load(exp_avg + offsets, mask=mask).to(OPMATH)
    v = tl.load(exp_avg_sq + offsets, mask=mask).to(OPMATH)

    g = g * gradient_scale
    m = tl.fma(beta1 + tl.zeros_like(m), m, beta3 * g).to(exp_avg.dtype.element_ty)
    v = tl.fma(one_minus_beta2 * g, g, v * beta2).to(exp_avg_sq.dtype.element_ty)
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)

    u = _direction(p, m.to(OPMATH), v.to(OPMATH), scalars, OPMATH)  # of the moments as stored
    param_squares = tl.fma(p, p, param_sum)
    direction_squares = tl.fma(u, u, direction_sum)
    if mask is not None:
        param_squares = tl.where(mask, param_squares, param_sum)
        direction_squares = tl.where(mask, direction_squares, direction_sum)
    return param_squares, direction_squares


@triton.jit(do_not_specialize=["count"])
def _lamb_moments(
    table, scalars, count, sums,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, ALIGNED: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr, SCALAR_COLUMNS: tl.constexpr,
    SUM_BLOCKS: tl.constexpr, SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    index = find_tensor(table, count, chunk, TABLE_COLUMNS)
    row = table + index * TABLE_COLUMNS
    param = pointer(row, 0, PARAM, ALIGNED)
    grad = pointer(row, 1, PARAM, ALIGNED)
    exp_avg = pointer(row, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED)
    numel = tl.load(row + 4)
    begin = (chunk - tl.load(row + 5)) * (SUM_BLOCKS * SUM_BLOCK)
    scalars += index * SCALAR_COLUMNS

    first = begin + tl.arange(0, SUM_BLOCKS)[:, None] * SUM_BLOCK + tl.arange(0, LANES)[None, :]
    param_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    direction_sum = tl.zeros((SUM_BLOCKS, LANES), OPMATH)
    if begin + SUM_BLOCKS * SUM_BLOCK <= numel:  # without a mask, accesses are 16 bytes wide
        for start in range(0, SUM_BLOCK, LANES):
            param_sum, direction_sum = _update_moments(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                first + start,
                None,
                scalars,
                param_sum,
                direction_sum,
                OPMATH,
            )
    else:
        for start in range(0, SUM_BLOCK, LANES):
            mask = first + start < numel
            param_sum, direction_sum = _update_moments(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                first + start,
                mask,
                scalars,
                param_sum,
                direction_sum,
                OPMATH,
            )
    one = tl.arange(0, 1)
    tl.store(sums + 2 * chunk + one, _sum_block_lanes(param_sum.to(tl.float64), SUM_BLOCKS))
    tl.store(sums + 2 * chunk + 1 + one, _sum_block_lanes(direction_sum.to(tl.float64), SUM_BLOCKS))


@triton.jit
def _lamb_step_size(
    table, scalars, sums, step_sizes,
    TABLE_COLUMNS: tl.constexpr, SCALAR_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, SUM_BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = table + index * TABLE_COLUMNS
    chunks = (tl.load(row + 4) + CHUNK - 1) // CHUNK
    sums += 2 * tl.load(row + 5)
    scalars += index * SCALAR_COLUMNS
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
    param, exp_avg, exp_avg_sq, offsets, mask, scalars, negative_step_size, OPMATH: tl.constexpr
):
    p = tl.load(param + offsets, mask=mask).to(OPMATH)
    m = tl.load(exp_avg + offsets, mask=mask, eviction_policy="evict_first").to(OPMATH)
    v = tl.load(exp_avg_sq + offsets, mask=mask, eviction_policy="evict_first").to(OPMATH)
    p = tl.fma(negative_step_size + tl.zeros_like(p), _direction(p, m, v, scalars, OPMATH), p)
    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _lamb_param(
    table, scalars, count, step_sizes,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, ALIGNED: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr, SCALAR_COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    index = find_tensor(table, count, chunk, TABLE_COLUMNS)
    row = table + index * TABLE_COLUMNS
    param = pointer(row, 0, PARAM, ALIGNED)
    exp_avg = pointer(row, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED)
    numel = tl.load(row + 4)
    begin = (chunk - tl.load(row + 5)) * CHUNK
    scalars += index * SCALAR_COLUMNS
    step_size = tl.load(step_sizes + index).to(OPMATH)

    if begin + CHUNK <= numel:
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            _update_param(param, exp_avg, exp_avg_sq, offsets, None, scalars, step_size, OPMATH)
    else:
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            mask = offsets < numel
            _update_param(param, exp_avg, exp_avg_sq, offsets, mask, scalars, step_size, OPMATH)


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    **hyper: Any,
) -> list[int]:
    """One LAMB step over lists of tensors of one device, in place.

    Shapes, dtypes, hyperparameters and errors are those of `superfine_kernels.lamb_`. Returns the positions that it
    left alone, steps included: dtypes that it has no kernel for, and tensors that are not dense or lie in another
    order than their parameter.
    """
    tensors = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=False))
    rest = check("lamb_", params, {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, steps)
    launches: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = defaultdict(list)
    for i in sorted(set(range(len(params))) - set(rest)):
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors[i])
        launches[params[i].dtype, exp_avgs[i].dtype, aligned].append(i)
        steps[i] += 1
    for (param_dtype, state_dtype, aligned), positions in launches.items():
        rows: list[list[int]] = []
        scalars: list[list[float]] = []
        chunks = 0
        for i in positions:
            numel = params[i].numel()
            if numel > 0:
                rows.append([*(t.data_ptr() for t in tensors[i]), numel, chunks])
                scalars.append(_scalars(step=float(steps[i]), **hyper))
                chunks += triton.cdiv(numel, CHUNK)
        if chunks == 0:
            continue
        device = params[0].device
        on_device = (
            torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
            torch.tensor(scalars, dtype=torch.float64).to(device, non_blocking=True),
        )
        sums = torch.empty(chunks, 2, dtype=torch.float64, device=device)
        step_sizes = torch.empty(len(rows), dtype=torch.float64, device=device)
        columns = {"TABLE_COLUMNS": TABLE_COLUMNS, "SCALAR_COLUMNS": SCALAR_COLUMNS}
        dtypes = {
            "PARAM": TRITON_DTYPES[param_dtype], "STATE": TRITON_DTYPES[state_dtype],
            "OPMATH": TRITON_DTYPES[opmath_dtype(param_dtype)], "ALIGNED": aligned,
        }  # fmt: skip
        with on(device):
            _lamb_moments[(chunks,)](
                *on_device, len(rows), sums, **dtypes, **columns,
                SUM_BLOCKS=SUM_BLOCKS, SUM_BLOCK=SUM_BLOCK, LANES=LANES,
                num_warps=MOMENTS_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_step_size[(len(rows),)](
                *on_device, sums, step_sizes, **columns,
                CHUNK=CHUNK, SUM_BLOCKS=SUM_BLOCKS, LANES=LANES,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            _lamb_param[(chunks,)](
                *on_device, len(rows), step_sizes, **dtypes, **columns,
                CHUNK=CHUNK, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # autograd must notice, as after any in-place op
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
