"""Cases of `gelu`, `swiglu` and `geglu`: the result and the gradients of all inputs.

The gradients are handed over by ``torch.autograd.grad``, as in cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import superfine_kernels
from superfine_kernels.activation import cost

from .harness import Case, Provider
from .peers import compiled

Outcome = tuple[torch.Tensor, ...]
Activation = Callable[..., torch.Tensor]

# Of the largest number of each result: fp32 rounding, and the 8 bits of bf16, rounded twice by eager modules.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


@dataclass
class Inputs:
    """Gate and, for a gated unit, up, all of them leaves; the upstream gradient; float64's results."""

    op: str
    approximate: str
    leaves: list[torch.Tensor]
    grad: torch.Tensor
    expected: list[torch.Tensor]


def _eager_function(op: str, approximate: str) -> Activation:
    """As models write it."""
    if op == "swiglu":
        return lambda gate, up: F.silu(gate) * up
    if op == "geglu":
        return lambda gate, up: F.gelu(gate, approximate=approximate) * up
    return lambda x: F.gelu(x, approximate=approximate)


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    """transformers' NewGELUActivation, which GPT-2 has."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _inputs(
    device: torch.device, *, op: str, approximate: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Inputs:
    gated = op != "gelu"
    leaves = [torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(1 + gated)]
    grad = torch.empty(shape, device=device, dtype=dtype)
    expected = [torch.empty(shape, device=device) for _ in range(2 + gated)]
    inputs = Inputs(op, approximate, leaves, grad, expected)
    _redraw(inputs, 0)
    return inputs


@torch.no_grad()
def _redraw(inputs: Inputs, seed: int) -> None:
    """Draw the inputs into the same buffers, and compute what is expected of them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*inputs.leaves, inputs.grad):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    wide = [leaf.double().requires_grad_() for leaf in inputs.leaves]
    with torch.enable_grad():
        out = _eager_function(inputs.op, inputs.approximate)(*wide)
        gradients = torch.autograd.grad(out, wide, inputs.grad.double())
    for buffer, value in zip(inputs.expected, (out, *gradients), strict=True):
        buffer.copy_(value)


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    """The largest error of a result, relative to its largest number and the tolerance."""
    results = call()
    errors = []
    for actual, expected in zip(results, inputs.expected, strict=True):
        if actual.dtype != inputs.grad.dtype or actual.shape != expected.shape:
            raise ValueError(f"result is {actual.dtype} {tuple(actual.shape)}; expected that of the inputs")
        errors.append(((actual.float() - expected).abs().max() / expected.abs().max()).item())
    return float("nan") if any(map(math.isnan, errors)) else max(errors) / TOLERANCE[inputs.grad.dtype]


def _with_gradients(function: Activation, inputs: Inputs) -> Callable[[], Outcome]:
    def call() -> Outcome:
        out = function(*inputs.leaves)
        return out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad)

    return call


def _eager(inputs: Inputs) -> Callable[[], Outcome]:
    return _with_gradients(_eager_function(inputs.op, inputs.approximate), inputs)


def _written_out(inputs: Inputs) -> Callable[[], Outcome]:
    return _with_gradients(_gelu_new, inputs)


def _compiled(inputs: Inputs) -> Callable[[], Outcome]:
    torch.compiler.reset()
    function = torch.compile(_eager_function(inputs.op, inputs.approximate), dynamic=False)
    return compiled(_with_gradients(function, inputs))


def _superfine(inputs: Inputs) -> Callable[[], Outcome]:
    options = {} if inputs.op == "swiglu" else {"approximate": inputs.approximate}
    return _with_gradients(partial(getattr(superfine_kernels, inputs.op), **options), inputs)


PROVIDERS = (
    Provider("torch eager", _eager),
    Provider("torch.compile", _compiled, in_quick=False),  # compiling takes longer than measuring
    Provider("superfine", _superfine),
)
OF_GPT2 = (*PROVIDERS, Provider("NewGELUActivation", _written_out))


def _case(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    approximate: str = "none",
    in_quick: bool = True,
) -> Case:
    elements = torch.Size(shape).numel()
    gated = op != "gelu"
    function = "silu" if op == "swiglu" else "gelu" if approximate == "none" else "gelu_tanh"
    tanh = approximate == "tanh"

    return Case(
        op=op,
        name="x".join(map(str, shape)) + (", tanh" if tanh else ""),
        dtype=str(dtype).removeprefix("torch."),
        work="the result and the gradients of all inputs",
        cost=partial(cost, elements, dtype, function, gated),
        traffic="copy",
        memory=elements * (8 * dtype.itemsize + 48),  # inputs, results, float64's results, temporaries
        inputs=partial(_inputs, op=op, approximate=approximate, shape=shape, dtype=dtype),
        before=lambda inputs: None,
        check=_check,
        providers=OF_GPT2 if op == "gelu" and tanh else PROVIDERS,
        redraw=_redraw,
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: BERT's and GPT-2's inner size of 1024 tokens, a batch of 8 of 128, that of a small Llama."""
    return [
        _case("gelu", (1024, 3072), torch.float32),
        _case("gelu", (1024, 3072), torch.bfloat16, in_quick=False),
        _case("gelu", (1024, 3072), torch.float32, "tanh"),
        _case("gelu", (8, 128, 1024), torch.bfloat16, "tanh", in_quick=False),
        _case("swiglu", (1024, 704), torch.float32, in_quick=False),
        _case("swiglu", (1024, 3072), torch.float32),
        _case("swiglu", (1024, 3072), torch.bfloat16, in_quick=False),
        _case("geglu", (8, 128, 1024), torch.float32, "tanh", in_quick=False),
        _case("geglu", (1024, 3072), torch.bfloat16, "tanh", in_quick=False),
    ]
