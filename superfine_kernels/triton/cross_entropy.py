"""Cross-entropy over logits in Triton, one program per row; the formula is in csrc/math/cross_entropy.h.

Maximum and sum of exponentials come from one pass (Milakov & Gimelshein 2018), and so do the sums of smoothing and of
probabilities, relative to the maximum so far; with `dlogits` a second one over the same row, by then in the L2 cache,
writes the gradient. Traffic per logit: one read, and one write of the gradient; with probabilities of all classes as
many reads of those.

A row without a target that counts gives zeros, whatever it holds; a target outside [0, classes) gives NaN and no
stray access. Results are float32, or float64 for float64 logits, one after the other as `RowResult` and `PartResult`
say.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803, N806 (constexpr values are written in capitals, as in Triton's own code)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import opmath_dtype, reject
from superfine_kernels._losses import PART_RESULTS, PART_STATISTICS, ROW_RESULTS, ROW_STATISTICS, Rows
from superfine_kernels.triton import on
from superfine_kernels.triton._losses import (
    Row,
    check_gradient,
    check_rows,
    load_logits,
    load_slots,
    load_targets,
    load_values,
    load_weights,
    option,
    real,
)

#: Classes per iteration, at most, and classes per warp: 8 a thread, two 16-byte loads in float32 and one in
#: bfloat16. With more of either the forward kernel spills registers (Triton 3.7: float64 on sm_90, bfloat16
#: on sm_120).
MAX_BLOCK = 2048
WARP_BLOCK = 256
#: Registers that a thread of a block of 8 warps may have.
MAX_REGISTERS = 255
#: Targets of a row per iteration, at most.
MAX_SLOTS = 64

#: exp of it is 0 in every type, so that what is multiplied with it may stay finite.
FAR = tl.constexpr(-1e4)


@triton.jit
def _finite_or_zero(maximum):
    return tl.where(maximum == -float("inf"), 0.0, maximum)  # -inf - -inf would be NaN


@triton.jit
def _reduce_row(row, limit, hard, per_class, STATISTICS: tl.constexpr):
    """Of the first `limit` classes, 0 or all: maximum M of y, sum e, sum v, sum v (y - M), sum e (y - M), argmax.

    e is exp(y - M); v is w for smoothing, to be multiplied. (y - M is y where M is -inf.)
    """
    VALUES: tl.constexpr = row.SMOOTH or row.TARGETS == "dense"
    LANES: tl.constexpr = row.BLOCK if VALUES else 1
    maximum = tl.full((), -float("inf"), row.OPMATH)
    total = tl.full((), 0.0, row.OPMATH)
    weighted = tl.full((), 0.0, row.OPMATH)
    best = tl.full((), 0, tl.int32)
    # Lanes are summed at the end only: in every block that would cost more than these registers.
    mass = tl.zeros((LANES,), row.OPMATH)
    dot = tl.zeros((LANES,), row.OPMATH)
    for start in range(0, limit, row.BLOCK):
        c = start + tl.arange(0, row.BLOCK)
        mask = c < row.vocab
        y, _ = load_logits(row, c, mask, -float("inf"))
        block_maximum = tl.max(y, 0)
        joint = tl.maximum(maximum, block_maximum)
        shift = _finite_or_zero(joint)
        fall = _finite_or_zero(maximum) - shift
        rescale = tl.exp(maximum - shift)
        e = tl.exp(y - shift)
        if STATISTICS:
            first = tl.min(tl.where(y == block_maximum, c, row.vocab), 0)
            best = tl.where(block_maximum > maximum, first, best)
            # Bounded where exp is 0: 0 * -inf would be NaN.
            weighted = (weighted + total * tl.maximum(fall, FAR)) * rescale
            weighted += tl.sum(e * tl.maximum(y - shift, FAR), 0)
        total = total * rescale + tl.sum(e, 0)
        if VALUES:
            v = load_values(row, c, mask, hard, per_class)
            dot += mass * fall
            dot += tl.where(mask, v * (y - shift), 0.0)
            mass += v
        maximum = joint
    return maximum, total, tl.sum(mass, 0), tl.sum(dot, 0), weighted, best


@triton.jit
def _add_targets(row, column, y_label, maximum, mass, dot, hard, per_class):
    """sum v and sum v (y - M) of the whole of v, from those of `_reduce_row`."""
    shift = _finite_or_zero(maximum)
    if row.SMOOTH:
        mass *= per_class
        dot *= per_class
    if row.TARGETS == "label":
        v = hard * load_weights(row, column, column >= 0)
        mass += v
        dot += tl.where(column >= 0, v * (y_label - shift), 0.0)
    elif row.TARGETS == "slots":
        for start in range(0, row.targets, row.SLOTS):
            columns, v = load_slots(row, start + tl.arange(0, row.SLOTS), hard)
            y, _ = load_logits(row, columns, columns >= 0, 0.0)
            mass += tl.sum(v, 0)
            dot += tl.sum(tl.where(columns >= 0, v * (y - shift), 0.0), 0)
    return mass, dot


@triton.jit
def _slot_gradients(row, out, limit, shift, softmax, hard, per_class, OTHERS: tl.constexpr):
    """dx of the class of every slot, before the rest of dx overwrites x. Slots of one class get the same."""
    for start in range(0, limit, row.SLOTS):
        k = start + tl.arange(0, row.SLOTS)
        columns, _ = load_slots(row, k, hard)
        here = columns >= 0
        v = tl.zeros((row.SLOTS,), row.OPMATH)
        for other in range(0, row.targets, OTHERS):
            other_columns, other_v = load_slots(row, other + tl.arange(0, OTHERS), hard)
            same = columns[:, None] == other_columns[None, :]
            v += tl.sum(tl.where(same, other_v[None, :], 0.0), 1)
        if row.SMOOTH:
            v += per_class * load_weights(row, columns, here)
        y, slope = load_logits(row, columns, here, 0.0)
        tl.store(out + k, (softmax * tl.exp(y - shift) - v) * slope, mask=here)


@triton.jit
def _write_gradient(
    row, dx, slot_gradients, column, counts, valid, shift, softmax, upstream, OTHERS: tl.constexpr
):
    """dx = [softmax * exp(y - shift) - upstream * v] dy/dx, or 0 or NaN throughout."""
    if row.TRANSFORM != "none":
        softmax *= row.scale
        upstream *= row.scale
    hard = upstream * (1.0 - row.smoothing)
    per_class = upstream * row.smoothing / row.classes.to(row.OPMATH)
    limit = tl.where(valid, row.targets, 0)
    if row.TARGETS == "slots":
        _slot_gradients(row, slot_gradients, limit, shift, softmax, hard, per_class, OTHERS)
        tl.debug_barrier()

    at_label = tl.full((), 0.0, row.OPMATH)
    if row.TARGETS == "label":
        at_label = hard * load_weights(row, column, column >= 0)
    constant = tl.where(counts, float("nan"), 0.0).to(row.OPMATH)
    for start in range(0, row.vocab, row.BLOCK):
        c = start + tl.arange(0, row.BLOCK)
        mask = c < row.vocab
        y, slope = load_logits(row, c, mask & valid, 0.0)
        value = softmax * tl.exp(y - shift)
        if row.TARGETS == "dense":
            value -= load_values(row, c, mask, hard, per_class)
        elif row.SMOOTH:
            value -= per_class * load_weights(row, c, mask)
        if row.TARGETS == "label":
            value = tl.where(c == column, value - at_label, value)
        if row.TRANSFORM == "softcap":
            value *= slope
        value = tl.where(valid, value, constant)
        tl.store(dx + c, value.to(dx.dtype.element_ty), mask=mask)

    if row.TARGETS == "slots":
        tl.debug_barrier()
        for start in range(0, limit, row.SLOTS):
            k = start + tl.arange(0, row.SLOTS)
            columns, _ = load_slots(row, k, hard)
            value = tl.load(slot_gradients + k, mask=columns >= 0, other=0.0)
            tl.store(dx + columns, value.to(dx.dtype.element_ty), mask=columns >= 0)


@triton.jit
def _forward_row(
    row, results, dlogits, upstream, slot_gradients,
    STATISTICS: tl.constexpr, PART: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    counts, known, column = load_targets(row)
    valid = counts & known
    y_label, _ = load_logits(row, column, column >= 0, 0.0)
    hard = 1.0 - row.smoothing
    per_class = row.smoothing / row.classes.to(row.OPMATH)
    maximum, total, mass, dot, weighted, best = _reduce_row(
        row, tl.where(valid, row.vocab, 0), hard, per_class, STATISTICS
    )
    mass, dot = _add_targets(row, column, y_label, maximum, mass, dot, hard, per_class)

    rows = tl.num_programs(0).to(tl.int64)
    constant = tl.where(counts, float("nan"), 0.0).to(row.OPMATH)
    if PART:
        tl.store(results, tl.where(valid, maximum, 0.0))
        tl.store(results + rows, tl.where(valid, total, 1.0))
        tl.store(results + 2 * rows, tl.where(valid, mass, constant))
        tl.store(results + 3 * rows, tl.where(valid, dot, constant))
        if STATISTICS:
            tl.store(results + 4 * rows, tl.where(valid, weighted, constant))
            tl.store(results + 5 * rows, tl.where(valid, y_label, constant))
            tl.store(results + 6 * rows, tl.where(valid, (row.first_class + best).to(row.OPMATH), constant))
    else:
        log_sum = tl.log(total)
        lse = maximum + log_sum
        z_lse = row.z_loss * lse
        tl.store(results, tl.where(valid, mass * log_sum - dot + z_lse * lse, constant))
        tl.store(results + rows, tl.where(valid, lse, constant))
        tl.store(results + 2 * rows, tl.where(valid, mass, constant))
        if STATISTICS:
            logprob = y_label - _finite_or_zero(maximum) - log_sum
            tl.store(results + 3 * rows, tl.where(valid, logprob, constant))
            tl.store(results + 4 * rows, tl.where(valid, log_sum - weighted / total, constant))
            tl.store(results + 5 * rows, tl.where(valid, (best == column).to(row.OPMATH), constant))
        if dlogits is not None:
            factor = tl.load(upstream)
            softmax = factor * (mass + 2.0 * z_lse) / total
            _write_gradient(
                row, dlogits, slot_gradients, column, counts, valid, maximum, softmax, factor, OTHERS
            )


@triton.jit
def _backward_row(row, sums, dlogits, upstream, slot_gradients, OTHERS: tl.constexpr):
    counts, known, column = load_targets(row)
    lse = tl.load(sums)
    mass = tl.load(sums + tl.num_programs(0))
    factor = tl.load(upstream)
    softmax = factor * (mass + 2.0 * row.z_loss * lse)
    _write_gradient(
        row, dlogits, slot_gradients, column, counts, counts & known, lse, softmax, factor, OTHERS
    )


# A kernel for each of their values would be the same but for its time to compile.
UNSPECIALIZED = [
    "targets", "classes", "target_stride", "scale_stride",
    "ignore_index", "smoothing", "softcap", "scale", "z_loss",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    input, target, probabilities, weight, vocab, targets, first_class, classes,
    row_stride, target_stride, probabilities_stride, ignore_index, smoothing, softcap, scale, z_loss,
    results, dlogits, dlogits_stride, upstream, scale_stride, slot_gradients,
    TARGETS: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, STATISTICS: tl.constexpr,
    PART: tl.constexpr, OPMATH: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    _forward_row(
        Row(
            input + i * row_stride,
            target if target is None else target + i * target_stride,
            probabilities if probabilities is None else probabilities + i * probabilities_stride,
            weight if weight is None else weight + first_class,
            vocab, targets, first_class, classes, ignore_index,
            real(smoothing, OPMATH), real(softcap, OPMATH), real(scale, OPMATH), real(z_loss, OPMATH),
            TARGETS, TRANSFORM, SMOOTH, OPMATH, BLOCK, SLOTS,
        ),
        results + i,
        dlogits if dlogits is None else dlogits + i * dlogits_stride,
        upstream if upstream is None else upstream + i * scale_stride,
        slot_gradients if slot_gradients is None else slot_gradients + i * targets,
        STATISTICS, PART, OTHERS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward(
    input, target, probabilities, weight, vocab, targets, first_class, classes,
    row_stride, target_stride, probabilities_stride, ignore_index, smoothing, softcap, scale, z_loss,
    sums, dlogits, dlogits_stride, upstream, scale_stride, slot_gradients,
    TARGETS: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
    OPMATH: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    _backward_row(
        Row(
            input + i * row_stride,
            target if target is None else target + i * target_stride,
            probabilities if probabilities is None else probabilities + i * probabilities_stride,
            weight if weight is None else weight + first_class,
            vocab, targets, first_class, classes, ignore_index,
            real(smoothing, OPMATH), real(softcap, OPMATH), real(scale, OPMATH), real(z_loss, OPMATH),
            TARGETS, TRANSFORM, SMOOTH, OPMATH, BLOCK, SLOTS,
        ),
        sums + i,
        dlogits + i * dlogits_stride,
        upstream + i * scale_stride,
        slot_gradients if slot_gradients is None else slot_gradients + i * targets,
        OTHERS,
    )  # fmt: skip


# --- on the host ------------------------------------------------------------------------------------------


def cross_entropy_forward(
    rows: Rows, *, statistics: bool = False, dlogits: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Loss, lse and mass of every row; with `dlogits` also the gradient, from the same launch.

    Args:
        rows: as `Rows` says; input `(rows, vocab)`, float32, bfloat16, float16 or float64, adjacent classes; all of
            them, so `first_class` is 0.
        statistics: also logprob, entropy, and 1 where the label is the first of the largest logits; one label a row.
        dlogits: where the gradient goes: like `input` with adjacent classes, or `input` itself.
        scale: factors of the gradient, on the device: one value, or one per row; of the dtype of the results.

    Returns:
        `(3 or 6, rows)`, float32 (float64 for float64 logits), in the order of `RowResult`.

    Raises:
        ValueError: a shape, dtype, stride, device or option that differs from these.
    """
    op = "cross_entropy_forward"
    _check(op, rows, statistics)
    if rows.classes not in (0, rows.input.shape[1]):
        reject(
            op,
            "classes",
            rows.classes,
            f"those of the input, {rows.input.shape[1]}: cross_entropy_part is for parts",
        )
    if dlogits is not None:
        check_gradient(op, rows.input, dlogits, scale)
    out = rows.new_results(ROW_STATISTICS if statistics else ROW_RESULTS)
    _launch(_forward, rows, out, dlogits, scale, STATISTICS=statistics, PART=False)
    return out


