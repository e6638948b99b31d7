"""How the optimizers' Triton kernels store parameters and moments: the rules of csrc/core/dtype.h, math/random.h and
math/quantized.h.

Numbers come in tiles. Each row of a tile lies within one block of 8-bit moments, so that a scale for each row is
enough; other moments have None for scales.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803, N806, SIM300 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

import triton
import triton.language as tl

from superfine_kernels._storage import BLOCK

QUANT_BLOCK = tl.constexpr(BLOCK)

# --- random bits ------------------------------------------------------------------------------------------


@triton.jit
def _mix_bits(x):
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0xD35A2D97
    x ^= x >> 15
    return x


@triton.jit
def random_key(seed, step):
    """Of one step."""
    return _mix_bits(_mix_bits(seed.to(tl.uint32)) + step.to(tl.uint32))


@triton.jit
def _random_bits(key, offsets, x):
    bits = (offsets.to(tl.uint32) + key) ^ x.to(tl.uint32, bitcast=True)
    bits ^= bits >> 16
    return bits * 0x21F0AAAD


# --- parameters -------------------------------------------------------------------------------------------


@triton.jit
def load_param(param, remainders, offsets, mask, MASTER: tl.constexpr, OPMATH: tl.constexpr):
    """The parameter, with its remainder: `join` of csrc/core/dtype.h for "split", the sum for "kahan"."""
    high = tl.load(param + offsets, mask=mask)
    if MASTER == "split":
        low = tl.load(remainders + offsets, mask=mask).to(tl.uint32)
        bits = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low
        rounded_up = tl.where((bits & 0x7FFF0000) != 0, (low >> 15) << 16, 0)
        p = (bits - rounded_up).to(tl.float32, bitcast=True)
    else:
        p = high.to(OPMATH)
        if MASTER == "kahan":
            p += tl.load(remainders + offsets, mask=mask).to(OPMATH)
    return p


@triton.jit
def store_param(param, remainders, offsets, p, mask, key, begin, MASTER: tl.constexpr):
    """Stores the parameter rounded: `split`, `store_compensated` and `store_stochastic` of csrc/."""
    if MASTER == "split":
        bits = p.to(tl.uint32, bitcast=True)
        bits = tl.where(p != p, tl.full(bits.shape, 0x7FC00000, tl.uint32), bits)
        high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(remainders + offsets, (bits & 0xFFFF).to(tl.uint16), mask=mask)
    elif MASTER == "stochastic":
        # The moments have the other half of the keys.
        rounding = _mix_bits(_random_bits(key ^ 0xFFFFFFFF, begin + offsets, p)) >> 16
        rounded = (p.to(tl.uint32, bitcast=True) + rounding) >> 16
        rounded = tl.where(p != p, tl.full(rounded.shape, 0x7FC0, tl.uint32), rounded)
        high = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        high = p.to(param.dtype.element_ty)
        if MASTER == "kahan":
            rest = p - high.to(tl.float32)
            rest = tl.where(rest - rest == 0, rest, 0.0)  # what is rounded to infinity leaves nothing
            tl.store(remainders + offsets, rest.to(param.dtype.element_ty), mask=mask)
    tl.store(param + offsets, high, mask=mask)


# --- moments ----------------------------------------------------------------------------------------------


@triton.jit
def load_scales(scales, second, block, mask, STATE: tl.constexpr):
    if STATE == tl.uint8:
        m_scale, v_scale = tl.load(scales + block, mask=mask), tl.load(scales + (second + block), mask=mask)
    else:  # nobody reads them, but None cannot be returned in a tuple before Triton 3.7
        m_scale, v_scale = 0.0, 0.0
    return m_scale, v_scale


@triton.jit
def load_moments(exp_avg, exp_avg_sq, offsets, mask, m_scale, v_scale, OPMATH: tl.constexpr):
    m, v = tl.load(exp_avg + offsets, mask=mask), tl.load(exp_avg_sq + offsets, mask=mask)
    return moments_as_stored(m, v, m_scale, v_scale, OPMATH)


@triton.jit
def moments_as_stored(m, v, m_scale, v_scale, OPMATH: tl.constexpr):
    """The numbers that elements of the moments' tensors stand for."""
    if m.dtype == tl.uint8:
        code = m.to(tl.uint32)
        magnitude = _dequantize_magnitude(code & 0x7F, m_scale, 7).to(tl.uint32, bitcast=True)
        m = (magnitude ^ ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        v = _dequantize_magnitude(v.to(tl.uint32), v_scale, 8)
    return m.to(OPMATH), v.to(OPMATH)


@triton.jit
def magnitude_bits(x, mask):
    """Of what a block's largest magnitude is the maximum, by bits: NaN is greater than infinity."""
    bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    if mask is not None:
        bits = tl.where(mask, bits, 0)
    return bits


@triton.jit
def _first(BITS: tl.constexpr):
    """f(0) of csrc/math/quantized.h."""
    return 2.0**-15 if BITS == 7 else 2.0**-31


@triton.jit
def quant_scale(bits, BITS: tl.constexpr):
    """(scale, inverse) of each row's block, from all of its magnitudes' bits or from their maxima."""
    largest_bits = tl.max(bits, axis=1, keep_dims=True)
    largest = largest_bits.to(tl.float32, bitcast=True)
    top = tl.full(largest.shape, 1.875, tl.float32) - _first(BITS)
    is_normal = (largest_bits >= 0x00800000) & (largest_bits < 0x7F800000)
    scale = tl.where(is_normal, tl.div_rn(largest, top), 0.0)
    scale = tl.where(largest_bits >= 0x7F800000, float("nan"), scale)
    inverse = tl.where(is_normal, tl.div_rn(top - 2.0**-20, largest), 0.0)
    return scale, inverse


@triton.jit
def quantize_first(m, inverse):
    m = tl.where(inverse > 0, m, 0.0)
    sign = (m.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (_quantize_magnitude(tl.abs(m), inverse, 0x80000, 7) | sign).to(tl.uint8)


@triton.jit
def quantize_second(v, inverse, offsets, key):
    v = tl.where(inverse > 0, v, 0.0)
    code = _quantize_magnitude(v, inverse, _random_bits(key, offsets, v) >> 12, 8)
    return tl.where((code == 0) & (v != 0), 1, code).to(tl.uint8)


@triton.jit
def _quantize_magnitude(x, inverse, rounding, BITS: tl.constexpr):
    BASE: tl.constexpr = 0x3FF00000 - (((1 << BITS) - 1) << 20)
    scaled = tl.fma(x, inverse + tl.zeros_like(x), tl.zeros_like(x) + _first(BITS))
    return (scaled.to(tl.uint32, bitcast=True) + rounding - BASE) >> 20


@triton.jit
def _dequantize_magnitude(code, scale, BITS: tl.constexpr):
    BASE: tl.constexpr = 0x3FF00000 - (((1 << BITS) - 1) << 20)
    return (((code << 20) + BASE).to(tl.float32, bitcast=True) - _first(BITS)) * scale
