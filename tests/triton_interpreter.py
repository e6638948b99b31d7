"""Makes Triton's interpreter fit for tests (it runs kernels in numpy when TRITON_INTERPRET=1).

Repairs, applied once by `install()` before a kernel is called:

- a one-element tensor serves as a loop bound with numpy 2.4 and later;
- float32 -> bfloat16 rounds to nearest even (the interpreter truncates);
- fma rounds once (the interpreter multiplies, rounds, and adds);
- arithmetic on bfloat16 and float16 is refused: the interpreter would compute on bfloat16's bit patterns, and
  a kernel of ours converts to float32 right after the load;
- a comparison of scalars stays boolean where it is spread over a block (as a mask, Triton 3.9 takes nothing else);
- numpy warns of no overflow or invalid operation: a GPU does not either.

What it cannot show: races between threads, limits of shared memory, approximate instructions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

#: Read when a kernel is decorated, so it must be set before the process imports one.
ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_to_odd(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """`a + b`, of whose float64 neighbours the odd one where it is neither: rounded again, it is as if rounded once.

    (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums"; the error of a sum is Knuth's.)
    """
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = (np.ascontiguousarray(total).view(np.int64) & 1 == 0).reshape(total.shape)
    return np.where(
        (error != 0) & np.isfinite(error) & even, np.nextafter(total, np.copysign(np.inf, error)), total
    )


def rest_of_sum(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """What rounding took from a + b (Knuth)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def rest_of_product(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    """What rounding took from a * b (Dekker 1971), by halves of 26 bits."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = x * 134_217_729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


@functools.cache
def install() -> None:
    """Applies the repairs to the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor: Any, *scope: Any) -> None:  # Triton 3.5 has no scope
        patch_tensor(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    convert_float = interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(values)
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(values)
        return convert_float(values, source, target, rounding_mode)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        a, b, addend = (t.data.astype(np.float64) for t in (x, y, z))
        product = a * b
        total = product + addend
        if z.data.dtype == np.float32:  # whose products are exact in float64
            total = round_to_odd(product, addend, total)
        else:
            exact = total + (rest_of_product(a, b, product) + rest_of_sum(product, addend, total))
            total = np.where(np.isfinite(exact), exact, total)
        return handle(total.astype(z.data.dtype), z.dtype.scalar)

    create_splat = builder.create_splat

    def splat(self: Any, block_type: Any, scalar: Any) -> Any:
        is_boolean = scalar.data.dtype == np.bool_  # of whatever type its operands were
        return create_splat(self, block_type, handle(scalar.data, tl.int1) if is_boolean else scalar)

    def refuse_low_precision(operation: Callable) -> Callable:
        def checked(self: Any, *args: Any) -> Any:
            low = {t.dtype.scalar for t in args if isinstance(t, handle)} & {tl.bfloat16, tl.float16}
            if low:
                raise TypeError(f"arithmetic on {low.pop()}; expected a conversion to float32 after the load")
            return operation(self, *args)

        return checked

    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter._convert_float = convert
    builder.create_splat = splat
    builder.create_fma = refuse_low_precision(fma)
    builder.binary_op = refuse_low_precision(builder.binary_op)
    builder.unary_op = refuse_low_precision(builder.unary_op)
    np.seterr(all="ignore")