def cross_entropy_part(rows: Rows, *, statistics: bool = False, out: Tensor | None = None) -> Tensor:
    """What the classes of `rows.input`, a part of all, add to the loss of every row: `PartResult`.

    Arguments and errors as in `cross_entropy_forward`. Returns `out`, dense, `(4 or 7, rows)`; targets that lie
    elsewhere add nothing, rows that do not count have a maximum of 0, a sum of 1 and zeros, and those with a target
    outside of all classes a mass of NaN.
    """
    _check("cross_entropy_part", rows, statistics)
    out = rows.new_results(PART_STATISTICS if statistics else PART_RESULTS) if out is None else out
    _launch(_forward, rows, out, None, None, STATISTICS=statistics, PART=True)
    return out


def cross_entropy_backward(rows: Rows, sums: Tensor, scale: Tensor, dlogits: Tensor | None = None) -> Tensor:
    """The gradient of the logits, recomputed from `sums`: `scale` times dloss/dinput of each row.

    Arguments and errors as in `cross_entropy_forward`, but that the input may be a part; `sums`, `(2, rows)`, are lse
    and mass over all classes. Returns `dlogits`, by default a new dense tensor of the shape and dtype of `input`.
    """
    op, input = "cross_entropy_backward", rows.input
    _check(op, rows, statistics=False)
    if dlogits is None:
        dlogits = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    check_gradient(op, input, dlogits, scale)
    shape, dtype = (2, input.shape[0]), opmath_dtype(input.dtype)
    if sums.shape != shape or sums.dtype != dtype or sums.device != input.device:
        reject(op, "sums", sums, f"lse and mass of the forward pass, of shape {shape}")
    _launch(_backward, rows, sums.contiguous(), dlogits, scale)
    return dlogits


