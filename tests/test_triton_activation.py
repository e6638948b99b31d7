"""The Triton kernel of activations and gated units, in Triton's interpreter, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from activation_cases import ALONE, DTYPES, GATED, assert_close, exact, run

from superfine_kernels import swiglu
from superfine_kernels.activation import CODES
from superfine_kernels.triton.activation import BLOCK

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("uninitialized_memory_is_nan"),  # an element left out is seen
]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


# One element, and a second block of a single one.
@pytest.mark.parametrize("size", [1, BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CODES)
def test_agrees_with_the_formula_in_float64(function, dtype, size):
    x, u, g = (torch.randn(size).mul(2).to(dtype) for _ in range(3))
    value, slope = exact(function, x)
    wide_u, wide_g = u.double(), g.double()
    out, dx = run(ALONE[function], (x,), g, backend="triton")
    assert (out.dtype, dx.dtype) == (dtype, dtype)
    assert_close(out, value, x.double(), 8)
    assert_close(dx, wide_g * slope, wide_g, 12)
    out, dx, du = run(GATED[function], (x, u), g, backend="triton")
    assert_close(out, value * wide_u, x.double() * wide_u, 8)
    assert_close(dx, wide_g * wide_u * slope, wide_g * wide_u, 12)
    assert_close(du, wide_g * value, wide_g * x.double(), 8)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_halves_of_a_projection_and_gradients_that_nobody_needs(needs):
    # Rows of one block and a part of another, twice as far apart.
    whole, grad = torch.randn(3, 2 * (BLOCK + 60)), torch.randn(3, BLOCK + 60)
    halves = [x.requires_grad_(n) for x, n in zip(whole.chunk(2, -1), needs, strict=True)]
    trained = [x for x in halves if x.requires_grad]
    out, by_cpu = swiglu(*halves, backend="triton"), swiglu(*halves)
    torch.testing.assert_close(out, by_cpu)
    actual, expected = (torch.autograd.grad(y, trained, grad) for y in (out, by_cpu))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", CODES)
def test_infinities_and_nan_have_their_limits(function, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 1.5]).to(dtype)
    actual = run(ALONE[function], (x,), torch.ones_like(x), backend="triton")
    expected = run(ALONE[function], (x,), torch.ones_like(x))
    torch.testing.assert_close(actual, expected, equal_nan=True)
