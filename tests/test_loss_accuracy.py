"""In low precision losses are as near to float64 as those of torch in it, but for one unit in the last place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superfine_kernels import cross_entropy, linear_cross_entropy

ROWS, CLASSES, FEATURES = 16, 3000, 64


def random(x: Tensor) -> Tensor:
    return x


def peaked(x: Tensor) -> Tensor:
    return x + 40 * F.one_hot(torch.arange(ROWS) * 7, CLASSES)


def uniform(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.25)


def masked(x: Tensor) -> Tensor:
    return torch.where(torch.arange(CLASSES) % 3 == 1, -math.inf, x)


def huge(x: Tensor) -> Tensor:
    return 2000 * x


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours in `dtype` at x."""
    info = torch.finfo(dtype)
    return torch.exp2(x.abs().clamp(min=info.tiny).log2().floor()) * info.eps


def loss_and_gradients(function, tensors: list[Tensor], target: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves, target, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logits", [random, peaked, uniform, masked, huge])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_and_gradient(dtype, logits, reduction):
    x = logits(torch.randn(ROWS, CLASSES, dtype=torch.float64)).to(dtype)
    target = torch.arange(ROWS) * 9  # none is masked
    exact = loss_and_gradients(F.cross_entropy, [x.double()], target, reduction=reduction)
    ours, theirs = (
        loss_and_gradients(function, [x], target, reduction=reduction)
        for function in (cross_entropy, F.cross_entropy)
    )
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert ((o.double() - e).abs() <= (t.double() - e).abs() + ulp(e, o.dtype)).all()


def through_logits(x: Tensor, w: Tensor, target: Tensor, **options) -> Tensor:
    return F.cross_entropy(x @ w.t(), target, **options)


@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_error_behind_a_linear_layer(dtype, spread):
    x = torch.randn(ROWS, FEATURES, dtype=torch.float64).to(dtype)
    w = (spread * torch.randn(CLASSES, FEATURES, dtype=torch.float64) / 8).to(dtype)
    target = torch.arange(ROWS) * 9
    exact = loss_and_gradients(through_logits, [x.double(), w.double()], target)
    theirs = loss_and_gradients(through_logits, [x, w], target)
    for tile_bytes in (1, 1 << 30):
        ours = loss_and_gradients(linear_cross_entropy, [x, w], target, tile_bytes=max(tile_bytes, 4 * ROWS))
        for o, t, e in zip(ours, theirs, exact, strict=True):
            error, allowed = ((found.double() - e).abs().max() for found in (o, t))
            assert error <= allowed + ulp(e.abs().max(), o.dtype)
