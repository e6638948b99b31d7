"""What Triton kernels of losses over classes share: how a program reads logits and targets of its row; checks."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import DTYPE_CODES, describe, opmath_dtype, reject
from superfine_kernels._losses import Rows

# --- in the kernels ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a program reads of its row, in the names of csrc/math/cross_entropy.h; capitals are constexpr.

    To be made in the call that takes it: assigned to a name, constexpr becomes a tensor.
    """

    x: Any  # logits, `vocab` of them: the classes from `first_class` on, of `classes`
    target: Any  # `targets` of them; None where the probabilities are of all classes
    probabilities: Any  # of the targets, or of all classes; may be None
    weight: Any  # of the classes of x; may be None
    vocab: Any
    targets: Any
    first_class: Any
    classes: Any
    ignore_index: Any
    smoothing: Any
    softcap: Any
    scale: Any
    z_loss: Any
    TARGETS: Any  # "label": one, without a probability; "slots": several, by index; "dense": of all classes
    TRANSFORM: Any  # of the logits: "none", "scale", or "softcap" and scale
    SMOOTH: Any
    OPMATH: Any
    BLOCK: Any
    SLOTS: Any


@triton.jit
def real(x, OPMATH: tl.constexpr):
    """What `option` made an option into."""
    if OPMATH == tl.float64:  # noqa: SIM300
        return x.to(tl.int64).to(tl.float64, bitcast=True)
    return tl.full((), x, OPMATH)


