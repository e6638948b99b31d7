"""Linear layers and embeddings of which some rows or columns train, and the rest of the weight is frozen.

    rows_linear     y = x . W^T + b,  W = weight with its rows at `indices` replaced by `rows`    (n, in)
    cols_linear     the same with columns replaced by `cols`                                      (out, n)
    rows_embedding  y = W[ids]

The gradient of a slice costs what the slice does:

    d_rows = g[..., indices]^T . x        d_cols = g^T . x[..., indices]        dx = g . W

`cols_linear` saves x[..., indices] instead of x; an embedding adds up the gradients of the rows that were looked up.
What nobody needs (frozen input, frozen slice, no_grad) is neither saved nor computed.

So that one plain product serves all rows or columns, the linear layers write the slice into `weight` before they
read it. That region of `weight` is thus scratch memory: no value in it reaches a result, and each op writes the
values that it was given, which also holds where a compiler or a CUDA graph runs it. No version counter decides
whether to write: `.data`, kernels and replayed graphs change values without one. The write leaves the version of
`weight` alone, as backward passes that are still to come read the frozen part; `rows` and `cols` are saved beside it,
so that torch reports a slice that was changed between forward and backward.

A second derivative is computed by eager torch, of a weight put together anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    in_functional_transform,
    is_plain,
    opmath_dtype,
    reject,
    warn_once,
)

__all__ = ["cols_linear", "cost", "reference", "rows_embedding", "rows_linear"]

ROWS, COLS = 0, 1

#: Where it costs nothing to wait for the number of tokens that hit a slice of an embedding.
_HITS_ON = ("cpu",)


def cost(
    tokens: int,
    in_features: int,
    out_features: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    *,
    dim: int = ROWS,
    input_grad: bool = True,
    slice_grad: bool = True,
) -> Cost:
    """Bytes and flops at least of a linear layer with `count` rows (`dim` 0) or columns (1) that train."""
    other = in_features if dim == ROWS else out_features
    products = in_features * out_features * (1 + input_grad) + slice_grad * count * other
    moved = in_features * out_features * (1 + input_grad) + (1 + slice_grad) * count * other
    moved += tokens * (in_features + out_features) * (1 + (input_grad or slice_grad))
    return Cost(bytes=moved * dtype.itemsize, flops=2 * tokens * products)


def reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, values: Tensor, dim: int = ROWS
) -> Tensor:
    """Eager torch: the layer with a copy of the weight whose rows (`dim` 0) or columns (1) are replaced."""
    return F.linear(input, _replaced(weight, dim, indices, values).to(input.dtype), bias)


def _replaced(weight: Tensor, dim: int, indices: Tensor, values: Tensor) -> Tensor:
    return weight.index_copy(dim, indices, values)


def _written(weight: Tensor, dim: int, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight with the slice written into it, in the dtype of the product."""
    # .data: the version of `weight` stays.
    weight.data.index_copy_(dim, indices, values.data)
    return weight.to(dtype)


# --- linear ops -------------------------------------------------------------------------------------------

LIBRARY.define(
    "slice_linear(Tensor input, Tensor weight, Tensor? bias, Tensor indices, Tensor values, Tensor? selected, "
    "int dim) -> Tensor"
)
LIBRARY.define(
    "slice_linear_input_grad(Tensor grad, Tensor weight, Tensor indices, Tensor values, int dim) -> Tensor"
)


@torch.library.impl(LIBRARY, "slice_linear", "CompositeExplicitAutograd")
def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
    selected: Tensor | None,
    dim: int,
) -> Tensor:
    return F.linear(input, _written(weight, dim, indices, values, input.dtype), bias)


@torch.library.impl(LIBRARY, "slice_linear", "Meta")
def _linear_fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.impl(LIBRARY, "slice_linear_input_grad", "CompositeExplicitAutograd")
def _linear_input_grad(grad: Tensor, weight: Tensor, indices: Tensor, values: Tensor, dim: int) -> Tensor:
    return grad @ _written(weight, dim, indices, values, grad.dtype)


