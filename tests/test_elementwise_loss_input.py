"""bce_with_logits and mse at their boundary: what is refused and how, and other ways in."""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import LOGIT_DTYPES, elementwise_in_float64, elementwise_inputs, elementwise_loss
from support import one_warning, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import superfine_kernels
from superfine_kernels import _cpu, bce_with_logits, mse
from superfine_kernels.elementwise_loss import cost, reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

LOSSES = ["bce_with_logits", "mse"]

BAD = {
    "input type": ({"input": [1.0]}, TypeError, "input is [1.0] (list); expected a torch.Tensor"),
    "input dtype": (
        {"input": torch.zeros(2, 5).long()},
        TypeError,
        "input is int64 (2, 5) on cpu; expected float32, bfloat16, float16 or float64",
    ),
    "target type": ({"target": 1}, TypeError, "target is 1 (int); expected a torch.Tensor"),
    "target dtype": (
        {"target": torch.zeros(2, 5, dtype=torch.complex64)},
        TypeError,
        "target is complex64 (2, 5) on cpu; expected real numbers",
    ),
    "target shape": (
        {"target": torch.zeros(2, 4)},
        ValueError,
        "target is float32 (2, 4) on cpu; expected shape (2, 5)",
    ),
    "target device": (
        {"target": torch.zeros(2, 5, device="meta")},
        ValueError,
        "target is float32 (2, 5) on meta; expected a tensor on cpu",
    ),
    "weight type": ({"weight": 2.0}, TypeError, "weight is 2.0 (float); expected a torch.Tensor"),
    "weight dtype": (
        {"weight": torch.ones(5).long()},
        TypeError,
        "weight is int64 (5,) on cpu; expected a floating-point tensor",
    ),
    "weight shape": (
        {"weight": torch.ones(4)},
        ValueError,
        "weight is float32 (4,) on cpu; expected a shape that broadcasts to (2, 5)",
    ),
    "weight dimensions": (
        {"weight": torch.ones(1, 2, 5)},
        ValueError,
        "weight is float32 (1, 2, 5) on cpu; expected a shape that broadcasts to (2, 5)",
    ),
    "weight device": ({"weight": torch.ones(5, device="meta")}, ValueError, "weight is float32 (5,) on meta"),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction is 'avg' (str); expected 'none', 'mean' or 'sum'",
    ),
    "num_items": (
        {"num_items": 0},
        ValueError,
        "num_items is 0 (int); expected a finite number above 0",
    ),
    "num_items nan": ({"num_items": math.nan}, ValueError, "num_items is nan (float)"),
    "num_items beside a sum": (
        {"num_items": 4, "reduction": "sum"},
        ValueError,
        "num_items is 4 (int); expected None beside a reduction that is not 'mean'",
    ),
    "num_items twice": ({"num_items": torch.ones(2)}, ValueError, "num_items is float32 (2,) on cpu"),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        "backend is 'gpu'; expected one that is usable here",
    ),
    "isa": ({"backend": "cpu:mmx"}, ValueError, "backend is 'cpu:mmx'"),
    "cuda": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
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
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_arguments_are_refused(loss, name):
    change, error, message = BAD[name]
    good = {"input": torch.zeros(2, 5), "target": torch.zeros(2, 5)}
    with pytest.raises(error) as caught:
        elementwise_loss(loss, **{**good, **change})
    assert str(caught.value).startswith(f"{loss}: ")
    assert message in str(caught.value)


def test_bad_weights_of_positive_labels_are_refused():
    with pytest.raises(
        ValueError, match=r"bce_with_logits: pos_weight is float32 \(2, 1, 1\) on cpu; expected a"
    ):
        bce_with_logits(torch.zeros(2, 5), torch.zeros(2, 5), pos_weight=torch.ones(2, 1, 1))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_that_require_grad_are_refused_by_bce_as_by_torch(name):
    weights = {name: torch.ones(5, requires_grad=True)}
    with pytest.raises(ValueError, match=f"bce_with_logits: {name} is .*expected constant weights"):
        bce_with_logits(torch.zeros(2, 5), torch.zeros(2, 5), **weights)


