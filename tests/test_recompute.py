import pytest
import torch
from superfine._recompute import origin, recomputed, remember
from torch import nn


def test_recomputed_runs_once_more_and_only_in_backward():
    layer, calls = nn.Linear(3, 3).double(), []
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(layer(x))

    output = recomputed(function, x, list(layer.parameters()))
    assert calls == [False]
    output.square().sum().backward()
    assert calls == [False, True]
    wanted = torch.autograd.grad(torch.tanh(layer(x)).square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], list(wanted))


def test_recomputed_has_second_derivatives():
    layer = nn.Linear(3, 2).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        y = torch.sin(x)
        remember(y, torch.sin, (x,))
        return recomputed(lambda y: torch.tanh(layer(y)), y, parameters)

    assert torch.autograd.gradgradcheck(function, (x, *layer.parameters()))


def test_a_parameter_that_changed_before_backward_is_noticed():
    layer = nn.Linear(3, 3)
    output = recomputed(layer, torch.randn(2, 3), list(layer.parameters()))
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_origin_ends_with_its_tensor_and_with_writing():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    remember(y, torch.mul, (x, x))
    assert origin(y).tensors == (x, x)
    y += 1
    assert origin(y) is None
    assert origin(x) is None
