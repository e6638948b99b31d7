"""Linear layer and cross-entropy in one op, without the logits: they exist a tile of classes at a time.

    x_c = input . linear_weight_c + linear_bias_c,   loss as in cross_entropy.py

The classes are cut into tiles. Forward multiplies the input with one tile of the weight after the other, keeps a few
numbers a row of each (PartResult of csrc/math/cross_entropy.h) and forgets the logits. Backward makes a
tile's logits again, turns them into their gradient in place, and multiplies: all rows at once, so that a weight's
gradient is one product, summed in float32 by the GEMM and rounded once, whatever the tiles. Only the products that
something trainable needs are made. On the CPU rows with an ignored label are taken out first. Logits that are one
tile are kept instead.

A head that trains in part costs what its part does. Of a LoRA head (Hu et al. 2021) the op sees input . a^T, one
product with b^T in every tile, and no gradient of the size of the weight. Rows that train have their logits' columns
replaced.

Memory beside inputs and gradients: one tile of logits, and for 16-bit inputs the float32 sum of the input's gradient;
of a bfloat16 one on a CPU the lower halves alone, as the upper ones lie where the result will be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends
from superfine_kernels._class_tiles import TRAINABLE, Problem, checked_tile_bytes, join, row_results, spread
from superfine_kernels._class_tiles import gradients as tile_gradients
from superfine_kernels._head import Head, parts_of
from superfine_kernels._library import (
    LIBRARY,
    Cost,
    in_functional_transform,
    is_plain,
    no_second_derivative,
    opmath_dtype,
    reject,
    warn_once,
)
from superfine_kernels._losses import (
    MEAN,
    NONE,
    OPTIONS_SCHEMA,
    REDUCTIONS,
    ROW_RESULTS,
    ROW_STATISTICS,
    Options,
    as_softcap,
    check_labels,
    check_options,
    check_targets,
    flat_targets,
    reduced,
    reference_rows,
    reference_statistics,
    with_statistics,
    without_ignored,
)


def cost(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    input_grad: bool = True,
    weight_grad: bool = True,
) -> Cost:
    """Bytes and flops at least: a product for the logits and one for each gradient; inputs read, gradients written.

    This op makes the logits twice, which is the price of not keeping them.
    """
    products = 1 + input_grad + weight_grad
    moved = rows * features * (1 + input_grad) + classes * features * (1 + weight_grad)
    return Cost(bytes=moved * dtype.itemsize, flops=2 * rows * features * classes * products)


def reference(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Eager torch, by way of all logits."""
    return linear_cross_entropy(input, linear_weight, target, **options, backend="reference")


def _reference_logits(p: Problem) -> Tensor:
    input = without_ignored(p.input, p.target, p.options.ignore_index)
    logits = torch.nn.functional.linear(input, p.linear_weight)
    if p.low_rank_input is not None and p.low_rank_weight is not None:
        logits = logits + p.low_rank_input @ p.low_rank_weight.t()
    if p.columns is not None and p.column_classes is not None:
        logits = logits.index_copy(1, p.column_classes.to(logits.device), p.columns)
    if p.linear_bias is not None:
        logits = logits + p.linear_bias
    return logits.to(opmath_dtype(logits.dtype))


