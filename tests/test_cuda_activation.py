"""Activations and gated units on a GPU, by Triton: against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from activation_cases import ALONE, DTYPES, GATED, assert_close, exact, run

from superfine_kernels import _backends, swiglu
from superfine_kernels.activation import CODES

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_triton():
    if reason := _backends.why_unavailable("triton"):
        pytest.skip(reason)


# One element, a block of 1024 and a part of another, many blocks.
@pytest.mark.parametrize("size", [1, 1029, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CODES)
def test_agrees_with_the_formula_in_float64(function, dtype, size):
    x, u, g = (torch.randn(size).mul(2).to(dtype) for _ in range(3))
    value, slope = exact(function, x)
    wide_u, wide_g = u.double(), g.double()
    on_gpu = [t.cuda() for t in (x, u, g)]
    out, dx, du = (t.cpu() for t in run(GATED[function], tuple(on_gpu[:2]), on_gpu[2]))
    assert_close(out, value * wide_u, x.double() * wide_u, 12)
    assert_close(dx, wide_g * wide_u * slope, wide_g * wide_u, 16)
    assert_close(du, wide_g * value, wide_g * x.double(), 12)
    out, dx = (t.cpu() for t in run(ALONE[function], (on_gpu[0],), on_gpu[2]))
    assert_close(out, value, x.double(), 12)
    assert_close(dx, wide_g * slope, wide_g, 16)


def test_halves_of_a_projection():
    whole, grad = torch.randn(30, 2400), torch.randn(30, 1200)
    expected = run(swiglu, whole.chunk(2, -1), grad)
    halves = [x.requires_grad_() for x in whole.cuda().chunk(2, -1)]
    out = swiglu(*halves)
    actual = [out.detach(), *torch.autograd.grad(out, halves, grad.cuda())]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", CODES)
def test_infinities_and_nan_have_their_limits(function):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30])
    expected = run(ALONE[function], (x,), torch.ones_like(x))
    actual = [t.cpu() for t in run(ALONE[function], (x.cuda(),), torch.ones_like(x).cuda())]
    torch.testing.assert_close(actual, expected, equal_nan=True)
