"""layer_norm and rms_norm on a GPU, by Triton: against float64."""

from __future__ import annotations

import pytest
import torch
from layer_norm_cases import assert_agrees, inputs
from support import same_bits

from superfine_kernels import layer_norm

pytestmark = pytest.mark.gpu

OPS = ["layer_norm", "rms_norm"]


# Several rows in a program, a block that is not full, a row that is not aligned, the longest rows.
@pytest.mark.parametrize("shape", [(37, 64), (300, 768), (20, 1001), (9, 4096), (5, 8192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_float64(op, dtype, shape):
    if dtype == torch.float64 and shape[-1] > 4096:
        pytest.skip("goes to eager torch")
    case = inputs(op, shape, dtype, True, "weight bias").to("cuda")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.0)
    assert_agrees(op, case, tolerance=tolerance, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_frozen_parts(op):
    for trained in (("weight",), ("bias", "input"), ("input",), ("bias",)):
        case = inputs(op, (20, 48), torch.float32, True, "weight bias", trained=trained).to("cuda")
        assert_agrees(op, case, tolerance=1e-5)


def test_two_runs_give_the_same_bits():
    case = inputs("layer_norm", (5000, 768), torch.bfloat16, True, "weight bias").to("cuda")
    for a, b in zip(case.results(), case.results(), strict=True):
        assert same_bits(a, b)


def test_compiles_in_one_graph():
    x, w = (
        torch.randn(6, 50, device="cuda", requires_grad=True),
        torch.ones(50, device="cuda", requires_grad=True),
    )
    compiled = torch.compile(lambda x, w: layer_norm(x, w), fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x, w).square().sum(), (x, w)),
        torch.autograd.grad(layer_norm(x, w).square().sum(), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
