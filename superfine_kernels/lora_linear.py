"""A frozen linear layer and its LoRA adapter (Hu et al. 2021) as one autograd node.

    h = scale x a^T                 (..., rank)
    y = x weight^T + bias + h b^T

    dx = g weight + (scale g b) a       da = (scale g b)^T x       db = g^T h

Each is computed only where something requires it. Saved are the input in its own dtype, which the layers beside this
one share, and h, a few numbers a token. Adapters in float32 beside bfloat16 inputs, as PEFT makes them, compute in
float32: what is converted lives a block of rows at a time, and sums of gradients run over all rows in float32.
`weight` may train, too; then it has its gradient.

Everything is a product of torch's: there is no kernel of its own. Under a compiler, and in torch.func, the formula is
handed over as it stands, for the compiler to fuse and to choose what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from superfine_kernels._library import (
    Cost,
    in_functional_transform,
    is_batched,
    no_second_derivative,
    reject,
)

#: Elements of a block of rows that is converted at a time on the CPU: 512 KiB in float32, so that it stays in the
#: L2 cache from the conversion through both products.
CONVERTED = 1 << 17


def cost(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    *,
    input_grad: bool = True,
    backward: bool = True,
) -> Cost:
    """Bytes and flops at least, with a frozen weight: each input read and each output written once, each way."""
    adapter = rank * (in_features + out_features)
    base = in_features * out_features
    forward = (tokens * (in_features + out_features) + base) * dtype.itemsize
    more = tokens * (in_features * (1 + input_grad) + out_features) + base * input_grad
    size = (adapter_dtype or dtype).itemsize
    moved = forward + adapter * size + backward * (more * dtype.itemsize + 2 * adapter * size)
    multiplied = base * (1 + backward * input_grad)
    products = adapter + backward * (adapter + rank * out_features + input_grad * rank * in_features)
    return Cost(bytes=moved, flops=2 * tokens * (multiplied + products))


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Eager torch, in the order of PEFT: the adapter computes in its own dtype, the sum is rounded to the base's."""
    x = input.to(a.dtype)
    if dropout_mask is not None:
        x = x * (dropout_mask.to(a.dtype) / (1 - dropout_p))
    base = F.linear(input, weight, bias)
    return (base + F.linear(F.linear(x, a), b) * scale).to(base.dtype)


# --- products -------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """What a call is about, but for its input."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    mask: Tensor | None  # (tokens, in_features): what dropout keeps of the adapter's input
    p: float


