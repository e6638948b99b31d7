"""Multi-tensor AdamW in Triton: one launch for all tensors of one (parameter, state) pair of dtypes.

    g <- -g if maximize
    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Every rounding is that of csrc/math/adamw.h: contraction is off, two fmas are spelled out, division and square
root round to nearest. Addresses, sizes and scalars travel in two small tables that the host copies at every
step, so a step does not belong into a CUDA graph (one of the CUDA kernel does).

Traffic per parameter: 28 bytes in float32, 14 in bfloat16 or float16, 22 there with float32 moments.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import opmath_dtype
from superfine_kernels.triton._moments import TRITON_DTYPES, check, find_tensor, on, pointer

#: Elements per program: enough to amortise the search for its tensor; 1M parameters still make 256 programs.
CHUNK = 4096
#: Elements per iteration: 4 a thread with 4 warps, one 16-byte access in float32. Twice as many take twice
#: the registers (AOT, sm_90), which halves the number of programs that hide each other's latency.
BLOCK = 512
WARPS = 4

# Columns of the table of addresses (int64) and of the table of scalars.
TABLE_COLUMNS = 7  # param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, numel, first chunk
SCALAR_COLUMNS = 8  # in the order of AdamWScalars in csrc/math/adamw.h


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, offsets, mask, scalars,
    AMSGRAD: tl.constexpr, OPMATH: tl.constexpr,
):  # fmt: skip
    decay = tl.load(scalars)
    one_minus_beta1 = tl.load(scalars + 1)
    beta2 = tl.load(scalars + 2)
    one_minus_beta2 = tl.load(scalars + 3)
    eps = tl.load(scalars + 4)
    negative_step_size = tl.load(scalars + 5)
    sqrt_bias_correction2 = tl.load(scalars + 6)
    gradient_sign = tl.load(scalars + 7)

    p = tl.load(param + offsets, mask=mask).to(OPMATH)
    g = tl.load(grad + offsets, mask=mask).to(OPMATH)
    m = tl.load(exp_avg + offsets, mask=mask).to(OPMATH)
    v = tl.load(exp_avg_sq + offsets, mask=mask).to(OPMATH)

    g = g * gradient_sign
    p = p * decay
    m = tl.fma(one_minus_beta1 + tl.zeros_like(m), g - m, m)
    v = tl.fma(one_minus_beta2 * g, g, v * beta2)
    second_moment = v
    if AMSGRAD:
        v_max = tl.load(max_exp_avg_sq + offsets, mask=mask).to(OPMATH)
        second_moment = tl.where((v_max < v) | (v != v), v, v_max)  # NaN wins, as in torch.maximum
        tl.store(max_exp_avg_sq + offsets, second_moment.to(max_exp_avg_sq.dtype.element_ty), mask=mask)
    if p.dtype == tl.float64:  # the plain operations round to nearest
        denominator = tl.sqrt(second_moment) / sqrt_bias_correction2 + eps
        p = p + (negative_step_size * m) / denominator
    else:
        denominator = tl.div_rn(tl.sqrt_rn(second_moment), sqrt_bias_correction2 + tl.zeros_like(m)) + eps
        p = p + tl.div_rn(negative_step_size * m, denominator)

    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)
    tl.store(exp_avg + offsets, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + offsets, v.to(exp_avg_sq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _adamw(
    table, scalars, count,
    PARAM: tl.constexpr, STATE: tl.constexpr, OPMATH: tl.constexpr, AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr, TABLE_COLUMNS: tl.constexpr, SCALAR_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    index = find_tensor(table, count, chunk, TABLE_COLUMNS)
    row = table + index * TABLE_COLUMNS
    param = pointer(row, 0, PARAM, ALIGNED)
    grad = pointer(row, 1, PARAM, ALIGNED)
    exp_avg = pointer(row, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED)
    max_exp_avg_sq = pointer(row, 4, STATE, ALIGNED)
    numel = tl.load(row + 5)
    begin = (chunk - tl.load(row + 6)) * CHUNK
    scalars += index * SCALAR_COLUMNS

    if begin + CHUNK <= numel:  # without a mask, accesses are 16 bytes wide
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            _update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, offsets, None, scalars, AMSGRAD, OPMATH)
    else:
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            mask = offsets < numel
            _update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, offsets, mask, scalars, AMSGRAD, OPMATH)


def adamw_(
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
) -> list[int]:
    """One AdamW step over lists of tensors of one device, in place.

    Shapes, dtypes and errors are those of `superfine_kernels.adamw_`. Returns the positions that it left
    alone, steps included: dtypes that it has no kernel for, and tensors that are not dense or lie in another
    order than their parameter.
    """
    tensors = list(zip(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or exp_avg_sqs, strict=False))
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    rest = check("adamw_", params, lists, steps)
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
                scalars.append(_scalars(lr, beta1, beta2, eps, weight_decay, maximize, float(steps[i])))
                chunks += triton.cdiv(numel, CHUNK)
        if chunks == 0:
            continue
        device, opmath = params[0].device, opmath_dtype(param_dtype)
        with on(device):
            _adamw[(chunks,)](
                torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
                torch.tensor(scalars, dtype=opmath).to(device, non_blocking=True),
                len(rows),
                PARAM=TRITON_DTYPES[param_dtype], STATE=TRITON_DTYPES[state_dtype],
                OPMATH=TRITON_DTYPES[opmath], AMSGRAD=len(max_exp_avg_sqs) > 0, ALIGNED=aligned,
                TABLE_COLUMNS=TABLE_COLUMNS, SCALAR_COLUMNS=SCALAR_COLUMNS, CHUNK=CHUNK, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # autograd must notice, as after any in-place op
    return rest


def _scalars(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool, step: float
) -> list[float]:
    """`adamw_scalars` of csrc/math/adamw.h, in double; the table rounds them once."""
    return [
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        -(lr / (1 - beta1**step)),
        math.sqrt(1 - beta2**step),
        -1.0 if maximize else 1.0,
    ]
