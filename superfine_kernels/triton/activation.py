"""Activations and gated linear units in Triton, one program for each block of a row.

For gates x, other projections u (1 without) and, in backward, the gradient g of the result:

    gelu        f = x Phi(x)        f' = Phi(x) + x exp(-x^2/2) / sqrt(2 pi)
    gelu_tanh   f = x s(z)          f' = s + x s (1 - s) dz     z = x (c + d x^2), s the sigmoid
    silu        f = x s(x)          f' = s + x s (1 - s)
    out = f u;  dx = g u f', du = g f

Traffic: every input is read once and every result written once. Rows may lie apart, as the halves of a projection do.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import opmath_dtype
from superfine_kernels.activation import CODES, Layout
from superfine_kernels.triton import on

#: Elements of a program: 8 a thread, two 16-byte loads in float32 and one in bfloat16; half as many in float64, whose
#: error function would spill registers.
BLOCK = 1024
WARPS = 4

_GELU, _GELU_TANH = tl.constexpr(CODES["gelu"]), tl.constexpr(CODES["gelu_tanh"])


@triton.jit
def _value_and_slope(x, FUNCTION: tl.constexpr):
    """f(x) and f'(x); infinities have their limits: the exponential is 0 before a clamped x is."""
    far = 1000.0 if x.dtype == tl.float64 else 100.0
    near = tl.where(x > far, far, tl.where(x < -far, -far, x))
    floor = tl.where(x < -far, -far, x)
    if FUNCTION == _GELU:
        phi = 0.5 + 0.5 * tl.erf(near * 0.70710678118654752440)
        density = 0.39894228040143267794 * tl.exp(-0.5 * (near * near))
        return floor * phi, tl.fma(near, density, phi)
    z = near
    dz = tl.full(x.shape, 1.0, x.dtype)
    if FUNCTION == _GELU_TANH:
        square = near * near
        z = near * (1.59576912160573071176 + 0.07135481627260025 * square)
        dz = 1.59576912160573071176 + 0.21406444881780075 * square
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    sigmoid = tl.where(z > 0, r, e * r)
    return floor * sigmoid, tl.fma(near * dz, e * r * r, sigmoid)


@triton.jit
def _activation(
    gate, up, grad, out, dup, columns, blocks, gate_stride, up_stride, grad_stride,
    FUNCTION: tl.constexpr, OPMATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    at = row * columns + column
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(OPMATH)
    value, slope = _value_and_slope(x, FUNCTION)
    if grad is None:
        if up is not None:
            value *= tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(OPMATH)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
    else:
        g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(OPMATH)
        if dup is not None:
            tl.store(dup + at, (value * g).to(dup.dtype.element_ty), mask=mask)
        if out is not None:
            slope *= g
            if up is not None:
                slope *= tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(OPMATH)
            tl.store(out + at, slope.to(out.dtype.element_ty), mask=mask)


def activation(function: str, layout: Layout, out: Tensor | None, dup: Tensor | None) -> None:
    """Without a gradient in the layout fills `out` with f(gate) * up, else `out` and `dup` with those of gate and up.

    Args:
        function: one of `superfine_kernels.activation.CODES`.
        layout: of gate, up or None, and the gradient of the result or None; of one dtype.
        out, dup: dense, in that dtype; None for a gradient that nobody needs.
    """
    gate, up, grad = layout.tensors
    if gate is None:
        raise ValueError("activation: gate is None; expected a tensor")
    wide = opmath_dtype(gate.dtype) == torch.float64
    block = BLOCK // 2 if wide else BLOCK
    blocks = triton.cdiv(layout.columns, block)
    with on(gate.device):
        _activation[(layout.rows * blocks,)](
            gate, up, grad, out, dup, layout.columns, blocks, *layout.strides,
            FUNCTION=CODES[function], OPMATH=tl.float64 if wide else tl.float32, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
