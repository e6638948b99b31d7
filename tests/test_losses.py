"""superfine.losses: torch's module and function in name, arguments, state and values."""

from __future__ import annotations

import copy
import inspect

import pytest
import superfine.losses
import torch
from superfine.losses import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    MSELoss,
    TopKKLDivLoss,
)
from support import same_bits
from torch import nn

import superfine_kernels

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 9, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"ignore_index": 3},
        {"weight": torch.linspace(0.1, 2, 9), "label_smoothing": 0.2, "ignore_index": 0},
    ],
    ids=str,
)
def test_equals_the_module_of_torch(options, shape):
    x = torch.randn(shape)
    t = torch.randint(0, 9, [n for d, n in enumerate(shape) if d != min(1, len(shape) - 1)])
    results = []
    for module in (CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)):
        leaf = x.clone().requires_grad_()
        loss = module(leaf, t)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_has_the_state_of_the_module_of_torch():
    weight = torch.rand(5)
    ours, theirs = CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    other = CrossEntropyLoss(torch.zeros(5))
    other.load_state_dict(theirs.state_dict())
    assert same_bits(other.weight, weight)
    theirs.load_state_dict(ours.state_dict())
    assert CrossEntropyLoss().state_dict() == {}


def test_is_a_module_of_torchs_kind():
    loss = CrossEntropyLoss(ignore_index=7, label_smoothing=0.3, reduction="sum", inplace=True)
    assert isinstance(loss, nn.CrossEntropyLoss)
    assert repr(loss) == "CrossEntropyLoss()"
    assert (loss.ignore_index, loss.label_smoothing, loss.reduction, loss.options["inplace"]) == (
        7,
        0.3,
        "sum",
        True,
    )
    clone = copy.deepcopy(loss)
    assert (clone.options["inplace"], clone.reduction) == (True, "sum")
    assert CrossEntropyLoss(torch.ones(5)).double().weight.dtype == torch.float64


def test_weights_of_another_dtype_than_the_logits():
    x, t, weight = torch.randn(4, 5), torch.tensor([0, 4, 2, 2]), torch.rand(5)
    expected = CrossEntropyLoss(weight)(x, t)
    assert same_bits(CrossEntropyLoss(weight.double())(x, t), expected)
    low = CrossEntropyLoss(weight)(x.bfloat16(), t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=1e-2, atol=1e-2)


def test_in_place_gives_the_same_gradient_in_the_memory_of_the_logits():
    x, t = torch.randn(4, 600), torch.randint(0, 600, (4,))
    gradients = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        output = leaf * 1
        memory = output.detach()
        CrossEntropyLoss(inplace=inplace)(output, t).backward()
        gradients.append(leaf.grad)
        assert same_bits(memory, leaf.grad if inplace else x)
    assert same_bits(*gradients)