def _check(op: str, rows: Rows, statistics: bool) -> None:
    check_rows(op, rows)
    if statistics and _targets(rows)[0] != "label":
        reject(op, "statistics", statistics, "False but for one label a row, without probabilities")


def _targets(rows: Rows) -> tuple[str, int]:
    """TARGETS, as `Row` has it, and how many of them a row has."""
    if rows.target is None:
        return "dense", 0
    count = 1 if rows.target.dim() == 1 else rows.target.shape[1]
    return "label" if count == 1 and rows.probabilities is None else "slots", count


def _launch(
    kernel: Any, rows: Rows, sums: Tensor, dlogits: Tensor | None, scale: Tensor | None, **constants: Any
) -> None:
    """`sums` holds what is written of every row, or, for the gradient alone, what is read."""
    input, target, probabilities, options = rows.input, rows.target, rows.probabilities, rows.options
    count, vocab = input.shape
    if count == 0:
        return
    kind, targets = _targets(rows)
    block, warps = _block(vocab)
    slots = min(MAX_SLOTS, triton.next_power_of_2(max(1, targets)))
    # Of some of these kernels ptxas spills two registers to fit into 32, 48 or 64, unless it is given another limit.
    forward = kernel is _forward and (options.softcap > 0 or options.label_smoothing > 0)
    spilling = forward or (kind == "slots" and sums.dtype == torch.float64)
    limit = {"maxnreg": MAX_REGISTERS} if spilling and torch.version.hip is None else {}
    slot_gradients = None
    if kind == "slots" and dlogits is not None:
        slot_gradients = torch.empty(count * targets, dtype=sums.dtype, device=input.device)
    with on(input.device):
        kernel[(count,)](
            input, target, probabilities, rows.weight, vocab, targets, rows.first_class, rows.classes or vocab,
            input.stride(0), 0 if target is None else target.stride(0),
            0 if probabilities is None else probabilities.stride(0), options.ignore_index,
            *(option(x, input) for x in (options.label_smoothing, options.softcap, options.scale, options.z_loss)),
            sums, dlogits, 0 if dlogits is None else dlogits.stride(0),
            scale, scale.stride(0) if scale is not None and scale.numel() > 1 else 0, slot_gradients,
            TARGETS=kind, TRANSFORM="softcap" if options.softcap else "scale" if options.scale != 1 else "none",
            SMOOTH=options.label_smoothing > 0 and kind != "dense", **constants,
            OPMATH=tl.float64 if sums.dtype == torch.float64 else tl.float32,
            # As many comparisons of slots at a time as a block has classes.
            BLOCK=block, SLOTS=slots, OTHERS=max(1, min(slots, block // slots)), num_warps=warps, **limit,
        )  # fmt: skip


def _block(vocab: int) -> tuple[int, int]:
    """Classes per iteration and warps for a vocabulary."""
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    return block, max(1, block // WARP_BLOCK)
