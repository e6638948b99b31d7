"""The Triton kernel of bce_with_logits and mse, in Triton's interpreter, against eager torch in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    elementwise_in_float64,
    elementwise_inputs,
    elementwise_loss,
)
from torch import Tensor

from superfine_kernels.triton.elementwise_loss import BLOCK

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
]

LOSSES = ["bce_with_logits", "mse"]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def run(loss: str, x: Tensor, t: Tensor, upstream: Tensor | None = None, inplace=False, **options):
    """Loss and gradient of `x`; what torch.empty gives is NaN, so an element left out is seen."""
    leaf = x.detach().clone().requires_grad_()
    output = leaf * 1 if inplace else leaf
    value = elementwise_loss(loss, output, t, inplace=inplace, backend="triton", **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), leaf.grad


def assert_agrees(loss, x, t, upstream=None, inplace=False, **options):
    value, gradient = run(loss, x, t, upstream, inplace, **options)
    expected, expected_gradient = elementwise_in_float64(loss, x, t, upstream=upstream, **options)
    tolerance = LOSS_TOLERANCE[x.dtype]
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    tolerance = GRADIENT_TOLERANCE[x.dtype]
    assert gradient.dtype == x.dtype
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=2 * tolerance, atol=tolerance
    )  # twice: before and after the upstream gradient


# One element, a tail, exactly one block, a second one of a single element.
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("size", [1, 33, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_torch_in_float64(loss, dtype, reduction, size):
    x, t = elementwise_inputs((size,), dtype)
    upstream = torch.linspace(-1, 1, size) if reduction == "none" else torch.tensor(0.5)
    assert_agrees(loss, x, t, upstream, reduction=reduction)


# One a class, one a row in runs below and above a block, one a channel, whole, and one for all.
@pytest.mark.parametrize(
    ("shape", "weight", "pos_weight"),
    [
        ((30, 70), (70,), (30, 1)),
        ((3, BLOCK + 5), (3, 1), (BLOCK + 5,)),
        ((4, 3, 25, 9), (3, 1, 1), (4, 3, 25, 9)),
        ((30, 70), (), (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_broadcast_as_in_torch(loss, reduction, shape, weight, pos_weight):
    x, t = elementwise_inputs(shape, torch.float32)
    w, p = torch.rand(weight) + 0.1, (3 * torch.rand(pos_weight) if loss == "bce_with_logits" else None)
    assert_agrees(loss, x, t, weight=w, pos_weight=p, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_in_place(loss, dtype):
    x, t = elementwise_inputs((BLOCK + 100,), dtype)
    assert_agrees(loss, x, t, inplace=True)


def test_float32_targets_beside_bfloat16():
    x, t = torch.zeros(10, dtype=torch.bfloat16), torch.full((10,), 1 + 2**-12)
    assert elementwise_loss("mse", x, t, backend="triton") == (1 + 2**-12) ** 2


def test_small_losses_keep_their_digits():
    x = torch.linspace(-60, 60, 2001)
    for label in (0.0, 1.0):
        sign = 2 * label - 1
        value, gradient = run("bce_with_logits", x, torch.full_like(x, label), reduction="none")
        wide = x.double()
        exact = torch.where(sign * wide > 0, 0, -sign * wide) + (-wide.abs()).exp().log1p()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-37)
        torch.testing.assert_close(
            gradient.double(), -sign * torch.sigmoid(-sign * wide), rtol=1e-6, atol=1e-37
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_and_nan_spoil_no_neighbour(dtype):
    pairs = list(itertools.product([math.inf, -math.inf, math.nan, 1.5], [0.0, 1.0, 0.25, math.nan]))
    x, t = (torch.tensor(v).to(dtype) for v in zip(*pairs, strict=True))
    value, gradient = run("bce_with_logits", x, t, reduction="none")
    by_cpu = elementwise_loss("bce_with_logits", x, t, reduction="none")
    torch.testing.assert_close(value, by_cpu, equal_nan=True)
    _, expected = elementwise_in_float64("bce_with_logits", x, t, reduction="none")
    torch.testing.assert_close(gradient.double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
