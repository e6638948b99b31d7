"""Layer norm and RMS norm in Triton: a program holds some rows, or one, in registers.

    layer norm   n = (x - mean) rstd    rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    RMS norm     n = x rstd             rstd = 1 / sqrt(mean(x^2) + eps)
    output       y = n w + b
    gradient     dx = rstd (gw - mean(gw) - n mean(gw n)), gw = dy w;  without mean(gw) in an RMS norm

Traffic per element: one read of x, one write of y; backward one read of dy and x and one write of dx; with a residual
one more read and write forward, and one more read backward. What the rounded mean leaves is taken off as in
csrc/math/layer_norm.h. For dw and db a program adds up its rows, at most 256 programs of them, and torch adds up what
they found.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import opmath_dtype
from superfine_kernels.triton import on
from superfine_kernels.triton._losses import option, real

#: Elements of a program with short rows: 16 a thread.
TILE = 2048
#: Programs that add up gradients of weights: a few for each multiprocessor, and few partial sums.
MOST_SUMS = 256

#: Bytes of a row whose sums fit into registers beside the gradient of the input; longer ones take two launches.
LONGEST_WITH_SUMS = 16384


@triton.jit
def _parameter(values, column, in_row, offset, OPMATH: tl.constexpr):
    """offset + values of columns; ones where there are none."""
    w = tl.where(in_row, 1.0, 0.0).to(OPMATH)
    if values is not None:
        w = tl.load(values + column, mask=in_row, other=0.0).to(OPMATH) + offset
    return w


@triton.jit
def _forward(
    input, residual, weight, bias, sums, output, mean_out, rstd_out, rows, size, eps, weight_offset,
    RMS: tl.constexpr, CAST: tl.constexpr, OPMATH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < size
    mask = (row < rows)[:, None] & in_row[None, :]
    at = row[:, None] * size + column[None, :]
    x = tl.load(input + at, mask=mask, other=0.0).to(OPMATH)
    if residual is not None:
        total = (x + tl.load(residual + at, mask=mask, other=0.0).to(OPMATH)).to(sums.dtype.element_ty)
        tl.store(sums + at, total, mask=mask)
        x = total.to(OPMATH)  # as it was rounded
    if not RMS:
        mean = tl.sum(x, 1) / size
        x = tl.where(mask, x - mean[:, None], 0.0)
        rest = tl.sum(x, 1) / size
        x = tl.where(mask, x - rest[:, None], 0.0)
        if mean_out is not None:
            tl.store(mean_out + row, mean, mask=row < rows)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / size + real(eps, OPMATH))
    if rstd_out is not None:
        tl.store(rstd_out + row, rstd, mask=row < rows)
    n = x * rstd[:, None]
    if CAST:
        n = n.to(input.dtype.element_ty).to(OPMATH)
    y = n * _parameter(weight, column, in_row, real(weight_offset, OPMATH), OPMATH)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=in_row, other=0.0).to(OPMATH)[None, :]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    grad, grad_sum, input, weight, mean, rstd, dinput, dweights, dbiases, rows, size, weight_offset, steps,
    RMS: tl.constexpr, OPMATH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    in_row = column < size
    w = _parameter(weight, column, in_row, real(weight_offset, OPMATH), OPMATH)[None, :]
    dw = tl.zeros((BLOCK,), OPMATH)
    db = tl.zeros((BLOCK,), OPMATH)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        at = row[:, None] * size + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(OPMATH)
        if dbiases is not None:
            db += tl.sum(g, 0)
        if input is not None:
            x = tl.load(input + at, mask=mask, other=0.0).to(OPMATH)
            r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
            gw = g * w
            if RMS:
                n = x * r
                centred = gw
            else:
                centre = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
                n = tl.where(mask, (x - centre) * r, 0.0)
                n -= (tl.sum(n, 1) / size)[:, None]
                n = tl.where(mask, n, 0.0)
                centred = gw - (tl.sum(gw, 1) / size)[:, None]
            if dweights is not None:
                dw += tl.sum(g * n, 0)
            if dinput is not None:
                dx = r * (centred - n * (tl.sum(gw * n, 1) / size)[:, None])
                if grad_sum is not None:
                    dx += tl.load(grad_sum + at, mask=mask, other=0.0).to(OPMATH)
                tl.store(dinput + at, dx.to(dinput.dtype.element_ty), mask=mask)
    if dweights is not None:
        tl.store(dweights + program * size + column, dw, mask=in_row)
    if dbiases is not None:
        tl.store(dbiases + program * size + column, db, mask=in_row)


def _tile(size: int) -> tuple[int, int, int]:
    """Rows of a program, columns of its block, warps: 16 elements a thread, so that a gradient's values fit."""
    block = triton.next_power_of_2(size)
    return max(1, min(TILE // block, 16)), block, max(4, block // 512)


def layer_norm(
    rms: bool,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    sums: Tensor | None,
    output: Tensor,
    statistics: Tensor | None,
) -> None:
    """Fills output, the sums with a residual, and the rows' statistics: mean and rstd, or rstd alone."""
    size = input.shape[-1]
    rows = input.numel() // size
    tile, block, warps = _tile(size)
    mean, rstd = _rows_of(rms, statistics)
    with on(input.device):
        _forward[(triton.cdiv(rows, tile),)](
            input, residual, weight, bias, sums, output, mean, rstd, rows, size,
            option(eps, input), option(weight_offset, input),
            RMS=rms, CAST=cast_before_weight, OPMATH=_opmath(input), ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def layer_norm_gradient(
    rms: bool,
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor | None,
    weight_offset: float,
    dinput: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fills what is given of the gradients of input, weight and bias."""
    like = grad if input is None else input
    size = grad.shape[-1]
    rows = grad.numel() // size
    tile, block, warps = _tile(size)
    summed = dweight is not None or dbias is not None
    if dinput is not None and summed and block * opmath_dtype(like.dtype).itemsize > LONGEST_WITH_SUMS:
        kept = (grad, grad_sum, input, weight, statistics, weight_offset)
        layer_norm_gradient(rms, *kept, dinput, None, None)
        dinput = None
    steps = triton.cdiv(rows, tile * MOST_SUMS) if summed else 1
    programs = triton.cdiv(rows, tile * steps)
    real_dtype = opmath_dtype(like.dtype)
    partial = [
        None if out is None else torch.empty((programs, size), dtype=real_dtype, device=grad.device)
        for out in (dweight, dbias)
    ]
    mean, rstd = _rows_of(rms, statistics)
    with on(grad.device):
        _gradient[(programs,)](
            grad, grad_sum, input, weight, mean, rstd, dinput, *partial, rows, size,
            option(weight_offset, like), steps,
            RMS=rms, OPMATH=_opmath(like), ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    for out, sums in zip((dweight, dbias), partial, strict=True):
        if out is not None and sums is not None:
            torch.sum(sums, 0, out=out)


def _rows_of(rms: bool, statistics: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if statistics is None:
        return None, None
    return None if rms else statistics[0], statistics[-1]


def _opmath(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
