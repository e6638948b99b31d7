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

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import describe, opmath_dtype, reject

#: Elements per program: enough to amortise the search for its tensor; 1M parameters still make 256 programs.
CHUNK = 4096
#: Elements per iteration: 4 a thread with 4 warps, one 16-byte access in float32. Twice as many take twice
#: the registers (AOT, sm_90), which halves the number of programs that hide each other's latency.
BLOCK = 512
WARPS = 4

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# Columns of the table of addresses (int64) and of the table of scalars.
TABLE_COLUMNS = 7  # param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, numel, first chunk
SCALAR_COLUMNS = 8  # in the order of AdamWScalars in csrc/math/adamw.h


@triton.jit
def _pointer(table, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


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
    index = tl.full((), 0, tl.int32)  # the last tensor whose first chunk is not after ours
    end = tl.full((), 0, tl.int32) + count
    while end - index > 1:
        middle = (index + end) // 2
        before = tl.load(table + middle * TABLE_COLUMNS + 6) <= chunk
        index = tl.where(before, middle, index)
        end = tl.where(before, end, middle)

    row = table + index * TABLE_COLUMNS
    param = _pointer(row, 0, PARAM, ALIGNED)
    grad = _pointer(row, 1, PARAM, ALIGNED)
    exp_avg = _pointer(row, 2, STATE, ALIGNED)
    exp_avg_sq = _pointer(row, 3, STATE, ALIGNED)
    max_exp_avg_sq = _pointer(row, 4, STATE, ALIGNED)
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
    rest = _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
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
        with _on(device):
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


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; the interpreter on none."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> list[int]:
    """The checks of csrc/bind/adamw_lists.h; returns the positions that the kernel does not take."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in (*lists.items(), ("steps", steps)):
        if len(tensors) != len(params):
            raise ValueError(
                f"adamw_: {name} has {len(tensors)} tensors; expected {len(params)}, one for each of params"
            )
    rest: list[int] = []
    written: list[tuple[int, int]] = []
    for i, (param, step) in enumerate(zip(params, steps, strict=True)):
        if param.device != params[0].device:
            reject("adamw_", f"params[{i}]", param, f"a tensor on {params[0].device}, as params[0]")
        if step.numel() != 1 or step.dtype != torch.float32 or step.device.type != "cpu":
            reject("adamw_", f"steps[{i}]", step, "float32 () on cpu")
        for name, tensors in lists.items():
            t = tensors[i]
            like = param if name in ("grads", "exp_avgs") else exp_avgs[i]
            dtype_agrees = t.dtype == like.dtype or name == "exp_avgs"
            if t.shape != param.shape or t.device != param.device or not dtype_agrees:
                reject("adamw_", f"{name}[{i}]", t, describe(like))
        all_of_it = [param, *(tensors[i] for tensors in lists.values())]
        if not (
            _has_kernel(param.dtype, exp_avgs[i].dtype)
            and _is_dense(param)
            and all(_same_order(t, param) for t in all_of_it)
        ):
            rest.append(i)
        elif param.numel() > 0:
            stored = [param, *all_of_it[2:]]
            written += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in stored]
    if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(written))):
        raise ValueError(
            "adamw_: params and optimizer state overlap in memory; expected every tensor to have memory of "
            "its own (is a parameter, or a view of it, given twice?)"
        )
    return rest


def _has_kernel(param: torch.dtype, state: torch.dtype) -> bool:
    wide_state = state == torch.float32 and param in (torch.bfloat16, torch.float16)
    return param in TRITON_DTYPES and (state == param or wide_state)


def _is_dense(t: Tensor) -> bool:
    """The elements fill one stretch of memory without gaps or overlap, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(a: Tensor, b: Tensor) -> bool:
    return all(s == r for s, r, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n != 1)