@torch.library.impl(LIBRARY, "slice_linear_input_grad", "Meta")
def _linear_input_grad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _matrix(tensor: Tensor) -> Tensor:
    """(tokens, features), which may be none of either."""
    return tensor[None] if tensor.dim() == 1 else tensor.flatten(0, -2)


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, _, indices, values, selected, ctx.dim = inputs
    for_input, _, ctx.for_bias, _, for_slice = ctx.needs_input_grad[:5]
    ctx.of_slice = values.dtype
    ctx.set_materialize_grads(False)
    factor = None  # what the gradient of the slice multiplies with
    if for_slice:
        factor = input if ctx.dim == ROWS else selected
    # Indices have no version to speak of; the rest only where it is read.
    ctx.save_for_backward(indices, factor, *((weight, values) if for_input else (None, None)))


def _linear_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    of_input = of_bias = of_slice = None
    if grad is None:
        return (None,) * 7
    indices, factor, weight, values = ctx.saved_tensors
    again = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, factor, values))
    if again:
        warn_once(
            "rows_linear, cols_linear: a second derivative is asked for; eager torch computes the gradient"
        )
    with torch.autocast(grad.device.type, enabled=False):  # forward has cast what is to be cast
        if weight is not None:
            if again:
                of_input = grad @ _replaced(weight, ctx.dim, indices, values).to(grad.dtype)
            else:
                of_input = torch.ops.superfine.slice_linear_input_grad(grad, weight, indices, values, ctx.dim)
        if ctx.for_bias:
            of_bias = _matrix(grad).sum(0)
        if factor is not None:
            rows = grad.index_select(-1, indices) if ctx.dim == ROWS else grad
            of_slice = (_matrix(rows).t() @ _matrix(factor)).to(ctx.of_slice)
    return of_input, None, of_bias, None, of_slice, None, None


torch.library.register_autograd(
    "superfine::slice_linear", _linear_backward, setup_context=_linear_setup, lib=LIBRARY
)


# --- embedding ops ----------------------------------------------------------------------------------------

# slots: for every row of the weight its place in `rows`, or -1.
LIBRARY.define(
    "slice_embedding(Tensor ids, Tensor weight, Tensor slots, Tensor rows, int padding_idx) -> Tensor"
)
LIBRARY.define(
    "slice_embedding_grad(Tensor grad, Tensor ids, Tensor slots, int count, ScalarType dtype, int padding_idx) "
    "-> Tensor"
)


@torch.library.impl(LIBRARY, "slice_embedding", "CompositeExplicitAutograd")
def _embedding(ids: Tensor, weight: Tensor, slots: Tensor, rows: Tensor, padding_idx: int) -> Tensor:
    out = F.embedding(ids, weight)
    if rows.shape[0] == 0 or ids.numel() == 0:
        return out
    slot = slots[ids.reshape(-1)]
    if out.device.type in _HITS_ON:
        hits = (slot >= 0).nonzero().squeeze(1)
        out.view(-1, out.shape[-1]).index_copy_(0, hits, rows.index_select(0, slot[hits]))
        return out
    # Elsewhere the number of hits would have to be waited for.
    slot = slot.view(ids.shape)
    return torch.where((slot >= 0)[..., None], F.embedding(slot.clamp(min=0), rows), out)


