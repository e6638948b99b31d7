"""Cases of rows and columns that train alone, beside training the whole weight, and beside composing it anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from superfine.optim import AdamW
from torch.nn import functional as F

import superfine_kernels
from superfine_kernels.slices import cost

from .harness import Case, Provider

# Relative to the largest gradient: the products of float32 and bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Outcome = tuple[torch.Tensor, ...]


@dataclass
class Inputs:
    """A layer, what comes in and back, its slice, and the gradients that are expected of sampled tokens and of it."""

    x: torch.Tensor  # (tokens, in), or token numbers
    grad: torch.Tensor
    weight: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    expected: tuple[torch.Tensor, ...]


def _error(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"gradient is {tuple(found.shape)}; expected {tuple(expected.shape)}")
    return ((found.double() - expected).abs().max() / expected.abs().max() / TOLERANCE[dtype]).item()


# --- linear layers ----------------------------------------------------------------------------------------

SAMPLE = 64  # tokens whose gradient is checked


def _inputs(
    device: torch.device, *, dim: int, tokens: int, into: int, out: int, count: int, dtype: torch.dtype
) -> Inputs:
    shape = (count, into) if dim == 0 else (out, count)
    inputs = Inputs(
        torch.empty(tokens, into, device=device, dtype=dtype, requires_grad=True),
        torch.empty(tokens, out, device=device, dtype=dtype),
        torch.empty(out, into, device=device, dtype=dtype),
        torch.linspace(0, (out if dim == 0 else into) - 1, count, device=device).long(),
        torch.empty(shape, device=device, dtype=dtype, requires_grad=True),
        (),
    )
    _redraw(dim, inputs, 0)
    return inputs


@torch.no_grad()
def _redraw(dim: int, inputs: Inputs, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor, scale in ((inputs.x, 1.0), (inputs.grad, 1.0), (inputs.weight, inputs.x.shape[1] ** -0.5)):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    inputs.values.copy_(inputs.weight.index_select(dim, inputs.indices) * 1.5)
    whole = inputs.weight.index_copy(dim, inputs.indices, inputs.values).double()
    x, grad = inputs.x.double(), inputs.grad.double()
    of_slice = grad[:, inputs.indices].t() @ x if dim == 0 else grad.t() @ x[:, inputs.indices]
    inputs.expected = (grad[:SAMPLE] @ whole, of_slice)


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    of_x, of_slice = call()
    dtype = inputs.x.dtype
    return max(_error(of_x[:SAMPLE], inputs.expected[0], dtype), _error(of_slice, inputs.expected[1], dtype))


def _whole(dim: int, inputs: Inputs) -> Callable[[], Outcome]:
    weight = inputs.weight.detach().requires_grad_()  # the same memory, with the slice's values in it

    def call() -> Outcome:
        weight.data.index_copy_(dim, inputs.indices, inputs.values.detach())
        of_x, of_weight = torch.autograd.grad(F.linear(inputs.x, weight), (inputs.x, weight), inputs.grad)
        return of_x, of_weight.index_select(dim, inputs.indices)

    return call


def _composed(dim: int, inputs: Inputs) -> Callable[[], Outcome]:
    def call() -> Outcome:
        weight = inputs.weight.index_copy(dim, inputs.indices, inputs.values)
        out = F.linear(inputs.x, weight)
        return torch.autograd.grad(out, (inputs.x, inputs.values), inputs.grad)

    return call


def _delta(dim: int, inputs: Inputs) -> Callable[[], Outcome]:
    def call() -> Outcome:
        change = inputs.values - inputs.weight.index_select(dim, inputs.indices)
        sparse = torch.zeros_like(inputs.weight).index_copy(dim, inputs.indices, change)
        out = F.linear(inputs.x, inputs.weight + sparse)
        return torch.autograd.grad(out, (inputs.x, inputs.values), inputs.grad)

    return call


def _superfine(dim: int, inputs: Inputs) -> Callable[[], Outcome]:
    op = superfine_kernels.rows_linear if dim == 0 else superfine_kernels.cols_linear
    weight = inputs.weight

    def call() -> Outcome:
        out = op(inputs.x, weight, None, inputs.indices, inputs.values)
        return torch.autograd.grad(out, (inputs.x, inputs.values), inputs.grad)

    return call


def _linear_case(
    dim: int, tokens: int, into: int, out: int, count: int, dtype: torch.dtype, *, in_quick: bool = True
) -> Case:
    sizes: dict[str, Any] = {"dim": dim, "tokens": tokens, "into": into, "out": out, "count": count}
    total = out if dim == 0 else into
    what = "rows" if dim == 0 else "columns"
    other = (
        Provider("torch index_copy", partial(_composed, dim), in_quick=False)  # as fast as the whole gradient
        if dim == 0
        else Provider("torch, sparse delta added", partial(_delta, dim))
    )
    return Case(
        op="rows_linear" if dim == 0 else "cols_linear",
        name=f"{tokens}x{into}x{out}, {count} of {total} {what}",
        dtype=str(dtype).removeprefix("torch."),
        work="output, and the gradients of input and slice",
        cost=partial(cost, tokens, into, out, count, dtype, dim=dim),
        traffic="",
        memory=4 * (4 * into * out + 3 * tokens * (into + out)),
        inputs=partial(_inputs, dtype=dtype, **sizes),
        before=lambda inputs: None,
        check=_check,
        providers=(
            Provider("torch, whole gradient", partial(_whole, dim)),
            other,
            Provider("superfine", partial(_superfine, dim)),
        ),
        redraw=partial(_redraw, dim),
        gemm=str(dtype).removeprefix("torch."),
        in_quick=in_quick,
    )


# --- embeddings -------------------------------------------------------------------------------------------


def _table(device: torch.device, *, tokens: int, features: int, num: int, count: int) -> Inputs:
    inputs = Inputs(
        torch.empty(tokens, device=device, dtype=torch.int64),
        torch.empty(tokens, features, device=device),
        torch.empty(num, features, device=device),
        torch.linspace(0, num - 1, count, device=device).long(),
        torch.empty(count, features, device=device, requires_grad=True),
        (),
    )
    _redraw_table(inputs, 0)
    return inputs


@torch.no_grad()
def _redraw_table(inputs: Inputs, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in (inputs.grad, inputs.weight):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    inputs.values.copy_(inputs.weight[inputs.indices])
    num, tokens = len(inputs.weight), len(inputs.x)
    inputs.x.copy_(torch.randint(num, (tokens,), generator=generator))
    some = torch.randint(len(inputs.indices), (tokens // 4,), generator=generator)
    inputs.x[::4][: len(some)] = inputs.indices[some.to(inputs.x.device)]
    gradient = torch.zeros(inputs.weight.shape, dtype=torch.float64, device=inputs.x.device)
    inputs.expected = (gradient.index_add_(0, inputs.x, inputs.grad.double())[inputs.indices],)


def _check_table(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    return _error(call()[0], inputs.expected[0], torch.float32)


def _step_every_row(fused: bool, inputs: Inputs) -> Callable[[], Outcome]:
    weight = inputs.weight.clone().requires_grad_()
    optimizer: Any = torch.optim.AdamW([weight], lr=1e-6, fused=True) if fused else AdamW([weight], lr=1e-6)

    def call() -> Outcome:
        out = F.embedding(inputs.x, weight)
        (weight.grad,) = torch.autograd.grad(out, weight, inputs.grad)
        optimizer.step()
        return (weight.grad[inputs.indices],)

    return call


def _step_rows(inputs: Inputs) -> Callable[[], Outcome]:
    rows = inputs.values.detach().clone().requires_grad_()
    optimizer = AdamW([rows], lr=1e-6)

    def call() -> Outcome:
        out = superfine_kernels.rows_embedding(inputs.x, inputs.weight, inputs.indices, rows)
        (rows.grad,) = torch.autograd.grad(out, rows, inputs.grad)
        optimizer.step()
        return (rows.grad,)

    return call


def _embedding_case(tokens: int, features: int, num: int, count: int) -> Case:
    # Tokens in and out, their gradients in; of the rows gradients and the step.
    moved = 3 * tokens * features * 4 + count * features * (4 + 28)
    return Case(
        op="rows_embedding",
        name=f"{tokens} of {num}x{features}, {count} rows",
        dtype="float32",
        work="lookup, gradient and AdamW step; by torch of every row",
        cost=lambda: superfine_kernels.Cost(bytes=moved, flops=tokens * features),
        traffic="copy",
        memory=4 * (5 * num * features + 4 * tokens * features),
        inputs=partial(_table, tokens=tokens, features=features, num=num, count=count),
        before=lambda inputs: None,
        check=_check_table,
        providers=(
            Provider("torch, every row, fused AdamW", partial(_step_every_row, True)),
            Provider("torch, every row, superfine AdamW", partial(_step_every_row, False)),
            Provider("superfine", _step_rows),
        ),
        redraw=_redraw_table,
    )


def cases() -> list[Case]:
    """Return the cases: few rows of a large head and of its table, a twentieth of the columns of an inner layer."""
    return [
        _linear_case(0, 1024, 512, 32000, 64, torch.float32),
        _linear_case(0, 1024, 512, 32000, 64, torch.bfloat16, in_quick=False),
        _linear_case(1, 1024, 768, 3072, 38, torch.float32),
        _embedding_case(1024, 512, 32000, 64),
    ]
