"""What the tests of activations share, on the CPU, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from superfine_kernels import geglu, gelu, silu, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPSILON = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}

ALONE = {"gelu": gelu, "gelu_tanh": lambda x, **o: gelu(x, "tanh", **o), "silu": silu}
GATED = {"gelu": geglu, "gelu_tanh": lambda g, u, **o: geglu(g, u, "tanh", **o), "silu": swiglu}


def exact(function: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) in float64, by formulas that lose no digits where x < 0."""
    x = x.double()
    if function == "gelu":
        phi = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        return x * phi, phi + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    c = 2 * math.sqrt(2 / math.pi)
    z, dz = (x, 1.0) if function == "silu" else (c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x * x))
    s = torch.sigmoid(z)
    return x * s, s + x * s * torch.sigmoid(-z) * dz


def run(call, inputs: tuple[Tensor, ...], grad: Tensor, **options) -> list[Tensor]:
    """The result and the gradients of leaves of their own."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor, rounding: float) -> None:
    """Within one rounding to the dtype, and `rounding` units of 2^-24 (2^-53) of `scale` from the computation."""
    epsilon = 2.0**-53 if actual.dtype == torch.float64 else 2.0**-24
    bound = EPSILON[actual.dtype] * expected.abs() + rounding * epsilon * scale.abs()
    bound += 2.0**-24 if actual.dtype == torch.float16 else 0  # its smallest number
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()