def test_the_function_takes_the_arguments_of_torchs():
    assert superfine.losses.cross_entropy is superfine_kernels.cross_entropy
    ours = inspect.signature(superfine.losses.cross_entropy).parameters
    theirs = inspect.signature(nn.functional.cross_entropy).parameters
    for name, parameter in theirs.items():
        if name not in ("size_average", "reduce"):  # torch's own deprecated ones
            assert ours[name].default == parameter.default
    assert ours["inplace"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has none")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"weight": torch.linspace(0.1, 2, 9), "label_smoothing": 0.2, "ignore_index": 0},
    ],
    ids=str,
)
def test_the_linear_module_equals_the_one_of_torch_and_has_its_state(options, bias):
    ours = LinearCrossEntropyLoss(5, 9, bias=bias, **options)
    theirs = nn.LinearCrossEntropyLoss(5, 9, bias=bias, **options)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(4, 5), torch.randint(0, 9, (4,))
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        loss = module(leaf, target)
        loss.sum().backward()
        results.append([loss.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


def test_the_linear_module_takes_the_arguments_of_torch():
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has none")
    parameters = inspect.signature(LinearCrossEntropyLoss).parameters
    ours = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    theirs = inspect.signature(nn.LinearCrossEntropyLoss).parameters.keys()
    # K-dimensional layers, and options of torch's chunks, are not taken.
    assert theirs - ours == {"out_features", "options"}


def test_modules_pass_their_options_on():
    x, w, t = torch.randn(4, 5), torch.randn(9, 5), torch.tensor([1, -100, 8, 0])
    options = {"z_loss": 0.1, "softcap": 2.0, "scale": 0.5, "shift": True, "return_stats": True}
    logits = x @ w.t()
    found, expected = (
        CrossEntropyLoss(**options)(logits, t),
        superfine_kernels.cross_entropy(logits, t, **options),
    )
    assert same_bits(found[0], expected[0])
    module = LinearCrossEntropyLoss(5, 9, tile_bytes=1 << 16, skip_mass=0.1, **options)
    module.linear.weight.data.copy_(w)
    torch.testing.assert_close(module(x, t)[0], expected[0])
    target, probabilities = torch.randint(0, 9, (4, 2)), torch.rand(4, 2)
    divergence = superfine_kernels.topk_kl_div(
        logits, target, probabilities, temperature=2.0, reduction="sum"
    )
    assert same_bits(TopKKLDivLoss(2.0, reduction="sum")(logits, target, probabilities), divergence)
    items = {"probabilities": probabilities, "num_items": 3}
    expected = superfine_kernels.cross_entropy(logits, target, **items)
    assert same_bits(CrossEntropyLoss()(logits, target, **items), expected)
    for kind, arguments in ((CrossEntropyLoss, ()), (LinearCrossEntropyLoss, (5, 9))):
        with pytest.raises(
            TypeError, match=f"{kind.__name__}: argument is 'zloss'; expected one of z_loss, "
        ):
            kind(*arguments, zloss=1.0)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 3, 9)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()),
        (BCEWithLogitsLoss(reduction="none"), nn.BCEWithLogitsLoss(reduction="none")),
        (
            BCEWithLogitsLoss(torch.linspace(0.1, 2, 9), "sum", torch.full((9,), 3.0)),
            nn.BCEWithLogitsLoss(
                torch.linspace(0.1, 2, 9), reduction="sum", pos_weight=torch.full((9,), 3.0)
            ),
        ),
        (MSELoss(), nn.MSELoss()),
        (MSELoss("sum"), nn.MSELoss(reduction="sum")),
        (MSELoss("none"), nn.MSELoss(reduction="none")),
    ],
    ids=str,
)
def test_an_elementwise_module_equals_the_one_of_torch_and_has_its_state(ours, theirs, shape):
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(shape), torch.rand(shape)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        loss = module(leaf, target)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("module", [BCEWithLogitsLoss, MSELoss])
def test_an_elementwise_module_works_in_place_on_request(module):
    x, t = torch.randn(4, 600), torch.rand(4, 600)
    leaf = x.clone().requires_grad_()
    output = leaf * 1
    memory = output.detach()
    module(inplace=True)(output, t).backward()
    assert same_bits(memory, leaf.grad)
    assert copy.deepcopy(module(inplace=True)).inplace


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (superfine.losses.bce_with_logits, nn.functional.binary_cross_entropy_with_logits),
        (superfine.losses.mse, nn.functional.mse_loss),
        (BCEWithLogitsLoss, nn.BCEWithLogitsLoss),
        (MSELoss, nn.MSELoss),
    ],
)
def test_elementwise_losses_take_the_arguments_of_torchs_in_their_order(ours, theirs):
    deprecated = ("size_average", "reduce")
    mine, torchs = (inspect.signature(f).parameters for f in (ours, theirs))
    known = [name for name, p in mine.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    expected = [name for name in torchs if name not in deprecated]
    assert known == expected
    assert {name: mine[name].default for name in expected} == {n: torchs[n].default for n in expected}
