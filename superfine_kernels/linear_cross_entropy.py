"""Linear layer and cross-entropy in one op, without the logits: they exist a tile of classes at a time.

    x_c = input . linear_weight_c + linear_bias_c,   loss as in cross_entropy.py

The classes are cut into tiles. Forward multiplies the input with one tile of the weight after the other, keeps four
numbers a row of each (`cross_entropy_part` of csrc/cpu/cross_entropy.h) and forgets the logits. Backward makes a
tile's logits again, turns them into their gradient in place, and multiplies: all rows at once, so that a weight's
gradient is one product, summed in float32 by the GEMM and rounded once, whatever the tiles. Only the products that
something trainable needs are made. On the CPU rows with an ignored label are taken out first.

Memory beside inputs and gradients: one tile of logits, and the float32 sum of the input's gradient for 16-bit inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from superfine_kernels._class_tiles import TILE_BYTES, Problem, denominator, row_losses, to_gradient
from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    in_functional_transform,
    opmath_dtype,
    reject,
    warn_once,
)
from superfine_kernels._losses import MEAN, NONE, REDUCTIONS, check_options
from superfine_kernels.cross_entropy import reference as cross_entropy_reference


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


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Eager torch, by way of all logits."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    loss = cross_entropy_reference(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        weight,
        ignore_index,
        reduction,
        label_smoothing,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


# --- ops and autograd -------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, int ignore_index, "
    "float label_smoothing, int tile_bytes, str backend"
)
LIBRARY.define(
    f"linear_cross_entropy({_ARGUMENTS}, int reduction, Tensor? accumulate_into) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"linear_cross_entropy_backward({_ARGUMENTS}, Tensor lse, Tensor scale, bool input_grad, bool weight_grad, "
    "bool bias_grad, Tensor(a!)? accumulate_into) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "linear_cross_entropy", "CompositeExplicitAutograd")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, _ = arguments
    whole = Problem(*fields)
    _check_labels(whole)
    p, rows = whole.without_ignored()
    losses, lse = row_losses(p)
    if reduction == NONE and rows is not None:
        losses = losses.new_zeros(whole.target.shape).index_copy_(0, rows, losses)
    if rows is not None:
        lse = lse.new_zeros(whole.target.shape).index_copy_(0, rows, lse)
    if reduction == NONE:
        return losses, lse
    loss = losses.sum()
    if reduction == MEAN:
        loss = loss / denominator(p, lse.dtype)
    return loss, lse


@torch.library.register_fake("superfine::linear_cross_entropy", lib=LIBRARY)
def _op_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    input, reduction = arguments[0], arguments[-2]
    lse = input.new_empty(input.shape[0], dtype=opmath_dtype(input.dtype))
    return (torch.empty_like(lse) if reduction == NONE else lse.new_empty(())), lse


@torch.library.impl(LIBRARY, "linear_cross_entropy_backward", "CompositeExplicitAutograd")
def _op_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, lse, scale, input_grad, weight_grad, bias_grad, accumulate_into = arguments
    whole = Problem(*fields)
    p, rows = whole.without_ignored()
    if rows is not None:
        lse = lse[rows]
        scale = scale[rows] if scale.dim() else scale
    dtype = p.input.dtype
    d_input = torch.zeros(p.input.shape if input_grad else 0, dtype=opmath_dtype(dtype), device=lse.device)
    d_weight = (
        torch.empty_like(p.linear_weight) if weight_grad and accumulate_into is None else lse.new_empty(0)
    )
    d_bias = torch.empty_like(p.linear_bias) if bias_grad and p.linear_bias is not None else lse.new_empty(0)
    buffer = p.new_buffer()
    for tile in p.tiles():
        logits = p.logits(tile, buffer)
        to_gradient(p, logits, tile, lse, scale)
        if input_grad and d_input.dtype == dtype:
            d_input.addmm_(logits, p.linear_weight[tile])
        elif input_grad:
            d_input += torch.mm(logits, p.linear_weight[tile])
        if weight_grad and accumulate_into is None:
            torch.mm(logits.t(), p.input, out=d_weight[tile])
        elif weight_grad:
            accumulate_into[tile] += torch.mm(logits.t(), p.input)
        if d_bias.numel() > 0:
            d_bias[tile] = logits.sum(0, dtype=lse.dtype)
    if accumulate_into is not None:
        torch.autograd.graph.increment_version(accumulate_into)
    d_input = d_input.to(dtype)
    if input_grad and rows is not None:
        d_input = d_input.new_zeros(whole.input.shape).index_copy_(0, rows, d_input)
    return d_input, d_weight, d_bias


@torch.library.register_fake("superfine::linear_cross_entropy_backward", lib=LIBRARY)
def _op_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, linear_weight, linear_bias = arguments[:3]
    lse, _, input_grad, weight_grad, bias_grad, accumulate_into = arguments[-6:]
    has_weight, has_bias = weight_grad and accumulate_into is None, bias_grad and linear_bias is not None
    return (
        input.new_empty(input.shape if input_grad else 0),
        torch.empty_like(linear_weight) if has_weight else lse.new_empty(0),
        torch.empty_like(linear_bias) if has_bias else lse.new_empty(0),
    )


_NO_ACCUMULATION = "expected none beside accumulate_into, which eager torch does not serve"


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.tile_bytes, ctx.backend, ctx.reduction, into = inputs
    ctx.accumulate_into = into  # not saved as the others are: backward writes it
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    input, linear_weight, linear_bias, target, weight, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if grad is None or not any(needs):
        return (None,) * 11
    tensors = (input, linear_weight, linear_bias, grad)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if ctx.accumulate_into is not None:
            raise RuntimeError(f"linear_cross_entropy: a second derivative is asked for; {_NO_ACCUMULATION}")
        warn_once("linear_cross_entropy: a second derivative is asked for; eager torch computes the gradient")
        reduction = next(name for name, code in REDUCTIONS.items() if code == ctx.reduction)
        rest = (weight, ctx.ignore_index, reduction, ctx.label_smoothing)
        loss = reference(input, linear_weight, target, linear_bias, *rest)
        wanted = [t for t, need in zip((input, linear_weight, linear_bias), needs, strict=True) if need]
        found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), *(None,) * 8
    fields = (
        input, linear_weight, linear_bias, target, weight,
        ctx.ignore_index, ctx.label_smoothing, ctx.tile_bytes, ctx.backend,
    )  # fmt: skip
    scale = grad.to(lse.dtype)
    if ctx.reduction == MEAN:
        scale = scale / denominator(Problem(*fields), lse.dtype)
    with torch.autocast(input.device.type, enabled=False):  # forward has cast what is to be cast
        gradients = torch.ops.superfine.linear_cross_entropy_backward(
            *fields, lse, scale.contiguous(), *needs, ctx.accumulate_into
        )
    has = (needs[0], needs[1] and ctx.accumulate_into is None, needs[2])
    return *(g if need else None for g, need in zip(gradients, has, strict=True)), *(None,) * 8


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
    num_items: float | Tensor | None = None,
    accumulate_into: Tensor | None = None,
    tile_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T + linear_bias`, as `torch.nn.functional.linear_cross_entropy`.

    Logits are never held but for a tile of classes. Under autocast the products are made in its dtype.

    Args:
        input: (features) or (..., features); float32, bfloat16, float16 or float64, any strides.
        linear_weight: (classes, features), of the input's dtype.
        target: classes, of the shape of `input` without its last dimension; int64 or int32.
        linear_bias: (classes), of the input's dtype.
        weight, ignore_index, reduction, label_smoothing, num_items: as in `superfine_kernels.cross_entropy`.
        accumulate_into: (classes, features), of the weight's dtype or float32: backward adds the gradient of
            `linear_weight` there instead of returning it (hooks of the weight see None); several losses, or steps of
            accumulation, then need no buffer of their own. Each product is rounded to the inputs' dtype before it
            is added. A weight's `.grad` will do while it is zeroed in place: `zero_grad()` replaces it.
        tile_bytes: of the tile of logits; None for 4 MiB on a CPU, 256 MiB on a GPU; at least 1024
            classes make a tile.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or the shape of `target` for "none". Gradients reach
        `input`, `linear_weight` and `linear_bias` where these require them; what does not costs nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also a label outside
            [0, classes), named with its position.
    """
    original = linear_weight
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    if tile_bytes is None:
        tile_bytes = TILE_BYTES.get(input.device.type, TILE_BYTES["cpu"]) if isinstance(input, Tensor) else 0
    _check(input, linear_weight, target, linear_bias, tile_bytes)
    if accumulate_into is not None:
        _check_accumulation(accumulate_into, original)
    ignore_index = -100 if ignore_index is None else ignore_index
    options = (weight, reduction, label_smoothing, num_items)
    check_options("linear_cross_entropy", len(linear_weight), input.device, *options)
    divisor = num_items.reshape(()) if isinstance(num_items, Tensor) else num_items
    if divisor is not None:
        reduction = "sum"
    if in_functional_transform():
        if accumulate_into is not None:
            raise RuntimeError(f"linear_cross_entropy: torch.func transforms it; {_NO_ACCUMULATION}")
        warn_once(
            "linear_cross_entropy: torch.func and forward-mode AD have no kernel; eager torch computes them"
        )
        rest = (linear_bias, weight, ignore_index, reduction, label_smoothing)
        loss = reference(input, linear_weight, target, *rest)
        return loss if divisor is None else loss / divisor
    if weight is not None:
        weight = weight.to(opmath_dtype(input.dtype)).contiguous()
    loss, _ = torch.ops.superfine.linear_cross_entropy(
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1).long(),
        weight,
        ignore_index,
        float(label_smoothing),
        tile_bytes,
        backend or "",
        REDUCTIONS[reduction],
        accumulate_into,
    )
    if divisor is not None:
        loss = loss / divisor
    return loss.reshape(target.shape) if reduction == "none" else loss


