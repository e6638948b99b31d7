"""Losses of an output and its target in Triton, element by element, one program for each block of elements.

For outputs x, targets t, weights w and p (1 without):

    bce_with_logits   loss = w [a x + b log(1 + e)]     e = exp(-|x|), b = 1 - t + p t
                      dx   = w [a -+ b e / (1 + e)]     a = 1 - t and - where x > 0, else a = -p t and +
    mse               loss = w (x - t)^2
                      dx   = 2 w (x - t)

Traffic per element: one read of x and t, one write of dx where it is wanted. A program writes the sum of its losses;
torch adds these up, in float64.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._elements import Elements, Pattern
from superfine_kernels._library import opmath_dtype
from superfine_kernels.triton import on

#: Elements of a program: 8 a thread, two 16-byte loads in float32 and one in bfloat16.
BLOCK = 1024
WARPS = 4


@triton.jit
def _log1p(e, OPMATH: tl.constexpr):
    """log(1 + e) for e in [0, 1]."""
    if OPMATH == tl.float64:  # noqa: SIM300
        one = 1.0 + e  # what it lost of e is made good by the quotient (Kahan)
        return tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    # Triton's float32 logarithm is good to 2^-22, not to a part of itself: the polynomial of csrc/math.
    s = e / (2.0 + e)
    z = s * s
    p = tl.fma(tl.fma(tl.fma(z * 0 + 2.795074e-1, z, 2.801597e-1), z, 4.00205e-1), z, 6.6666436e-1)
    return tl.fma(p * z, s, s + s)


@triton.jit
def _values(
    values, start, offsets, mask, length, repeat, HAS: tl.constexpr, SHORT: tl.constexpr, OPMATH: tl.constexpr
):
    """A pattern's values for a block: see Pattern. It is at least a block long, or holds all elements."""
    w = tl.where(mask, 1.0, 0.0).to(OPMATH)
    if HAS:
        group = start // repeat
        rest = start - group * repeat
        if SHORT:
            local = ((rest.to(tl.int32) + offsets) // repeat).to(tl.int64)
        else:
            local = (rest + offsets >= repeat).to(tl.int64)
        at = group % length + local
        w = tl.load(values + tl.where(at >= length, at - length, at), mask=mask, other=0.0).to(OPMATH)
    return w


@triton.jit
def _elementwise_loss(
    input, target, weight, pos_weight, losses, sums, gradient, scale,
    count, weight_length, weight_repeat, pos_weight_length, pos_weight_repeat,
    MSE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_SHORT: tl.constexpr, HAS_POS_WEIGHT: tl.constexpr,
    POS_WEIGHT_SHORT: tl.constexpr, LOSSES: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
    SCALE_PER_ELEMENT: tl.constexpr, OPMATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    i = start + offsets
    mask = i < count
    x = tl.load(input + i, mask=mask, other=0.0).to(OPMATH)
    t = tl.load(target + i, mask=mask, other=0.0).to(OPMATH)
    w = _values(weight, start, offsets, mask, weight_length, weight_repeat, HAS_WEIGHT, WEIGHT_SHORT, OPMATH)
    if MSE:
        difference = x - t
        loss = difference * difference
        slope = 2.0 * difference
    else:
        negative = 1.0 - t
        positive = t * _values(
            pos_weight, start, offsets, mask, pos_weight_length, pos_weight_repeat, HAS_POS_WEIGHT, POS_WEIGHT_SHORT,
            OPMATH,
        )  # fmt: skip
        both = negative + positive
        e = tl.exp(tl.where(x > 0, -x, x))
        a = tl.where(x > 0, negative, -positive)
        b = both * (e / (1.0 + e))
        loss = tl.fma(both, _log1p(e, OPMATH), tl.where(a == 0, 0.0, a * x))
        slope = a + tl.where(x > 0, -b, b)
    if LOSSES:
        tl.store(losses + i, w * loss, mask=mask)
    if SUMS:
        tl.store(sums + program, tl.sum(tl.where(mask, w * loss, 0.0), 0))
    if GRADIENT:
        if SCALE_PER_ELEMENT:
            upstream = tl.load(scale + i, mask=mask, other=0.0).to(OPMATH)
        else:
            upstream = tl.load(scale).to(OPMATH)
        tl.store(gradient + i, (upstream * (w * slope)).to(gradient.dtype.element_ty), mask=mask)


def elementwise_loss(
    elements: Elements,
    losses: Tensor | None = None,
    gradient: Tensor | None = None,
    scale: Tensor | None = None,
    denominator: float = 1.0,
    total: bool = False,
) -> Tensor | None:
    """Fills `losses` and `gradient`, and returns the sum of the losses where `total` asks for it.

    Args:
        elements: dense input, target and patterns of weights.
        losses: like the input, float32 (float64 for float64 inputs).
        gradient: where `scale` / `denominator` times the derivative goes: like the input, or the input itself.
        scale: one number or one for each element, of the dtype of the losses; None for 1.
        denominator: what sum and gradient are divided by.
    """
    input, count = elements.input, elements.input.numel()
    dtype = opmath_dtype(input.dtype)
    if gradient is not None:
        scale = torch.ones((), dtype=dtype, device=input.device) if scale is None else scale
        scale = scale if denominator == 1 else scale / denominator
    programs = triton.cdiv(count, BLOCK)
    sums = input.new_empty(programs, dtype=dtype) if total else None
    weight, pos_weight = elements.weight, elements.pos_weight
    with on(input.device):
        _elementwise_loss[(programs,)](
            input, elements.target, weight.values, pos_weight.values, losses, sums, gradient, scale,
            count, _length(weight), weight.repeat, _length(pos_weight), pos_weight.repeat,
            MSE=elements.loss == "mse", HAS_WEIGHT=weight.values is not None, WEIGHT_SHORT=weight.repeat < BLOCK,
            HAS_POS_WEIGHT=pos_weight.values is not None, POS_WEIGHT_SHORT=pos_weight.repeat < BLOCK,
            LOSSES=losses is not None, SUMS=total, GRADIENT=gradient is not None,
            SCALE_PER_ELEMENT=scale is not None and scale.dim() > 0,
            OPMATH=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return None if sums is None else (sums.sum(dtype=torch.float64) / denominator).to(dtype)


def _length(pattern: Pattern) -> int:
    return 1 if pattern.values is None else pattern.values.numel()
