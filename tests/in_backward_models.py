"""Small losses, and what is asked of a model and its optimizer, for the tests of gradient release."""

from __future__ import annotations

import copy
import math

import torch
from small_models import mlp
from superfine.optim import LAMB, Adam, AdamW
from support import same_bits

OPTIMIZERS = [AdamW, Adam, LAMB]


def inputs(seed, dtype=torch.float32, rows=2):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(model, seed, scale=1.0):
    x = inputs(seed, next(model.parameters()).dtype)
    return scale * model(x).float().square().mean()


def twins(dtype=torch.float32):
    model = mlp().to(dtype)
    return model, copy.deepcopy(model)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def counts(optimizer):
    return [
        int(optimizer.state[param]["step"]) for group in optimizer.param_groups for param in group["params"]
    ]


def assert_same(model, other, optimizer=None, reference=None):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        if optimizer is not None:
            a, b = optimizer.state[p], reference.state[q]
            assert a.keys() == b.keys()
            assert all(same_bits(a[name], b[name]) for name in a)


def poisoned(model, bad=math.nan):
    """A loss after which only the first layer's gradients are not finite."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, bad)

    return model[1:](Poison.apply(model[0](inputs(0)))).square().mean()


def failing(model):
    """A loss whose backward fails once the last layer has been stepped."""

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    return model[4](Fail.apply(model[:4](inputs(0)))).sum()