def _autocast(input: Any, *others: Any) -> tuple[Any, ...]:
    device = input.device.type if isinstance(input, Tensor) else ""
    if device not in TILE_BYTES or not torch.is_autocast_enabled(device):
        return input, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (input, *others)
    )


def _check(input: Any, linear_weight: Any, target: Any, linear_bias: Any, tile_bytes: Any) -> None:
    def expect(
        condition: bool, argument: str, value: object, expected: str, error: type[Exception] = ValueError
    ) -> None:
        if not condition:
            reject("linear_cross_entropy", argument, value, expected, error)

    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    tensors |= {} if linear_bias is None else {"linear_bias": linear_bias}
    for name, tensor in tensors.items():
        expect(isinstance(tensor, Tensor), name, tensor, "a torch.Tensor", TypeError)
        expect(tensor.device == input.device, name, tensor, f"a tensor on {input.device}")
    expect(input.dtype in DTYPE_CODES, "input", input, "float32, bfloat16, float16 or float64", TypeError)
    expect(input.dim() >= 1 and input.shape[-1] > 0, "input", input, "(features) or (..., features)")
    expect(target.dtype in (torch.int64, torch.int32), "target", target, "int64 or int32 classes", TypeError)
    expect(target.shape == input.shape[:-1], "target", target, f"classes of shape {tuple(input.shape[:-1])}")
    features = input.shape[-1]
    fits = linear_weight.dim() == 2 and linear_weight.shape[1] == features and linear_weight.shape[0] > 0
    like = f"{str(input.dtype).removeprefix('torch.')} (classes, {features}), as the input"
    expect(fits and linear_weight.dtype == input.dtype, "linear_weight", linear_weight, like)
    classes = linear_weight.shape[0]
    if linear_bias is not None:
        like = f"{str(input.dtype).removeprefix('torch.')} ({classes},)"
        expect(
            linear_bias.shape == (classes,) and linear_bias.dtype == input.dtype,
            "linear_bias",
            linear_bias,
            like,
        )
    least = max(1, target.numel()) * input.element_size()
    valid = isinstance(tile_bytes, int) and tile_bytes >= least
    expect(valid, "tile_bytes", tile_bytes, f"at least {least}, the logits of one class")