# --- ops and autograd -------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? low_rank_input, Tensor? low_rank_weight, "
    "Tensor? columns, Tensor? column_classes, Tensor? target, Tensor? probabilities, Tensor? weight"
)
_SETTINGS = f"{OPTIONS_SCHEMA}, int tile_bytes, float skip_mass, str backend"
LIBRARY.define(
    f"linear_cross_entropy({_TENSORS}, {_SETTINGS}, int reduction, bool statistics, bool keep, "
    "Tensor? accumulate_into) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"linear_cross_entropy_backward({_TENSORS}, {_SETTINGS}, Tensor sums, Tensor upstream, Tensor needed, "
    "Tensor kept, bool[] wants, Tensor(a!)? accumulate_into) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_TENSOR_COUNT, _OPTION_COUNT = 10, len(Options._fields)
_FIELDS = _TENSOR_COUNT + _OPTION_COUNT + 3


def _problem(fields: Any) -> Problem:
    tensors, numbers = fields[:_TENSOR_COUNT], fields[_TENSOR_COUNT:_FIELDS]
    options, (tile_bytes, skip_mass, backend) = numbers[:_OPTION_COUNT], numbers[_OPTION_COUNT:]
    # What is skipped goes from forward to backward by tiles, whose number must not depend on the labels.
    whole_rows = tensors[0].shape[0] if skip_mass > 0 else 0
    arguments: Any = (*tensors, Options(*options), tile_bytes, skip_mass, backend, 0, 0, whole_rows)
    return Problem(*arguments)


@torch.library.impl(LIBRARY, "linear_cross_entropy", "CompositeExplicitAutograd")
def _op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, statistics, keep, _ = arguments[_FIELDS:]
    whole = _problem(arguments)
    if whole.target is not None and whole.target.device.type == "cpu":
        check_labels("linear_cross_entropy", whole.target, whole.classes, whole.options.ignore_index)
    p, rows = whole.without_ignored()
    parts, kept = p.parts(statistics, keep)
    results = row_results(join(parts), p.target, p.options)
    nothing = parts.new_empty(0, dtype=torch.bool)
    needed = p.needed(parts, results[1]) if p.skip_mass > 0 else nothing
    count = whole.input.shape[0]
    results = spread(results, rows, count, 1)
    needed = spread(needed, rows, count, 1) if p.skip_mass > 0 else needed
    kept = spread(kept, rows, count, 0) if keep else kept
    loss = results[0].clone() if reduction == NONE else results[0].sum()
    if reduction == MEAN:
        loss = loss / p.denominator(loss.dtype)
    return loss, results, needed, kept


@torch.library.impl(LIBRARY, "linear_cross_entropy", "Meta")
def _op_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, (reduction, statistics, keep, _) = _problem(arguments), arguments[_FIELDS:]
    count = p.input.shape[0]
    out = p.input.new_empty(
        (ROW_STATISTICS if statistics else ROW_RESULTS, count), dtype=opmath_dtype(p.input.dtype)
    )
    loss = out.new_empty((count,) if reduction == NONE else ())
    needed = (len(range(0, p.classes, p.step)), count) if p.skip_mass > 0 else (0,)
    kept = (count, p.classes) if keep else (0,)
    return loss, out, out.new_empty(needed, dtype=torch.bool), p.input.new_empty(kept)


@torch.library.impl(LIBRARY, "linear_cross_entropy_backward", "CompositeExplicitAutograd")
def _op_backward(*arguments: Any) -> tuple[Tensor, ...]:
    sums, scale, needed, kept, wants, accumulate_into = arguments[_FIELDS:]
    whole = _problem(arguments)
    p, rows = whole.without_ignored()
    if rows is not None:
        sums, scale = sums[:, rows], scale[rows] if scale.dim() else scale
        needed = needed[:, rows] if needed.numel() else needed
        kept = kept[rows] if kept.numel() else kept
    found = tile_gradients(
        p,
        sums,
        scale,
        needed if p.skip_mass > 0 else None,
        kept if kept.numel() else None,
        dict(zip(TRAINABLE, wants, strict=True)),
        accumulate_into,
    )
    for name in {"input", "low_rank_input", "columns"} & found.keys():
        found[name] = spread(found[name], rows, whole.input.shape[0], 0)
    nothing = sums.new_empty(0)
    return tuple(found.get(name, nothing) for name in TRAINABLE)


@torch.library.impl(LIBRARY, "linear_cross_entropy_backward", "Meta")
def _op_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    sums, _, _, _, wants, accumulate_into = arguments[_FIELDS:]
    p, found = _problem(arguments), []
    for name, wanted in zip(TRAINABLE, wants, strict=True):
        like = getattr(p, name)
        returned = (
            wanted and like is not None and not (name == "linear_weight" and accumulate_into is not None)
        )
        found.append(
            torch.empty(like.shape, dtype=like.dtype, device=like.device) if returned else sums.new_empty(0)
        )
    return tuple(found)


_NO_ACCUMULATION = "none beside accumulate_into, which eager torch does not serve"


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.settings = inputs[_TENSOR_COUNT:_FIELDS]
    ctx.reduction, _, _, into = inputs[_FIELDS:]
    ctx.accumulate_into = into  # not saved as the others are: backward writes it
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSOR_COUNT], *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, out, needed, kept = ctx.saved_tensors
    wants = ctx.needs_input_grad[: len(TRAINABLE)]
    rest: tuple[None, ...] = (None,) * (_FIELDS + 4 - len(TRAINABLE))
    if grad is None or not any(wants):
        return *(None,) * len(TRAINABLE), *rest
    p, scale = _problem((*tensors, *ctx.settings)), grad.to(out.dtype)
    if ctx.reduction == MEAN:
        scale = scale / p.denominator(out.dtype)
    trainable = [t for t in (*tensors[: len(TRAINABLE)], grad) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in trainable):
        if ctx.accumulate_into is not None:
            raise no_second_derivative("linear_cross_entropy", _NO_ACCUMULATION)
        warn_once("linear_cross_entropy: a second derivative is asked for; eager torch computes the gradient")
        losses = reference_rows(_reference_logits(p), p.target, p.probabilities, p.weight, p.options)[0]
        wanted = [t for t, want in zip(tensors, wants, strict=False) if want]
        scale = scale.expand_as(losses)
        second = iter(torch.autograd.grad(losses, wanted, scale, create_graph=True))
        return *(next(second) if want else None for want in wants), *rest
    with torch.autocast(grad.device.type, enabled=False):  # forward has cast what is to be cast
        found = torch.ops.superfine.linear_cross_entropy_backward(
            *tensors,
            *ctx.settings,
            out[1:ROW_RESULTS],
            scale.contiguous(),
            needed,
            kept,
            wants,
            ctx.accumulate_into,
        )
    has = [w and not (i == 1 and ctx.accumulate_into is not None) for i, w in enumerate(wants)]
    return *(g if h else None for g, h in zip(found, has, strict=True)), *rest


torch.library.register_autograd(
    "superfine::linear_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)


# --- public ---------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    probabilities: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    shift: bool = False,
    num_items: float | Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    accumulate_into: Tensor | None = None,
    tile_bytes: int | None = None,
    skip_mass: float = 0.0,
    return_stats: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of `input @ linear_weight.T + linear_bias`, as `torch.nn.functional.linear_cross_entropy`.

    Logits are never held but for a tile of classes. Under autocast the products are made in its dtype.

    Args:
        input: (features) or (..., features); float32, bfloat16, float16 or float64, any strides.
        linear_weight: (classes, features), of the input's dtype.
        target: classes, of the shape of `input` without its last dimension; int64 or int32. Or probabilities of all
            classes, (..., classes), or (..., K) classes beside `probabilities`.
        linear_bias: (classes), of the input's dtype.
        weight, ignore_index, reduction, label_smoothing, probabilities, z_loss, softcap, scale, shift, num_items,
            return_stats, check: as in `superfine_kernels.cross_entropy`.
        lora: `LoRA(a, b, scale)`: the head's weight is linear_weight + scale * b @ a, which is never formed.
        rows: `TrainableRows(indices, weight)`: the rows of linear_weight at `indices` count as those in `weight`,
            whose gradient has their number of rows; `lora` adds nothing to them. Indices on the CPU are not
            waited for.
        accumulate_into: (classes, features), of the weight's dtype or float32: backward adds the gradient of
            `linear_weight` there instead of returning it (hooks of the weight see None); several losses, or steps of
            accumulation, then need no buffer of their own. Each product is rounded to the inputs' dtype before it
            is added. A weight's `.grad` will do while it is zeroed in place: `zero_grad()` replaces it.
        tile_bytes: of the tile of logits; None for 256 MiB on a GPU, and on a CPU for 3 MiB, less 2 bytes for each
            element of a 16-bit input, whose gradient's sum needs them; at least 768 classes make a tile.
        skip_mass: backward leaves out tiles of a row, never those of its targets, whose classes have together at most
            this much of the probability; 0 leaves out nothing. The gradient of a row's logits then differs by at most
            skip_mass * |g| * scale in sum of absolute values, with g the upstream gradient of the row's loss times
            (sum_c v_c + 2 z lse), and that of its input by as much times the norm of the longest row of the weight.
            Waits for a GPU.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or the shape of `target` for "none"; with
        `return_stats` a pair, as `cross_entropy`. Gradients reach `input`, `linear_weight`, `linear_bias`, and the
        weights of `lora` and `rows`, where these require them; what does not costs nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also a label outside
            [0, classes), named with its position.
    """
    op, original = "linear_cross_entropy", linear_weight
    a, b, lora_scale = parts_of(op, "lora", lora, 3) or (None, None, 1.0)
    head = Head(input, linear_weight, linear_bias, a, b, *(parts_of(op, "rows", rows, 2) or (None, None)))
    head.check_tensors(op)
    head = head.autocast()
    head.check_shapes(op)
    input, linear_weight, linear_bias, a, b, index, row_weight = head
    tile_bytes = checked_tile_bytes(op, tile_bytes, input)
    ignore_index = -100 if ignore_index is None else ignore_index
    options = Options(
        ignore_index, float(label_smoothing), float(z_loss), as_softcap(op, softcap), float(scale)
    )
    classes, shape = linear_weight.shape[0], input.shape[:-1]
    if not isinstance(target, Tensor):
        reject(op, "target", target, "a torch.Tensor", TypeError)
    dense = (*shape, classes)
    check_targets(op, target, probabilities, shape, dense, shift=shift, return_stats=return_stats)
    if target.device != input.device:
        reject(op, "target", target, f"a tensor on {input.device}")
    check_options(op, classes, input.device, weight, reduction, options, num_items)
    if not math.isfinite(lora_scale):
        reject(op, "lora.scale", lora_scale, "a finite number")
    if not 0 <= skip_mass < 1:
        reject(op, "skip_mass", skip_mass, "a number in [0, 1)")
    if skip_mass > 0 and (label_smoothing > 0 or target.is_floating_point()):
        reject(
            op, "skip_mass", skip_mass, "0 where every class is wanted: with smoothing or all probabilities"
        )
    if accumulate_into is not None:
        _check_accumulation(accumulate_into, original)

    flat, dtype = input.reshape(-1, input.shape[-1]), opmath_dtype(input.dtype)
    labels, probabilities = flat_targets(target, probabilities, ignore_index, shift, dtype)
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    counting = without_ignored(flat, labels, ignore_index) if lora or rows else flat
    low_rank = None if a is None else torch.nn.functional.linear(counting, a) * lora_scale
    columns = None if row_weight is None else torch.nn.functional.linear(counting, row_weight)
    fields = (
        flat, linear_weight, linear_bias, low_rank, b, columns, None if index is None else index.cpu(),
        labels, probabilities, weight, *options, tile_bytes, float(skip_mass),
    )  # fmt: skip
    divisor = num_items.reshape(()) if isinstance(num_items, Tensor) else num_items
    code = REDUCTIONS["sum" if divisor is not None else reduction]
    eager = _without_kernel(input.device, probabilities, accumulate_into, backend)
    if labels is not None and (check or (eager and labels.device.type == "cpu" and is_plain([labels]))):
        check_labels(op, labels, classes, ignore_index)
    if eager:
        loss, stats = _by_reference(_problem((*fields, "")), code, return_stats)
    else:
        trains = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad
            for t in (flat, linear_weight, linear_bias, b, low_rank, columns)
        )
        keep = trains and _problem((*fields, "")).step >= classes
        loss, out, _, _ = torch.ops.superfine.linear_cross_entropy(
            *fields, backend or "", code, return_stats, keep, accumulate_into
        )
        stats = out[ROW_RESULTS:]
    if divisor is not None:
        loss = loss / divisor
    elif reduction == "none":
        loss = loss.reshape(shape)
    return with_statistics(loss, stats, shape, return_stats)


def _without_kernel(
    device: torch.device, probabilities: Tensor | None, accumulate_into: Tensor | None, backend: str | None
) -> bool:
    reason = None
    if in_functional_transform():
        reason = "torch.func and forward-mode AD have no kernel"
    elif probabilities is not None and probabilities.requires_grad and torch.is_grad_enabled():
        reason = "probabilities that require grad have no kernel"
    eager = reason is not None or backend == "reference" or _backends.only_reference(device)
    if reason is not None and accumulate_into is None:
        warn_once(f"linear_cross_entropy: {reason}; eager torch computes them")
    if eager and accumulate_into is not None:
        raise RuntimeError(
            f"linear_cross_entropy: {reason or 'the reference is asked for'}; expected {_NO_ACCUMULATION}"
        )
    return eager


def _by_reference(p: Problem, reduction: int, statistics: bool) -> tuple[Tensor, Any]:
    x = _reference_logits(p)
    losses, _ = reference_rows(x, p.target, p.probabilities, p.weight, p.options)
    stats: Any = ()
    if statistics and p.target is not None:
        stats = reference_statistics(x, p.target, p.options)
    return reduced(losses, reduction, p.target, p.probabilities, p.weight, p.options.ignore_index), stats


def _check_accumulation(accumulate_into: Any, linear_weight: Tensor) -> None:
    like = f"shape {tuple(linear_weight.shape)}, of the weight's dtype or float32, that requires no gradient"
    if not isinstance(accumulate_into, Tensor):
        reject("linear_cross_entropy", "accumulate_into", accumulate_into, "a torch.Tensor", TypeError)
    if is_plain((accumulate_into, linear_weight)) and accumulate_into.data_ptr() == linear_weight.data_ptr():
        reject("linear_cross_entropy", "accumulate_into", "memory of linear_weight", "memory of its own")
    if 0 in accumulate_into.stride():
        strides = f"a tensor with strides {accumulate_into.stride()}"
        reject("linear_cross_entropy", "accumulate_into", strides, "memory of its own for every element")
    fits = accumulate_into.shape == linear_weight.shape and accumulate_into.device == linear_weight.device
    fits = fits and accumulate_into.dtype in (linear_weight.dtype, torch.float32)
    if not fits or accumulate_into.requires_grad:
        reject("linear_cross_entropy", "accumulate_into", accumulate_into, like)
    if torch.is_grad_enabled() and not linear_weight.requires_grad:
        expected = "one that trains, beside accumulate_into"
        reject("linear_cross_entropy", "linear_weight", "frozen", expected)
