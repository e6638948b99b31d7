"""cross_entropy at its boundary: what is refused and how, and the inputs that take another way than the kernel's."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import LOGIT_DTYPES, class_weights, labels, logits
from support import same_bits
from test_cross_entropy import run
from torch._subclasses.fake_tensor import FakeTensorMode

from superfine_kernels import cross_entropy
from superfine_kernels.cross_entropy import REDUCTIONS, cost, reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


# --- bad input --------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1, -(2**31), 2**40])
def test_a_label_out_of_range_is_named_and_nothing_is_written(bad, dtype, inplace):
    if dtype == torch.int32 and bad == 2**40:
        pytest.skip("no int32")
    leaf = logits(4, 9, torch.float32).requires_grad_()
    x = leaf * 1
    before, version = x.detach().clone(), x._version
    t = torch.tensor([0, -100, bad, 3], dtype=dtype)
    with pytest.raises(ValueError) as error:
        cross_entropy(x, t, inplace=inplace)
    message = f"cross_entropy: target[2] is {bad}; expected a class in [0, 9) or ignore_index (-100)"
    assert str(error.value) == message
    assert torch.equal(x, before)
    assert x._version == version or not inplace


def test_the_position_of_a_bad_label_counts_rows_as_they_are_flattened():
    t = torch.zeros(2, 3, dtype=torch.int64)
    t[1, 1] = 7
    with pytest.raises(ValueError, match=r"target\[4\] is 7; expected a class in \[0, 5\)"):
        cross_entropy(torch.zeros(2, 5, 3), t)


BAD = {
    "input type": ({"input": [1.0]}, TypeError, "input is [1.0] (list); expected a torch.Tensor"),
    "input dtype": (
        {"input": torch.zeros(2, 5).long()},
        TypeError,
        "input is int64 (2, 5) on cpu; expected float32, bfloat16, float16 or float64",
    ),
    "input scalar": (
        {"input": torch.tensor(1.0)},
        ValueError,
        "input is float32 () on cpu; expected (C), (N, C)",
    ),
    "no class": (
        {"input": torch.zeros(2, 0)},
        ValueError,
        "input is float32 (2, 0) on cpu; expected at least one class",
    ),
    "target type": ({"target": 1}, TypeError, "target is 1 (int); expected a torch.Tensor"),
    "target dtype": (
        {"target": torch.zeros(2, dtype=torch.int16)},
        TypeError,
        "target is int16 (2,) on cpu; expected int64 or int32 classes",
    ),
    "target shape": (
        {"target": torch.zeros(3).long()},
        ValueError,
        "target is int64 (3,) on cpu; expected classes of shape (2,)",
    ),
    "probabilities": (
        {"target": torch.zeros(2)},
        ValueError,
        "target is float32 (2,) on cpu; expected classes of shape (2,), or probabilities (2, 5)",
    ),
    "target device": (
        {"target": torch.zeros(2, device="meta").long()},
        ValueError,
        "target is int64 (2,) on meta; expected a tensor on cpu",
    ),
    "weight type": ({"weight": [1.0] * 5}, TypeError, "expected a torch.Tensor"),
    "weight dtype": (
        {"weight": torch.ones(5).long()},
        TypeError,
        "weight is int64 (5,) on cpu; expected a floating-point tensor",
    ),
    "weight shape": (
        {"weight": torch.ones(4)},
        ValueError,
        "weight is float32 (4,) on cpu; expected shape (5,), one weight a class",
    ),
    "weight device": ({"weight": torch.ones(5, device="meta")}, ValueError, "weight is float32 (5,) on meta"),
    "weight grad": ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "expected constant weights"),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction is 'avg' (str); expected 'none', 'mean' or 'sum'",
    ),
    "smoothing": (
        {"label_smoothing": 1.1},
        ValueError,
        "label_smoothing is 1.1 (float); expected a number in [0, 1]",
    ),
    "smoothing nan": ({"label_smoothing": math.nan}, ValueError, "label_smoothing is nan (float)"),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        "cross_entropy: backend is 'gpu'; expected one that is usable here",
    ),
    "isa": ({"backend": "cpu:mmx"}, ValueError, "cross_entropy: backend is 'cpu:mmx'"),
    "cuda": ({"backend": "cuda"}, ValueError, "cross_entropy: backend is 'cuda'"),
    "inplace none": (
        {"inplace": True, "reduction": "none"},
        ValueError,
        "reduction is 'none' (str); expected 'mean' or 'sum' with inplace=True",
    ),
    "inplace leaf": (
        {"inplace": True, "input": torch.zeros(2, 5, requires_grad=True)},
        ValueError,
        "leaf that requires grad",
    ),
    "inplace expanded": (
        {"inplace": True, "input": torch.zeros(1, 5, requires_grad=True).expand(2, 5)},
        ValueError,
        "memory of its own for every element",
    ),
    "inplace overlapping": (
        {"inplace": True, "input": torch.zeros(7, requires_grad=True).as_strided((2, 5), (2, 1))},
        ValueError,
        "memory of its own for every element",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    change, error, message = BAD[name]
    good = {"input": torch.zeros(2, 5), "target": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error) as caught:
        cross_entropy(**{**good, **change})
    assert str(caught.value).startswith("cross_entropy: ")
    assert message in str(caught.value)


# --- other ways in --------------------


def test_the_reference_backend_agrees_with_the_kernel():
    x, t, weight = logits(4, 90, torch.bfloat16), labels(4, 90).int(), class_weights(90, torch.bfloat16)
    for options in ({"reduction": "none"}, {"label_smoothing": 0.1}):
        by_kernel, by_torch = run(x, t, weight, **options), run(x, t, weight, **options, backend="reference")
        torch.testing.assert_close(by_kernel, by_torch, rtol=5e-3, atol=1e-3)
    assert reference(x, t).dtype == torch.float32


def test_without_gradient_only_the_loss_is_computed():
    x, t = logits(4, 90, torch.float32), labels(4, 90)
    expected, _ = run(x, t)
    assert same_bits(cross_entropy(x, t), expected)
    with torch.no_grad():
        loss = cross_entropy(x.clone().requires_grad_(), t)
    assert not loss.requires_grad
    assert same_bits(loss, expected)


def test_loss_and_logits_stay_on_their_device_whatever_the_default():
    x, t = logits(4, 9, torch.float32).requires_grad_(), labels(4, 9)
    with torch.device("meta"):
        for reduction in REDUCTIONS:
            loss = cross_entropy(x, t, reduction=reduction)
            assert loss.device.type == "cpu"
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert gradient.device.type == "cpu"


def test_fake_tensors_give_shapes_and_dtypes():
    with FakeTensorMode():
        for dtype in LOGIT_DTYPES:
            x = torch.empty(4, 9, dtype=dtype, requires_grad=True)
            for reduction, shape in (("mean", ()), ("none", (4,))):
                loss = cross_entropy(x, torch.zeros(4, dtype=torch.int64), reduction=reduction)
                assert (loss.shape, loss.dtype) == (
                    shape,
                    torch.float64 if dtype == torch.float64 else torch.float32,
                )
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_cost_is_one_read_and_one_write(dtype, itemsize):
    assert cost(1024, 30522, dtype).bytes == 2 * 1024 * 30522 * itemsize
    assert cost(1024, 30522, dtype, backward=False).bytes == 1024 * 30522 * itemsize
    assert cost(10, 10, dtype).flops == 700
