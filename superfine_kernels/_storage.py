"""How parameters and moments are stored, in eager torch: the rules of csrc/core/dtype.h, random.h and quantized.h.

A 16-bit parameter may have a remainder beside it, which holds what rounding took away: the lower half of the float32
number whose upper half it is ("split", int16), or the difference in its own dtype ("Kahan"). Or it is rounded at
random. Moments may be 8-bit codes (uint8), of which blocks of 256 share a scale.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from superfine_kernels._library import opmath_dtype

BLOCK = 256  # elements that share a scale, in the order of memory

_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, Tensor)


# --- parameters: a remainder, or rounding at random ---------------------------------------------------


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of a parameter and its remainder, of either kind."""
    if low.dtype != torch.int16:
        return high.float() + low.float()
    low = low.to(torch.int32) & 0xFFFF
    rounded_up = torch.where(high == 0, 0, low >> 15 << 16)  # a zero that was put there since is one
    bits = (high.view(torch.int16).to(torch.int32) << 16 | low) - rounded_up
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 numbers as bfloat16 ones, rounded, and their lower 16 bits; the inverse of `join`."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


def split_off_rounding(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 numbers rounded to `dtype`, and what that took away, rounded to it (Kahan)."""
    high = x.to(dtype)
    rest = x - high.float()
    return high, torch.where(rest.isfinite(), rest, 0.0).to(dtype)


def round_at_random(x: Tensor, key: int) -> Tensor:
    """float32 as bfloat16: one of both neighbours, each as likely as makes x the expectation."""
    order = _memory_order(x)
    bits = order.contiguous().view(torch.int32).flatten().to(torch.int64) & _MASK
    random = _mix(_random_bits(key ^ _MASK, order)) >> 16
    rounded = ((bits + random) & _MASK) >> 16
    rounded = torch.where(order.isnan().flatten(), 0x7FC0, rounded)
    return _in_order_of(x, rounded.to(torch.int16).view(torch.bfloat16))


def random_key(seed: int, step: int) -> int:
    """Of one step."""
    return _mix((_mix(seed) + step) & _MASK)


def _mix(x: _Bits) -> _Bits:
    """Of an integer, or of each one in a tensor of int64."""
    x = (x ^ x >> 16) * 0x21F0AAAD & _MASK
    x = (x ^ x >> 15) * 0xD35A2D97 & _MASK
    return x ^ x >> 15


def _random_bits(key: int, x: Tensor) -> Tensor:
    """32 bits for each element of float32 numbers in the order of memory, as one dimension of int64."""
    bits = x.contiguous().view(torch.int32).flatten().to(torch.int64) & _MASK
    place = torch.arange(bits.numel(), device=x.device) & _MASK
    mixed = (place + key & _MASK) ^ bits
    return (mixed ^ mixed >> 16) * 0x21F0AAAD & _MASK


def _memory_order(x: Tensor) -> Tensor:
    """`x` with its dimensions in the order in which they lie in memory, outermost first."""
    return x.permute(sorted(range(x.dim()), key=lambda d: -int(x.stride()[d])))


def _in_order_of(like: Tensor, values: Tensor) -> Tensor:
    """`values`, one dimension in the order of memory, with the shape and strides of `like`."""
    out = torch.empty_like(like, dtype=values.dtype)
    _memory_order(out).copy_(values.view(_memory_order(like).shape))
    return out


# --- moments in 8 bits --------------------------------------------------------------------------------


def scales_shape(numel: int) -> tuple[int, int]:
    """Of the scales of both moments of a parameter."""
    return 2, -(-numel // BLOCK)


def quantize(exp_avg: Tensor, exp_avg_sq: Tensor, key: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of both moments and their scales.

    Args:
        exp_avg, exp_avg_sq: float32, of one shape and order in memory.
        key: of the step, by which second moments are rounded at random; None rounds to the nearest.

    Returns:
        uint8 like the first moment, uint8 like the second, float32 of `scales_shape`.
    """
    codes, scales = [], []
    for x, magnitude_bits in ((exp_avg, 7), (exp_avg_sq, 8)):
        order = _memory_order(x)
        flat = order.flatten()
        scale, inverse = _scales(flat, magnitude_bits)
        flat = torch.where(_spread(inverse, flat.numel()) > 0, flat, 0.0)
        rounding = torch.full_like(flat, 0x80000, dtype=torch.int64)
        if magnitude_bits == 8 and key is not None:
            rounding = _random_bits(key, order) >> 12
        exact = flat.abs().double() * _spread(inverse, flat.numel()).double() + _first(magnitude_bits)
        bits = exact.float().view(torch.int32).to(torch.int64) + rounding - _base(magnitude_bits)
        code = (bits >> 20).clamp(0, (1 << magnitude_bits) - 1)
        if magnitude_bits == 7:
            code |= torch.signbit(flat).to(torch.int64) << 7
        else:
            code = torch.where((code == 0) & (flat != 0), 1, code)
        codes.append(_in_order_of(x, code.to(torch.uint8)))
        scales.append(scale)
    return codes[0], codes[1], torch.stack(scales)


def dequantize(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 moments that 8-bit codes and their scales stand for."""
    numbers = []
    for codes, scale, magnitude_bits in ((exp_avg, scales[0], 7), (exp_avg_sq, scales[1], 8)):
        code = _memory_order(codes).flatten().to(torch.int32)
        magnitude = code & ((1 << magnitude_bits) - 1)
        value = ((magnitude << 20) + _base(magnitude_bits)).view(torch.float32) - _first(magnitude_bits)
        value = value * _spread(scale, code.numel())
        numbers.append(_in_order_of(codes, torch.where(code > magnitude, -value, value)))
    return numbers[0], numbers[1]


def _base(magnitude_bits: int) -> int:
    """The bits of the float f(0), from which every code's are counted; those of the greatest code are 1.875's."""
    return 0x3FF00000 - (((1 << magnitude_bits) - 1) << 20)


def _first(magnitude_bits: int) -> float:
    """f(0)."""
    return 2.0**-15 if magnitude_bits == 7 else 2.0**-31


def _scales(flat: Tensor, magnitude_bits: int) -> tuple[Tensor, Tensor]:
    """For each block its scale, and the factor that gives its largest magnitude the greatest code."""
    top = torch.tensor(1.875 - _first(magnitude_bits), device=flat.device)
    padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.view(torch.int32).amax(1).view(torch.float32)  # by bits: NaN is greater than infinity
    none = torch.zeros_like(largest)
    normal = (largest >= torch.finfo(torch.float32).tiny) & largest.isfinite()
    scale = torch.where(normal, largest / top, none)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return scale, torch.where(normal, (top - 2.0**-20) / largest, none)


def _spread(scale: Tensor, numel: int) -> Tensor:
    return scale.repeat_interleave(BLOCK)[:numel]


# --- all of a parameter -------------------------------------------------------------------------------


class Stored:
    """One parameter's tensors as real numbers in the type of computation; `save_...` write them back, rounded.

    Attributes:
        p, g, m, v: parameter, scaled gradient, moments.
        v_max: maximum of the second moments; None without amsgrad.
        distance: of the parameter from its anchor.
    """

    def __init__(self, lists: dict[str, Tensor], gradient_scale: float, random_key: int) -> None:
        real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in lists.items()}

        def wide(name: str) -> Tensor:
            return real[name].to(opmath_dtype(real[name].dtype))

        self._stored, self._key = real, random_key
        self.p = join(real["params"], real["remainders"]) if "remainders" in real else wide("params")
        self.g = wide("grads") * gradient_scale
        self._load_moments()
        self.v_max = wide("max_exp_avg_sqs") if "max_exp_avg_sqs" in real else None
        self.distance = self.p - wide("anchors") if "anchors" in real else self.p

    def _load_moments(self) -> None:
        m, v = self._stored["exp_avgs"], self._stored["exp_avg_sqs"]
        if m.dtype == torch.uint8:
            self.m, self.v = dequantize(m, v, self._stored["scales"])
        else:
            self.m, self.v = (t.to(opmath_dtype(t.dtype)) for t in (m, v))

    def save_moments(self, reload: bool = False) -> None:
        """With `reload`, m and v are then what was stored of them."""
        if self._stored["exp_avgs"].dtype == torch.uint8:
            codes = quantize(self.m, self.v, self._key)
            for name, value in zip(("exp_avgs", "exp_avg_sqs", "scales"), codes, strict=True):
                self._stored[name].copy_(value)
        else:
            self._stored["exp_avgs"].copy_(self.m)
            self._stored["exp_avg_sqs"].copy_(self.v)
        if self.v_max is not None:
            self._stored["max_exp_avg_sqs"].copy_(self.v_max)
        if reload:
            self._load_moments()
            self.m, self.v = self.m.to(self.p.dtype), self.v.to(self.p.dtype)

    def save_param(self, zero_grad: bool, stochastic_rounding: bool) -> None:
        param, remainder = self._stored["params"], self._stored.get("remainders")
        if remainder is not None:
            is_split = remainder.dtype == torch.int16
            high, low = split(self.p) if is_split else split_off_rounding(self.p, param.dtype)
            param.copy_(high)
            remainder.copy_(low)
        elif stochastic_rounding and param.dtype == torch.bfloat16:
            param.copy_(round_at_random(self.p, self._key))
        else:
            param.copy_(self.p)
        if zero_grad:
            self._stored["grads"].zero_()