@triton.jit
def _tanh(u):
    """(tanh u, 1 - tanh^2 u) without cancellation: near 0 a polynomial (Cephes, Moshier), elsewhere by exp(-2|u|)."""
    size = tl.abs(u)
    e = tl.exp(-2.0 * size)
    inverse = 1.0 / (1.0 + e)
    far = 1.0 - 2.0 * e * inverse
    square = u * u
    if u.dtype == tl.float64:
        p = (
            -9.64399179425052238628e-1 * square - 9.92877231001918586564e1
        ) * square - 1.61468768441708447952e3
        q = (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
        near = u + u * (square * (p / (q * square + 4.84406305325125486048e3)))
    else:
        p = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
        p = (p * square + 1.33314422036e-1) * square - 3.33332819422e-1
        near = u + u * (square * p)
    tanh = tl.where(size < 0.625, near, tl.where(u < 0, -far, far))
    return tanh, 4.0 * e * inverse * inverse


@triton.jit
def load_logits(row, c, mask, PADDING: tl.constexpr):
    """Transformed logits y of columns c, PADDING outside of the mask; and dy/dx without its factor `scale`."""
    y = tl.load(row.x + c, mask=mask, other=PADDING).to(row.OPMATH)
    slope = tl.full(y.shape, 1.0, row.OPMATH)
    if row.TRANSFORM == "scale":
        y *= row.scale
    elif row.TRANSFORM == "softcap":
        tanh, slope = _tanh(y * (row.scale / row.softcap))
        y = tl.where(mask, tanh * row.softcap, PADDING)
    return y, slope


@triton.jit
def load_weights(row, c, mask):
    """w of columns c, 0 outside of the mask."""
    w = tl.where(mask, 1.0, 0.0).to(row.OPMATH)
    if row.weight is not None:
        w = tl.load(row.weight + c, mask=mask, other=0.0).to(row.OPMATH)
    return w


@triton.jit
def load_values(row, c, mask, hard, per_class):
    """v of columns c for probabilities of all classes, w otherwise; 0 outside of the mask."""
    values = load_weights(row, c, mask)
    if row.TARGETS == "dense":
        q = tl.load(row.probabilities + row.first_class + c, mask=mask, other=0.0).to(row.OPMATH)
        values *= hard * q + per_class
    return values


@triton.jit
def load_targets(row):
    """Whether a row counts, whether its targets are classes, and the column of its label (-1: none here)."""
    counts = tl.full((), True, tl.int1)
    known = tl.full((), True, tl.int1)
    column = tl.full((), -1, tl.int32)
    if row.TARGETS == "label":
        t = tl.load(row.target).to(tl.int64)
        counts = t != row.ignore_index
        known = (t >= 0) & (t < row.classes)
        here = counts & known & (t >= row.first_class) & (t < row.first_class + row.vocab)
        column = tl.where(here, t - row.first_class, -1).to(tl.int32)
    elif row.TARGETS == "slots":
        counting = tl.full((), 0, tl.int32)
        unknown = tl.full((), 0, tl.int32)
        for start in range(0, row.targets, row.SLOTS):
            k = start + tl.arange(0, row.SLOTS)
            t = tl.load(row.target + k, mask=k < row.targets, other=0).to(tl.int64)
            slot = (k < row.targets) & (t != row.ignore_index)
            counting = tl.maximum(counting, tl.max(slot.to(tl.int32), 0))
            unknown = tl.maximum(unknown, tl.max((slot & ((t < 0) | (t >= row.classes))).to(tl.int32), 0))
        counts = counting > 0
        known = unknown == 0
    return counts, known, column


@triton.jit
def load_slots(row, k, hard):
    """Of slots k: the column of each class, -1 where it has none here, and what the slot adds to its v."""
    mask = k < row.targets
    t = tl.load(row.target + k, mask=mask, other=0).to(tl.int64)
    column = t - row.first_class
    here = (
        mask & (t != row.ignore_index) & (t >= 0) & (t < row.classes) & (column >= 0) & (column < row.vocab)
    )
    column = tl.where(here, column, -1).to(tl.int32)
    value = hard * load_weights(row, column, here)
    if row.probabilities is not None:
        value *= tl.load(row.probabilities + k, mask=here, other=0.0).to(row.OPMATH)
    return column, value


# --- on the host ------------------------------------------------------------------------------------------


def option(x: float, input: Tensor) -> float | int:
    """An option for a kernel: Triton passes a float as float32, so for float64 logits it travels as its bits."""
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits if opmath_dtype(input.dtype).itemsize == 8 else float(x)


def check_rows(op: str, rows: Rows) -> None:
    """Raises ValueError for what a kernel could not read, or would read wrongly."""
    input, target, probabilities, weight, options = (
        rows.input, rows.target, rows.probabilities, rows.weight, rows.options
    )  # fmt: skip
    if input.dim() != 2 or input.dtype not in DTYPE_CODES or not 1 <= input.shape[1] <= 2**30:
        reject(op, "input", input, "floating-point logits of shape (rows, vocab), vocab from 1 to 2^30")
    count, vocab = input.shape
    device, opmath = input.device, opmath_dtype(input.dtype)
    real = str(opmath).removeprefix("torch.")
    classes = rows.classes or vocab
    _check_adjacent(op, "input", input)
    if not 0 <= rows.first_class <= classes - vocab:
        reject(op, "first_class", rows.first_class, f"0 to {classes - vocab}: {vocab} classes of {classes}")
    if target is not None:
        fits = target.dim() in (1, 2) and len(target) == count and target.device == device
        if not (fits and str(target.dtype) in ("torch.int32", "torch.int64")):
            reject(op, "target", target, f"int64 or int32 ({count},) or ({count}, targets) on {device}")
        if target.dim() == 2:
            _check_adjacent(op, "target", target)
    if target is None or probabilities is not None:
        shape = (count, classes) if target is None else tuple(target.shape)
        expected = f"{real} {shape} on {device}" + (" where target is None" if target is None else "")
        if probabilities is None:
            reject(op, "probabilities", None, expected)
        fits = probabilities.shape == shape and probabilities.dim() == 2 and probabilities.dtype == opmath
        if not (fits and probabilities.device == device):
            reject(op, "probabilities", probabilities, expected)
        _check_adjacent(op, "probabilities", probabilities)
    if weight is not None:
        fits = weight.shape == (classes,) and weight.dtype == opmath and weight.device == device
        if not (fits and weight.is_contiguous()):
            reject(op, "weight", weight, f"dense {real} ({classes},) on {device}")
    for name, good, expected in (
        ("label_smoothing", 0 <= options.label_smoothing <= 1, "a number in [0, 1]"),
        ("z_loss", options.z_loss >= 0, "a number, 0 or above"),
        ("softcap", options.softcap >= 0, "a number above 0, or 0 for none"),
        ("scale", options.scale > 0, "a number above 0"),
    ):
        if not good:
            reject(op, name, getattr(options, name), expected)


def check_gradient(op: str, input: Tensor, dlogits: Tensor, scale: Tensor | None) -> None:
    """Raises ValueError for a gradient that does not fit the logits, or factors that do not."""
    rows, opmath = input.shape[0], opmath_dtype(input.dtype)
    if dlogits.shape != input.shape or dlogits.dtype != input.dtype or dlogits.device != input.device:
        reject(op, "dlogits", dlogits, f"a tensor like input: {describe(input)}")
    _check_adjacent(op, "dlogits", dlogits)
    fits = scale is not None and scale.shape in ((), (1,), (rows,))
    if scale is None or not (fits and scale.dtype == opmath and scale.device == input.device):
        real = str(opmath).removeprefix("torch.")
        reject(op, "scale", scale, f"{real}, one value or ({rows},), on {input.device}")


def _check_adjacent(op: str, name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        reject(op, f"{name}.stride()", tensor.stride(), "adjacent columns: stride(1) equal to 1")
