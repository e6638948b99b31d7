"""Cross-entropy over logits in Triton, one program per row.

For logits x, label t, class weights w (1 without) and label smoothing s over C classes:

    lse     = log sum_c exp(x_c)
    loss    = (1 - s) w_t (lse - x_t) + s/C sum_c w_c (lse - x_c)
    dx_c    = [(1 - s) w_t + s/C sum_c w_c] exp(x_c - lse) - (1 - s) w_t [c = t] - s/C w_c

Maximum and sum of exponentials come from one pass (Milakov & Gimelshein 2018); with `dlogits` a second one
over the same row, by then in the L2 cache, writes the gradient. Traffic per logit: one read, and one write of
the gradient.

A label equal to `ignore_index` gives loss 0 and gradient 0, whatever its row holds; one outside [0, C) gives
NaN and no stray access. Losses and lse are float32, or float64 for float64 logits.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803, N806 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import DTYPE_CODES, describe, opmath_dtype, reject

#: Classes per iteration, at most, and classes per warp: 8 a thread, two 16-byte loads in float32 and one in
#: bfloat16. With more of either the forward kernel spills registers (Triton 3.7: float64 on sm_90, bfloat16
#: on sm_120).
MAX_BLOCK = 2048
WARP_BLOCK = 256


@triton.jit
def _weight_of(weight, c, mask, OPMATH: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    w = tl.where(mask, 1.0, 0.0).to(OPMATH)
    if HAS_WEIGHT:
        w = tl.load(weight + c, mask=mask, other=0.0).to(OPMATH)
    return w


@triton.jit
def _write_gradient(
    x, dx, weight, vocab, t, ignored, valid, shift, softmax, smooth, at_target,
    OPMATH: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_c = softmax * exp(x_c - shift) - smooth * w_c - [c = t] * at_target, or 0 or NaN throughout."""
    constant = tl.where(ignored, 0.0, float("nan")).to(OPMATH)
    for start in range(0, vocab, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < vocab
        logits = tl.load(x + c, mask=mask & valid, other=0.0).to(OPMATH)
        value = softmax * tl.exp(logits - shift)
        if SMOOTH:
            value -= smooth * _weight_of(weight, c, mask, OPMATH, HAS_WEIGHT)
        value = tl.where(c == t, value - at_target, value)
        value = tl.where(valid, value, constant)
        tl.store(dx + c, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    input, target, weight, losses, lses, dlogits, scale,
    vocab, row_stride, target_stride, scale_stride, dlogits_stride, ignore_index,
    LABEL_SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr, WRITE: tl.constexpr, OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    SMOOTH: tl.constexpr = LABEL_SMOOTHING > 0
    infinity: tl.constexpr = float("inf")
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row * target_stride).to(tl.int64)
    ignored = t == ignore_index
    valid = (t != ignore_index) & (t >= 0) & (t < vocab)
    x = input + row * row_stride
    x_t = tl.load(x + t, mask=valid, other=0.0).to(OPMATH)
    # Sums for smoothing start from the target's logit: small terms, whatever the offset of the row.
    reference = tl.where(tl.abs(x_t) < infinity, x_t, 0.0)

    maximum = tl.full((), -infinity, OPMATH)
    total = tl.full((), 0.0, OPMATH)  # sum of exp(x - maximum)
    weights = tl.full((), 0.0, OPMATH)
    weighted = tl.full((), 0.0, OPMATH)  # sum of w (x - reference)
    for start in range(0, tl.where(valid, vocab, 0), BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < vocab
        logits = tl.load(x + c, mask=mask, other=-infinity).to(OPMATH)
        joint = tl.maximum(maximum, tl.max(logits, 0))
        shift = tl.where(joint == -infinity, 0.0, joint)  # -inf - -inf would be NaN
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift), 0)
        maximum = joint
        if SMOOTH:
            w = _weight_of(weight, c, mask, OPMATH, HAS_WEIGHT)
            weights += tl.sum(w, 0)
            weighted += tl.sum(tl.where(mask, w * (logits - reference), 0.0), 0)

    w_t = _weight_of(weight, t, valid, OPMATH, HAS_WEIGHT)  # here, as the loop has no register to spare
    log_total = tl.log(total)
    smoothing = tl.full((), LABEL_SMOOTHING, OPMATH)
    hard = (1.0 - smoothing) * w_t
    per_class = smoothing / tl.full((), vocab, OPMATH)
    loss = hard * (log_total - (x_t - maximum))
    if SMOOTH:
        loss += per_class * (weights * (log_total - (reference - maximum)) - weighted)
    constant = tl.where(ignored, 0.0, float("nan")).to(OPMATH)
    tl.store(losses + row, tl.where(valid, loss, constant))
    tl.store(lses + row, tl.where(valid, maximum + log_total, constant))

    if WRITE:
        upstream = tl.load(scale + row * scale_stride).to(OPMATH)
        softmax = upstream * (hard + per_class * weights) / total
        _write_gradient(
            x, dlogits + row * dlogits_stride, weight, vocab, t, ignored, valid,
            maximum, softmax, upstream * per_class, upstream * hard, OPMATH, HAS_WEIGHT, SMOOTH, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward(
    input, target, weight, lses, dlogits, scale,
    vocab, row_stride, target_stride, scale_stride, dlogits_stride, ignore_index,
    LABEL_SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr, OPMATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SMOOTH: tl.constexpr = LABEL_SMOOTHING > 0
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row * target_stride).to(tl.int64)
    ignored = t == ignore_index
    valid = (t != ignore_index) & (t >= 0) & (t < vocab)
    w_t = _weight_of(weight, t, valid, OPMATH, HAS_WEIGHT)
    weights = tl.full((), 0.0, OPMATH)
    if SMOOTH:
        for start in range(0, tl.where(valid, vocab, 0), BLOCK):
            c = start + tl.arange(0, BLOCK)
            weights += tl.sum(_weight_of(weight, c, c < vocab, OPMATH, HAS_WEIGHT), 0)
    smoothing = tl.full((), LABEL_SMOOTHING, OPMATH)
    hard = (1.0 - smoothing) * w_t
    per_class = smoothing / tl.full((), vocab, OPMATH)
    upstream = tl.load(scale + row * scale_stride).to(OPMATH)
    _write_gradient(
        input + row * row_stride, dlogits + row * dlogits_stride, weight, vocab, t, ignored, valid,
        tl.load(lses + row), upstream * (hard + per_class * weights), upstream * per_class, upstream * hard,
        OPMATH, HAS_WEIGHT, SMOOTH, BLOCK,
    )  # fmt: skip


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dlogits: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses and lse of every row; with `dlogits` also the gradient, from the same launch.

    Args:
        input: logits, `(rows, vocab)`, float32, bfloat16, float16 or float64; classes adjacent.
        target: labels, `(rows,)`, int32 or int64, any stride.
        weight: one value per class, dense, float32 (float64 for float64 logits), or None.
        ignore_index, label_smoothing: as in `torch.nn.functional.cross_entropy`.
        dlogits: where the gradient goes: dense like `input`, or `input` itself.
        scale: factors of the gradient, on the device: one value, or one per row; of the dtype of the losses.

    Returns:
        losses and lse, `(rows,)`, float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape, dtype, stride or device that differs from these.
    """
    _check("cross_entropy_forward", input, target, weight, label_smoothing, dlogits, scale)
    rows, vocab = input.shape
    losses = torch.empty(rows, dtype=opmath_dtype(input.dtype), device=input.device)
    lse = torch.empty_like(losses)
    if rows > 0:
        block, warps = _block(vocab)
        with _on(input.device):
            _forward[(rows,)](
                input, target, weight, losses, lse, dlogits, scale,
                vocab, input.stride(0), target.stride(0), _scale_stride(scale),
                0 if dlogits is None else dlogits.stride(0), ignore_index,
                LABEL_SMOOTHING=float(label_smoothing), HAS_WEIGHT=weight is not None,
                WRITE=dlogits is not None, OPMATH=_opmath(input), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses, lse


def cross_entropy_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse: Tensor,
    scale: Tensor,
    dlogits: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, recomputed from `lse`: `scale` times dloss/dinput of each row.

    Arguments and errors as in `cross_entropy_forward`; `lse` is its result. Returns `dlogits`, by default a
    new dense tensor of the shape and dtype of `input`.
    """
    if dlogits is None:
        dlogits = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _check("cross_entropy_backward", input, target, weight, label_smoothing, dlogits, scale)
    rows, vocab = input.shape
    if lse.shape != (rows,) or lse.dtype != opmath_dtype(input.dtype) or lse.device != input.device:
        reject("cross_entropy_backward", "lse", lse, f"the lse of the forward pass, of shape ({rows},)")
    if rows > 0:
        block, warps = _block(vocab)
        with _on(input.device):
            _backward[(rows,)](
                input, target, weight, lse.contiguous(), dlogits, scale,
                vocab, input.stride(0), target.stride(0), _scale_stride(scale), dlogits.stride(0),
                ignore_index, LABEL_SMOOTHING=float(label_smoothing), HAS_WEIGHT=weight is not None,
                OPMATH=_opmath(input), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return dlogits


def _block(vocab: int) -> tuple[int, int]:
    """Classes per iteration and warps for a vocabulary."""
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    return block, max(1, block // WARP_BLOCK)


def _opmath(input: Tensor) -> tl.dtype:
    return tl.float64 if input.dtype == torch.float64 else tl.float32


def _scale_stride(scale: Tensor | None) -> int:
    return scale.stride(0) if scale is not None and scale.numel() > 1 else 0


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the interpreter on none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    dlogits: Tensor | None,
    scale: Tensor | None,
) -> None:
    if input.dim() != 2 or input.dtype not in DTYPE_CODES or not 1 <= input.shape[1] <= 2**30:
        reject(op, "input", input, "floating-point logits of shape (rows, vocab), vocab from 1 to 2^30")
    rows, vocab = input.shape
    device, opmath = input.device, opmath_dtype(input.dtype)
    name = str(opmath).removeprefix("torch.")
    if input.stride(1) != 1 and vocab > 1:
        reject(op, "input.stride()", input.stride(), "adjacent classes: stride(1) equal to 1")
    if target.shape != (rows,) or target.dtype not in (torch.int32, torch.int64) or target.device != device:
        reject(op, "target", target, f"int64 or int32 ({rows},) on {device}")
    if not 0 <= label_smoothing <= 1:
        reject(op, "label_smoothing", label_smoothing, "a number in [0, 1]")
    if weight is not None:
        fits = weight.shape == (vocab,) and weight.dtype == opmath and weight.device == device
        if not (fits and weight.is_contiguous()):
            reject(op, "weight", weight, f"dense {name} ({vocab},) on {device}")
    if dlogits is None:
        return
    if dlogits.shape != input.shape or dlogits.dtype != input.dtype or dlogits.device != device:
        reject(op, "dlogits", dlogits, f"a tensor like input: {describe(input)}")
    if vocab > 1 and dlogits.stride(1) != 1:
        reject(op, "dlogits.stride()", dlogits.stride(), "adjacent classes: stride(1) equal to 1")
    fits = scale is not None and scale.shape in ((), (1,), (rows,))
    if scale is None or not (fits and scale.dtype == opmath and scale.device == device):
        reject(op, "scale", scale, f"{name}, one value or ({rows},), on {device}")
