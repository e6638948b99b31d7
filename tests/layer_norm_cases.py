"""Cases and comparisons that the tests of layer_norm and rms_norm on CPU and by Triton share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import layer_norm, rms_norm

#: Of the largest value: rounding of the result, and in float32 sums of thousands.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-13}


@dataclass
class Case:
    """Arguments of a norm, of which some train, and upstream gradients of its output and sum."""

    op: str
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # input, weight, bias, residual
    upstream: tuple[Tensor, ...]

    def to(self, device: str) -> Case:
        """The same on another device."""
        moved = [
            None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in self.tensors
        ]
        return Case(self.op, tuple(moved), tuple(g.to(device) for g in self.upstream))

    def run(self, **options: Any) -> tuple[Tensor, ...]:
        """The output, and with a residual the sum."""
        x, weight, bias, residual = self.tensors
        options["residual"] = residual
        out = (
            layer_norm(x, weight, bias, **options)
            if self.op == "layer_norm"
            else rms_norm(x, weight, **options)
        )
        return out if residual is not None else (out,)

    def leaves(self) -> list[Tensor]:
        """What trains."""
        x, weight, bias, residual = self.tensors
        used = (x, weight, bias if self.op == "layer_norm" else None, residual)
        return [t for t in used if t is not None and t.requires_grad]

    def results(self, **options: Any) -> list[Tensor]:
        """Output, sum, and the gradients of what trains."""
        out = self.run(**options)
        trained = [(o, g) for o, g in zip(out, self.upstream, strict=True) if o.requires_grad]
        gradients: tuple[Tensor, ...] = ()
        if trained:
            gradients = torch.autograd.grad([o for o, _ in trained], self.leaves(), [g for _, g in trained])
        return [*(o.detach() for o in out), *gradients]


def inputs(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual: bool,
    parameters: str,
    *,
    weight_dtype: torch.dtype | None = None,
    offset: float = 0.5,
    trained: tuple[str, ...] = ("input", "weight", "bias"),
) -> Case:
    """Random arguments; with "input" the residual trains, too."""

    def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape) + mean).to(dtype).requires_grad_(name in trained)

    x = draw("input", shape, dtype, offset)
    weight, bias = (
        draw(name, shape[-1:], weight_dtype or dtype) if name in parameters else None
        for name in ("weight", "bias")
    )
    more = draw("input", shape, dtype) if residual else None
    upstream = tuple(torch.randn(shape).to(dtype) for _ in range(1 + residual))
    return Case(op, (x, weight, bias, more), upstream)


def in_float64(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0
) -> Tensor:
    """The formula, once more."""
    n = x.double()
    if op == "layer_norm":
        n = n - n.mean(-1, keepdim=True)
    n = n / ((n * n).mean(-1, keepdim=True) + eps).sqrt()
    n = n if weight is None else n * (weight.double() + weight_offset)
    return n if bias is None or op == "rms_norm" else n + bias.double()


def assert_agrees(op: str, case: Case, tolerance: float = 0.0, **options: Any) -> None:
    """Output, sum and gradients against float64, from the sum as it was rounded."""
    actual = case.results(**options)
    leaves = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in case.tensors
    ]
    x, weight, bias, residual = leaves
    total = x if residual is None else x + residual
    kept = total if residual is None else total + (actual[1].double() - total).detach()
    eps = 1e-5 if op == "layer_norm" else 1e-6
    out = [in_float64(op, kept, weight, bias, eps, options.get("weight_offset", 0.0)), total][
        : len(case.upstream)
    ]
    used = (x, weight, bias if op == "layer_norm" else None, residual)
    trained = [t for t in used if t is not None and t.requires_grad]
    pairs = [(o, g.double()) for o, g in zip(out, case.upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], trained, [g for _, g in pairs]) if pairs else ()
    expected = [*(o.detach() for o in out), *gradients]
    assert len(actual) == len(expected)
    for place, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        bound = tolerance or TOLERANCE[ours.dtype]
        # Gradients through a deviation near 0 are as large as what cancelled in them.
        largest = max(theirs.abs().max().item(), 1.0)
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).abs().max().item() / largest
        assert error <= bound, (place, error)