def _check_accumulation(accumulate_into: Any, linear_weight: Tensor) -> None:
    like = f"shape {tuple(linear_weight.shape)}, of the weight's dtype or float32, that requires no gradient"
    if not isinstance(accumulate_into, Tensor):
        reject("linear_cross_entropy", "accumulate_into", accumulate_into, "a torch.Tensor", TypeError)
    fits = accumulate_into.shape == linear_weight.shape and accumulate_into.device == linear_weight.device
    fits = fits and accumulate_into.dtype in (linear_weight.dtype, torch.float32)
    if not fits or accumulate_into.requires_grad:
        reject("linear_cross_entropy", "accumulate_into", accumulate_into, like)
    if torch.is_grad_enabled() and not linear_weight.requires_grad:
        expected = "one that trains, beside accumulate_into"
        reject("linear_cross_entropy", "linear_weight", "frozen", expected)


def _check_labels(p: Problem) -> None:
    if p.target.device.type == "cpu":
        bad = (((p.target < 0) | (p.target >= p.classes)) & (p.target != p.ignore_index)).nonzero()
        if len(bad) > 0:
            i = int(bad[0])
            raise ValueError(
                f"linear_cross_entropy: target[{i}] is {int(p.target[i])}; expected a class in [0, {p.classes}) or "
                f"ignore_index ({p.ignore_index})"
            )