def _blocks(x: Tensor, layer: _Layer) -> Iterator[slice]:
    """Rows to convert at a time; all of them where nothing is converted."""
    rows, step = x.shape[0], x.shape[0]
    if x.device.type == "cpu" and (x.dtype != layer.a.dtype or layer.mask is not None):
        step = max(64, CONVERTED // max(x.shape[1], layer.weight.shape[0], 1))
    for begin in range(0, rows, max(step, 1)):
        yield slice(begin, min(begin + step, rows))


def _adapter_input(x: Tensor, layer: _Layer, rows: slice) -> Tensor:
    """Rows of the input in the adapter's dtype, zero where dropout drops them; not yet divided by what it keeps."""
    x = x[rows].to(layer.a.dtype)
    return x if layer.mask is None else x * layer.mask[rows]


def _forward(x: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
    """y (tokens, out_features) and h (tokens, rank)."""
    y = F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    h = torch.empty(x.shape[0], layer.a.shape[0], dtype=layer.a.dtype, device=x.device)
    for rows in _blocks(x, layer):
        torch.mm(_adapter_input(x, layer, rows), layer.a.t(), out=h[rows])
        h[rows].mul_(layer.scale / (1 - layer.p))
        _add_product_(y[rows], h[rows], layer.b.t())
    return y, h


def _add_product_(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, rounded once more where `into` has another dtype."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.copy_(into.to(left.dtype).addmm_(left, right))


class Gradients(NamedTuple):
    """Of `lora_linear`'s tensors, None for what nobody asked for."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def _backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, layer: _Layer, wants: tuple[bool, ...]
) -> Gradients:
    """Gradients where `wants` says so; x and h may be None where neither needs them."""
    wants_input, wants_weight, wants_bias, wants_a, wants_b = wants
    weight, _, a, b, scale, _, p = layer
    dx = g @ weight.to(g.dtype) if wants_input else None
    da = torch.zeros_like(a) if wants_a else None
    db = torch.zeros_like(b) if wants_b else None
    for rows in _blocks(g if x is None else x, layer):
        upstream = g[rows].to(a.dtype)
        if db is not None and h is not None:
            db.addmm_(upstream.t(), h[rows])
        if dx is None and da is None:
            continue
        dh = torch.mm(upstream, b).mul_(scale / (1 - p))
        if da is not None and x is not None:
            da.addmm_(dh.t(), _adapter_input(x, layer, rows))
        if dx is not None and layer.mask is None:
            _add_product_(dx[rows], dh, a)
        elif dx is not None and layer.mask is not None:
            dx[rows] += (dh @ a).mul_(layer.mask[rows]).to(dx.dtype)
    return Gradients(
        dx,
        (g.t() @ x).to(weight.dtype) if wants_weight and x is not None else None,
        _column_sums(g, layer.bias) if wants_bias and layer.bias is not None else None,
        da,
        db,
    )


def _column_sums(g: Tensor, bias: Tensor) -> Tensor:
    return g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(bias.dtype)


def _differentiable_backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, layer: _Layer, wants: tuple[bool, ...]
) -> Gradients:
    """The same gradients as functions that have derivatives themselves."""
    weight, bias, a, b, scale, mask, p = layer
    kept: Any = scale / (1 - p) if mask is None else mask.to(a.dtype) * (scale / (1 - p))
    upstream, dx, dw, da, db = g.to(a.dtype), None, None, None, None
    if wants[0]:
        dx = g @ weight.to(g.dtype) + ((upstream @ b @ a) * kept).to(g.dtype)
    if x is not None:
        adapter_input = x.to(a.dtype) * kept
        dw = (g.t() @ x).to(weight.dtype) if wants[1] else None
        da = (upstream @ b).t() @ adapter_input if wants[3] else None
        db = upstream.t() @ (adapter_input @ a.t()) if wants[4] else None
    elif h is not None and wants[0] and torch.is_grad_enabled():
        raise no_second_derivative("lora_linear", "backend='reference': beside a frozen `a` no input is kept")
    elif h is not None:
        db = upstream.t() @ h  # h is a constant
    return Gradients(dx, dw, _column_sums(g, bias) if wants[2] and bias is not None else None, da, db)


# --- autograd -------------------------------------------------------------------------------------------------

#: A function and what it takes: the input is computed again from these instead of being saved.
InputFrom = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, a, b, scale, mask, p, input_from):
        layer = _Layer(weight, bias, a, b, scale, mask, p)
        x = input.reshape(-1, input.shape[-1])
        if mask is not None:
            layer = layer._replace(mask=mask.reshape(x.shape))
        y, h = _forward(x, layer)
        wants = ctx.needs_input_grad[:5]
        ctx.scale, ctx.p, ctx.remake, sources = scale, p, None, (None,)
        if wants[1] or wants[3]:  # for db there is h
            sources = (input,)
            if input_from is not None:
                ctx.remake, sources = input_from
        ctx.save_for_backward(weight, bias, a, b, mask, h if wants[4] else None, *sources)
        return y.view(*input.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        weight, bias, a, b, mask, h, *sources = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        shape = (*grad.shape[:-1], weight.shape[1])
        layer = _Layer(
            weight, bias, a, b, ctx.scale, None if mask is None else mask.reshape(g.shape[0], -1), ctx.p
        )
        with torch.autocast(grad.device.type, enabled=False):  # forward has cast what is to be cast
            x = sources[0] if ctx.remake is None else ctx.remake(*sources)
            x = None if x is None else x.reshape(-1, weight.shape[1])
            # For create_graph=True and is_grads_batched=True, without operations in place.
            plain = not torch.is_grad_enabled() and not is_batched(grad)
            gradients = _backward if plain else _differentiable_backward
            found = gradients(g, x, h, layer, ctx.needs_input_grad[:5])
        dx = None if found.input is None else found.input.reshape(shape)
        return dx, *found[1:], None, None, None, None


# --- public ---------------------------------------------------------------------------------------------------


def lora_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    input_from: InputFrom | None = None,
    backend: str | None = None,
) -> Tensor:
    """`input @ weight.T + bias + scale * (input @ a.T) @ b.T` as one node: what `peft.tuners.lora.Linear` computes.

    Under autocast everything is computed in its dtype, as there.

    Args:
        input: (..., in_features); float32, bfloat16, float16 or float64, any strides.
        weight: (out_features, in_features), of the input's dtype (any under autocast).
        bias: (out_features), likewise, or None.
        a, b: (rank, in_features) and (out_features, rank), both of the input's dtype or both wider.
        scale: of the adapter, alpha / rank; finite.
        dropout_mask: bool, of the input's shape: the elements of the adapter's input that dropout keeps; they are
            divided by 1 - dropout_p. Saved as it is. None for no dropout.
        dropout_p: in [0, 1).
        input_from: `(function, tensors)`: `function(*tensors)` gives `input` again, bit for bit; backward calls it
            and `input` is not saved, which pays where others save the tensors anyway. Gradients reach `input`, not
            the tensors.
        backend: None, or "reference" for eager torch operation by operation.

    Returns:
        (..., out_features), of the input's dtype (of autocast's). Gradients reach what requires them; what does not
        costs nothing, and nothing is saved for it: `b` alone, as in LoRA-FA, keeps no input. Second derivatives are
        those of the formula.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    device = input.device.type if isinstance(input, Tensor) else ""
    _check(input, weight, bias, a, b, scale, dropout_mask, dropout_p)
    if backend not in (None, "reference"):
        reject("lora_linear", "backend", backend, "None or 'reference'")
    plain = backend is None and not torch.compiler.is_compiling() and not in_functional_transform()
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        if not plain:  # F.linear casts
            return reference(input, weight, bias, a, b, scale, dropout_mask=dropout_mask, dropout_p=dropout_p)
        dtype = torch.get_autocast_dtype(device)
        if input.dtype != dtype:
            input = input.to(dtype)
            if input_from is not None:
                input_from = partial(_cast, input_from[0], dtype), input_from[1]
        a, b = a.to(dtype), b.to(dtype)
        # The weight is cast inside of the node: its copy is not saved.
        with torch.autocast(device, enabled=False):
            return _apply(input, weight, bias, a, b, scale, dropout_mask, dropout_p, input_from)
    _check_dtypes(input, weight, bias, a)
    if not plain:
        return reference(input, weight, bias, a, b, scale, dropout_mask=dropout_mask, dropout_p=dropout_p)
    return _apply(input, weight, bias, a, b, scale, dropout_mask, dropout_p, input_from)


def _cast(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    return function(*tensors).to(dtype)


def _apply(*arguments: Any) -> Tensor:
    output: Tensor = _LoraLinear.apply(*arguments)
    return output


def _check(
    input: Any, weight: Any, bias: Any, a: Any, b: Any, scale: Any, dropout_mask: Any, dropout_p: Any
) -> None:
    op = "lora_linear"
    tensors = {"input": input, "weight": weight, "bias": bias, "a": a, "b": b, "dropout_mask": dropout_mask}
    for name, tensor in tensors.items():
        if tensor is None and name in ("bias", "dropout_mask"):
            continue
        if not isinstance(tensor, Tensor):
            reject(op, name, tensor, "a torch.Tensor", TypeError)
        if tensor.device != input.device:
            reject(op, name, tensor, f"a tensor on {input.device}")
        if name != "dropout_mask" and not tensor.is_floating_point():
            reject(op, name, tensor, "floating point", TypeError)
    if input.dim() == 0:
        reject(op, "input", input, "(..., in_features)")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        reject(op, "weight", weight, f"(out_features, {input.shape[-1]})")
    out_features, in_features = weight.shape
    if bias is not None and bias.shape != (out_features,):
        reject(op, "bias", bias, f"({out_features})")
    if a.dim() != 2 or a.shape[1] != in_features:
        reject(op, "a", a, f"(rank, {in_features})")
    if b.shape != (out_features, a.shape[0]):
        reject(op, "b", b, f"({out_features}, {a.shape[0]})")
    if b.dtype != a.dtype:
        reject(op, "b", b, f"{a.dtype} as a")
    if not math.isfinite(scale):
        reject(op, "scale", scale, "a finite number")
    if not 0 <= dropout_p < 1:
        reject(op, "dropout_p", dropout_p, "a number in [0, 1)")
    if dropout_mask is not None and (dropout_mask.dtype != torch.bool or dropout_mask.shape != input.shape):
        reject(op, "dropout_mask", dropout_mask, f"bool of shape {tuple(input.shape)}")


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> None:
    if weight.dtype != input.dtype:
        reject("lora_linear", "weight", weight, f"{input.dtype} as the input")
    if bias is not None and bias.dtype != input.dtype:
        reject("lora_linear", "bias", bias, f"{input.dtype} as the input")
    if a.dtype != input.dtype and torch.promote_types(a.dtype, input.dtype) != a.dtype:
        reject("lora_linear", "a", a, f"{input.dtype} as the input, or wider")
