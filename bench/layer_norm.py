"""Cases of `layer_norm` and `rms_norm`: the output and the gradients that are needed, of frozen and trained weights.

RMS norms are in Llama's order, whose formula in eager torch is the one to beat. Gradients are handed over by
``torch.autograd.grad``, as in cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import superfine_kernels
from superfine_kernels.layer_norm import cost

from .harness import Case, Provider, UnavailableError
from .peers import compiled

Outcome = list[torch.Tensor]
Norm = Callable[["Inputs"], tuple[torch.Tensor, ...]]

# Of the largest value: fp32 sums, and the 8 bits of bf16, which eager torch rounds to several times.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
EPS = 1e-5


@dataclass
class Inputs:
    """Arguments, upstream gradients of the output (and the sum), and what float64 finds."""

    op: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor | None
    upstream: list[torch.Tensor]
    expected: list[torch.Tensor] = field(default_factory=list)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What a gradient is needed of."""
        bias = self.bias if self.op == "layer_norm" else None
        return [t for t in (self.x, self.residual, self.weight, bias) if t is not None and t.requires_grad]


def _inputs(
    device: torch.device, *, op: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, frozen: bool
) -> Inputs:
    def empty(*sizes: int, trained: bool = True) -> torch.Tensor:
        return torch.empty(sizes, device=device, dtype=dtype, requires_grad=trained)

    inputs = Inputs(
        op,
        empty(*shape),
        empty(shape[-1], trained=not frozen),
        empty(shape[-1], trained=not frozen),
        empty(*shape) if residual else None,
        [empty(*shape, trained=False) for _ in range(1 + residual)],
    )
    _redraw(inputs, 0)
    return inputs


@torch.no_grad()
def _redraw(inputs: Inputs, seed: int) -> None:
    """Draw all arguments into the same buffers, and compute what is expected."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (inputs.x, inputs.weight, inputs.bias, inputs.residual, *inputs.upstream)
    for tensor in tensors:
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    exact: list[Any] = [
        None if t is None else t.double().requires_grad_(t.requires_grad) for t in tensors[:4]
    ]
    x, weight, bias, residual = exact
    wide = Inputs(inputs.op, x, weight, bias, residual, [g.double() for g in inputs.upstream])
    inputs.expected = [t.to(inputs.x.device, torch.float32) for t in _with_gradients(_eager_norm, wide)()]


def _before(inputs: Inputs) -> None:
    """Nothing is overwritten."""


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    """The largest error of output, sum and gradients, each relative to its largest value and the tolerance."""
    found = call()
    if len(found) != len(inputs.expected):
        raise ValueError(f"results are {len(found)}; expected {len(inputs.expected)}")
    errors = [
        ((ours.float() - exact).abs().max() / exact.abs().max()).item()
        for ours, exact in zip(found, inputs.expected, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors) / TOLERANCE[inputs.x.dtype]


def _llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers' LlamaRMSNorm, but that float64 stays float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _eager_norm(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = inputs.x if inputs.residual is None else inputs.x + inputs.residual
    if inputs.op == "layer_norm":
        y = F.layer_norm(x, x.shape[-1:], inputs.weight, inputs.bias, EPS)
    else:
        y = _llama(x, inputs.weight)
    return (y,) if inputs.residual is None else (y, x)


def _with_gradients(norm: Norm, inputs: Inputs) -> Callable[[], Outcome]:
    def call() -> Outcome:
        with torch.enable_grad():
            out = norm(inputs)
        gradients = torch.autograd.grad(out, inputs.leaves, inputs.upstream)
        return [*(o.detach() for o in out), *gradients]

    return call


def _eager(inputs: Inputs) -> Callable[[], Outcome]:
    return _with_gradients(_eager_norm, inputs)


def _torch_rms_norm(inputs: Inputs) -> Callable[[], Outcome]:
    if inputs.op != "rms_norm" or inputs.residual is not None:
        raise UnavailableError("F.rms_norm has neither mean nor residual")
    return _with_gradients(lambda i: (F.rms_norm(i.x, i.x.shape[-1:], i.weight, EPS),), inputs)


def _compiled(inputs: Inputs) -> Callable[[], Outcome]:
    torch.compiler.reset()
    return compiled(_with_gradients(torch.compile(_eager_norm, dynamic=False), inputs))


def _superfine(inputs: Inputs) -> Callable[[], Outcome]:
    def norm(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        residual = inputs.residual
        if inputs.op == "layer_norm":
            out = superfine_kernels.layer_norm(inputs.x, inputs.weight, inputs.bias, EPS, residual=residual)
        else:
            out = superfine_kernels.rms_norm(
                inputs.x, inputs.weight, EPS, cast_before_weight=True, residual=residual
            )
        return (out,) if residual is None else tuple(out)

    return _with_gradients(norm, inputs)


_COMPILE = Provider("torch.compile", _compiled, in_quick=False)  # compiling takes longer than measuring
_OURS = Provider("superfine", _superfine)
PROVIDERS = {
    "layer_norm": (Provider("torch eager", _eager), _COMPILE, _OURS),
    "rms_norm": (Provider("torch eager", _eager), Provider("F.rms_norm", _torch_rms_norm), _COMPILE, _OURS),
}


def _case(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
    frozen: bool = False,
    in_quick: bool = False,
) -> Case:
    size = shape[-1]
    elements = torch.Size(shape).numel()
    what = ["residual"] * residual + ["frozen weights"] * frozen
    return Case(
        op=op,
        name=", ".join(["x".join(map(str, shape)), *what]),
        dtype=str(dtype).removeprefix("torch."),
        work="output, and the gradients of input"
        + " and residual" * residual
        + " and weights" * (not frozen),
        cost=partial(cost, elements // size, size, dtype, op, residual=residual, weight_grad=not frozen),
        traffic="copy",
        memory=elements * (6 * dtype.itemsize + 64),  # arguments and results, float64's, eager's temporaries
        inputs=partial(_inputs, op=op, shape=shape, dtype=dtype, residual=residual, frozen=frozen),
        before=_before,
        check=_check,
        providers=PROVIDERS[op],
        resident=elements < 2**16,  # few elements: the cost of a call
        redraw=_redraw,
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: rows of BERT and of a small Llama, frozen and trained, and the cost of a call."""
    bert, small, bf16 = (1024, 768), (8, 128, 256), torch.bfloat16
    found = []
    for op in PROVIDERS:
        found += [
            _case(op, bert, frozen=True, in_quick=op == "rms_norm"),
            _case(op, bert),
            _case(op, bert, bf16, frozen=True, in_quick=op == "layer_norm"),
            _case(op, bert, bf16, residual=True),
            _case(op, small, frozen=True),
            _case(op, small, bf16, residual=True),
            _case(op, (1, 64)),
        ]
    return found