def test_what_shares_memory_with_an_input_to_be_overwritten_is_refused():
    x = torch.zeros(3, 8, requires_grad=True) * 1
    before, version = x.detach().clone(), x._version
    for name in ("target", "weight"):
        arguments = {"target": torch.zeros(2, 8), name: x.detach()[1:]}
        with pytest.raises(ValueError, match=f"mse: {name} is 'a tensor in the memory of input'"):
            mse(x[:2], **arguments, inplace=True)
    assert same_bits(x.detach(), before)
    assert x._version == version


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_that_differ_are_broadcast_by_mse_with_a_warning(reduction):
    x, t = torch.randn(6, 1, requires_grad=True), torch.randn(5)
    with one_warning(r"mse: target has shape (5,) and input (6, 1): both are broadcast"):
        loss = mse(x, t, reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.nn.functional.mse_loss(x, t, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    with pytest.raises(ValueError, match=r"target is float32 \(5,\) on cpu; expected shape \(6, 4\)"):
        mse(torch.zeros(6, 4), t)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_backend_agrees_with_the_kernel(loss):
    x, t = elementwise_inputs((4, 90), torch.bfloat16)
    weight, pos_weight = torch.rand(4, 1), torch.rand(90) if loss == "bce_with_logits" else None
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
        by_kernel = elementwise_loss(loss, x, t, **options)
        torch.testing.assert_close(by_kernel, elementwise_loss(loss, x, t, **options, backend="reference"))
    assert reference(loss, x, t).dtype == torch.float32
    expected = elementwise_loss(loss, x, t, num_items=7)
    torch.testing.assert_close(reference(loss, x, t, num_items=7), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_results_stay_on_their_device_whatever_the_default(loss):
    x, t = elementwise_inputs((4, 9), torch.float32)
    x.requires_grad_()
    weight = torch.rand(4, 1)
    with torch.device("meta"):
        for reduction in ("mean", "sum", "none"):
            value = elementwise_loss(loss, x, t, weight=weight, reduction=reduction)
            assert value.device.type == "cpu"
            (gradient,) = torch.autograd.grad(value.sum(), x)
            assert gradient.device.type == "cpu"


@pytest.mark.parametrize("loss", LOSSES)
def test_tensors_elsewhere_go_to_torch_with_one_warning(loss):
    with one_warning(f"{loss}: there is no kernel for tensors on meta"):
        value = elementwise_loss(loss, torch.zeros(3, device="meta"), torch.zeros(3, device="meta"))
    assert value.device.type == "meta"


@pytest.mark.parametrize("loss", LOSSES)
def test_fake_tensors_give_shapes_and_dtypes(loss):
    with FakeTensorMode():
        for dtype in LOGIT_DTYPES:
            x = torch.empty(4, 9, dtype=dtype, requires_grad=True)
            for reduction, shape in (("mean", ()), ("none", (4, 9))):
                value = elementwise_loss(
                    loss, x, torch.zeros(4, 9), weight=torch.ones(9), reduction=reduction
                )
                expected = torch.float64 if dtype == torch.float64 else torch.float32
                assert (value.shape, value.dtype) == (shape, expected)
                (gradient,) = torch.autograd.grad(value.sum(), x)
                assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_cost_is_one_read_of_input_and_target_and_one_write(dtype, itemsize):
    assert cost(1000, dtype).bytes == 3 * 1000 * itemsize
    assert cost(1000, dtype, backward=False).bytes == 2 * 1000 * itemsize
    assert cost(1000, dtype, torch.float32).bytes == 1000 * (2 * itemsize + 4)
    assert cost(1000, dtype, loss="mse").flops == 4000


@pytest.mark.parametrize(("weight", "pos_weight"), [((), (7,)), ((300, 1), (300, 7)), ((7,), (1,))], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_gpu_takes_large_tensors_in_parts(monkeypatch, reduction, weight, pos_weight):
    # With the CPU's kernel in place of CUDA's, and 500 elements in place of 2^30.
    calls = []

    def elementwise_loss_of_a_gpu(out, sums, stream, device, **arguments):
        calls.append(arguments["count"])
        total = _cpu.elementwise_loss(**arguments, sum=True, threads=1, isa="")
        if out:
            ctypes.c_float.from_address(out).value = total / arguments["denominator"]

    module = SimpleNamespace(
        MOST_ELEMENTS=500, ELEMENTS_PER_SUM=64, elementwise_loss=elementwise_loss_of_a_gpu
    )
    monkeypatch.setitem(sys.modules, "superfine_kernels._cuda", module)
    monkeypatch.setattr(superfine_kernels, "_cuda", module, raising=False)
    op = importlib.import_module("superfine_kernels.elementwise_loss")
    monkeypatch.setattr(op._backends, "choose", lambda *_: "cuda")
    monkeypatch.setattr(op, "cuda_place", lambda _: {"stream": 0, "device": 0})
    x, t = elementwise_inputs((300, 7), torch.float16)
    options = {"weight": torch.rand(weight), "pos_weight": torch.rand(pos_weight), "reduction": reduction}
    leaf = x.clone().requires_grad_()
    value = bce_with_logits(leaf, t, **options)
    upstream = torch.rand(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    expected, expected_gradient = elementwise_in_float64(
        "bce_with_logits", x, t, upstream=upstream, **options
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-3, atol=1e-5)
    assert len(calls) == 2 * 5
    assert sum(calls) == 2 * x.numel()