@torch.library.impl(LIBRARY, "slice_embedding", "Meta")
def _embedding_fake(ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _slots_of(ids: Tensor, slots: Tensor, padding_idx: int) -> Tensor:
    ids = ids.reshape(-1)
    slot = slots[ids]
    return slot if padding_idx < 0 else slot.masked_fill(ids == padding_idx, -1)


@torch.library.impl(LIBRARY, "slice_embedding_grad", "CompositeExplicitAutograd")
def _embedding_grad(
    grad: Tensor, ids: Tensor, slots: Tensor, count: int, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    slot, grad = _slots_of(ids, slots, padding_idx), grad.reshape(-1, grad.shape[-1])
    if grad.device.type in _HITS_ON:  # in float32 and in the order of the tokens
        hits = (slot >= 0).nonzero().squeeze(1)
        found = grad.new_zeros((count, grad.shape[-1]), dtype=opmath_dtype(grad.dtype))
        return found.index_add_(0, slot[hits], grad.index_select(0, hits).to(found.dtype)).to(dtype)
    # Sorts instead of adding atomically, and leaves out the row named as padding, here that of all misses.
    slot = torch.where(slot < 0, count, slot)
    found = torch.ops.aten.embedding_dense_backward(grad.contiguous(), slot, count + 1, count, False)
    return found[:count].to(dtype)


@torch.library.impl(LIBRARY, "slice_embedding_grad", "Meta")
def _embedding_grad_fake(
    grad: Tensor, ids: Tensor, slots: Tensor, count: int, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    return grad.new_empty((count, grad.shape[-1]), dtype=dtype)


def _embedding_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, _, slots, rows, ctx.padding_idx = inputs
    ctx.of_rows = (rows.shape[0], rows.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids, slots)


def _embedding_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    (ids, slots), (count, dtype) = ctx.saved_tensors, ctx.of_rows
    if torch.is_grad_enabled() and grad.requires_grad:
        warn_once("rows_embedding: a second derivative is asked for; eager torch computes the gradient")
        slot = _slots_of(ids, slots, ctx.padding_idx)
        hits = (slot >= 0).nonzero().squeeze(1)
        flat = grad.reshape(-1, grad.shape[-1]).index_select(0, hits)
        found = flat.new_zeros((count, flat.shape[-1])).index_add(0, slot[hits], flat).to(dtype)
    else:
        found = torch.ops.superfine.slice_embedding_grad(grad, ids, slots, count, dtype, ctx.padding_idx)
    return None, None, None, found, None


torch.library.register_autograd(
    "superfine::slice_embedding", _embedding_backward, setup_context=_embedding_setup, lib=LIBRARY
)


# --- public -----------------------------------------------------------------------------------------------


def rows_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    rows: Tensor,
    *,
    check_indices: bool = True,
) -> Tensor:
    """`F.linear(input, W, bias)`, where W is `weight` with the rows at `indices` replaced by `rows`.

    Args:
        input: (..., in); float32, bfloat16, float16 or float64, any strides.
        weight: (out, in), of the input's dtype, frozen. The rows are written into it: what it holds there is lost.
        bias: (out), of the input's dtype, or None; may train.
        indices: (n), int64, each once, on the weight's device.
        rows: (n, in), of the weight's dtype.
        check_indices: whether to look at the values of `indices`, which is done on the CPU only.

    Returns:
        (..., out), of the input's dtype. Gradients reach `input`, `bias` and `rows`, where these require them. Under
        autocast the products are made in its dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a weight that requires a gradient, indices
            outside [0, out) or not unique; nothing has been written then.
    """
    return _slice_linear("rows_linear", "rows", input, weight, bias, indices, rows, ROWS, check_indices)


def cols_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    cols: Tensor,
    *,
    check_indices: bool = True,
) -> Tensor:
    """`F.linear(input, W, bias)`, where W is `weight` with the columns at `indices` replaced by `cols`.

    Args:
        indices: (n), int64, each once: input features.
        cols: (out, n), of the weight's dtype.

    The rest is as in `rows_linear`. Of the input only the features at `indices` are saved for backward.
    """
    return _slice_linear("cols_linear", "cols", input, weight, bias, indices, cols, COLS, check_indices)


def _slice_linear(
    op: str,
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
    dim: int,
    check_indices: bool,
) -> Tensor:
    tensors = {"input": input, "weight": weight, "indices": indices, name: values}
    if bias is not None:
        tensors["bias"] = bias
    _check_tensors(op, tensors, input)
    _check_weight(op, weight, indices, name, values, dim, check_indices)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        reject(op, "input", input, f"(..., {weight.shape[1]}), as the weight's input features")
    if bias is not None and bias.shape != weight.shape[:1]:
        reject(op, "bias", bias, f"({weight.shape[0]},), as the weight's output features")
    device = input.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        # The slice is written into the weight, so both keep their dtype; the op casts the weight.
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    else:
        for what, tensor in (("input", input), ("bias", bias)):
            if tensor is not None and tensor.dtype != weight.dtype:
                reject(op, what, tensor, f"{_name(weight.dtype)}, as the weight", TypeError)
    if in_functional_transform():
        warn_once(f"{op}: torch.func and forward-mode AD have no kernel; eager torch computes them")
        return reference(input, weight, bias, indices, values, dim)
    # Selected out here, a second derivative still finds its way to the input.
    keep = dim == COLS and torch.is_grad_enabled() and values.requires_grad
    selected = input.index_select(-1, indices) if keep else None
    out: Tensor = torch.ops.superfine.slice_linear(input, weight, bias, indices, values, selected, dim)
    return out


def rows_embedding(
    ids: Tensor,
    weight: Tensor,
    indices: Tensor,
    rows: Tensor,
    padding_idx: int | None = None,
    *,
    slots: Tensor | None = None,
    check_indices: bool = True,
) -> Tensor:
    """`F.embedding(ids, W)`, where W is `weight` with the rows at `indices` replaced by `rows`.

    Args:
        ids: any shape, int64 or int32.
        weight: (num, features); float32, bfloat16, float16 or float64; frozen, and left as it is.
        indices: (n), int64, each once, on the weight's device.
        rows: (n, features), of the weight's dtype.
        padding_idx: row without a gradient; negative ones count from the end.
        slots: (num), int32 or int64: the place in `rows` of every row, or -1, where the caller keeps that table.
        check_indices: as in `rows_linear`.

    Returns:
        (*ids.shape, features), of the weight's dtype. The gradient of `rows` is summed in float32 in an order that
        does not change from run to run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a weight that requires a gradient, indices
            or padding outside the rows, or not unique.
        IndexError: on the CPU, ids outside [0, num).
    """
    op = "rows_embedding"
    _check_tensors(op, {"ids": ids, "weight": weight, "indices": indices, "rows": rows}, weight)
    _check_weight(op, weight, indices, "rows", rows, ROWS, check_indices)
    if ids.dtype not in (torch.int64, torch.int32):
        reject(op, "ids", ids, "int64 or int32", TypeError)
    num = weight.shape[0]
    if padding_idx is not None and not -num <= padding_idx < num:
        reject(op, "padding_idx", padding_idx, f"None or a row from {-num} to {num - 1}")
    padding = -1 if padding_idx is None else padding_idx % num
    if slots is None:
        slots = make_slots(indices, num)
    elif slots.shape != (num,) or slots.dtype not in (torch.int32, torch.int64):
        reject(op, "slots", slots, f"int32 or int64 ({num},)")
    elif slots.device != weight.device:
        reject(op, "slots", slots, f"a tensor on {weight.device}")
    if in_functional_transform():
        warn_once(f"{op}: torch.func and forward-mode AD have no kernel; eager torch computes them")
        return F.embedding(ids, _replaced(weight, ROWS, indices, rows), None if padding < 0 else padding)
    out: Tensor = torch.ops.superfine.slice_embedding(ids, weight, slots, rows, padding)
    return out


def make_slots(indices: Tensor, num: int) -> Tensor:
    """For each of `num` rows its place in `indices`, or -1: (num), int32."""
    slots = torch.full((num,), -1, dtype=torch.int32, device=indices.device)
    slots[indices] = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device)
    return slots


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensors(op: str, tensors: dict[str, Tensor], like: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            reject(op, name, tensor, "a torch.Tensor", TypeError)
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            reject(op, name, tensor, f"a tensor on {like.device}")


def _check_weight(
    op: str, weight: Tensor, indices: Tensor, name: str, values: Tensor, dim: int, check_indices: bool
) -> None:
    if weight.dtype not in DTYPE_CODES:
        reject(op, "weight", weight, "float32, bfloat16, float16 or float64", TypeError)
    if weight.dim() != 2:
        reject(op, "weight", weight, "two dimensions")
    if weight.requires_grad:
        reject(op, "weight", "one that requires a gradient", "a frozen one")
    if indices.dim() != 1 or indices.dtype != torch.int64:
        reject(op, "indices", indices, "int64 (few,)", TypeError)
    count = indices.numel()
    shape = (count, weight.shape[1]) if dim == ROWS else (weight.shape[0], count)
    if values.shape != shape:
        reject(op, name, values, f"{_name(weight.dtype)} {tuple(shape)}")
    if values.dtype != weight.dtype:
        reject(op, name, values, f"{_name(weight.dtype)}, as the weight", TypeError)
    if check_indices and indices.device.type == "cpu" and is_plain([indices]) and count:
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if not 0 <= low <= high < weight.shape[dim]:
            reject(op, "indices", f"from {low} to {high}", f"{name} in [0, {weight.shape[dim]})")
        if indices.unique().numel() < count:
            reject(op, "indices", "not unique", f"each of the {name} once")
