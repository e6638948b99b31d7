"""lamb_ at its boundary: bad lists are refused before anything is written, and torch around the op notices it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LambCase
from support import assert_same_bits_in_lists, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from superfine_kernels import lamb_

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

HYPER = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True,
    "grad_averaging": True, "adapt": True, "trust_clip": False, "gradient_scale": 1.0,
}  # fmt: skip


def _replace(name: str, tensor: Tensor):
    return lambda case: getattr(case, name).__setitem__(1, tensor)


BAD_LISTS = {
    "grads short": (lambda c: c.grads.pop(), "lamb_: grads has 1 tensors; expected 2, one for each of params"),
    "steps short": (lambda c: c.steps.pop(), "lamb_: steps has 1 tensors; expected 2"),
    "params short": (lambda c: c.params.pop(), "lamb_: grads has 2 tensors; expected 1"),
    "grad dtype": (
        _replace("grads", torch.zeros(20).bfloat16()),
        "lamb_: grads[1] is bfloat16 (20,) on cpu; expected float32 (20,) on cpu",
    ),
    "exp_avg shape": (_replace("exp_avgs", torch.zeros(4, 5)), "lamb_: exp_avgs[1] is float32 (4, 5) on cpu"),
    "exp_avg_sq dtype": (_replace("exp_avg_sqs", torch.zeros(20).double()), "exp_avg_sqs[1] is float64 (20,)"),
    "step dtype": (_replace("steps", torch.tensor(3)), "steps[1] is int64 () on cpu; expected float32 () on cpu"),
    "grad device": (_replace("grads", torch.zeros(20, device="meta")), "grads[1] is float32 (20,) on meta"),
    "state is param": (lambda c: c.exp_avgs.__setitem__(1, c.params[1]), "lamb_: params and optimizer state overlap"),
    "param twice": (lambda c: c.params.__setitem__(1, c.params[0][:20]), "overlap in memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused_before_anything_is_written(name):
    spoil, message = BAD_LISTS[name]
    case = LambCase.random([24, 20])
    spoil(case)
    tensors = [t for ts in case.lists() for t in ts if t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError) as error:
        lamb_(*case.lists(), **HYPER)
    assert message in str(error.value)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1e-9}, ValueError, "lamb_: lr is -1e-09 (float); expected a finite number >= 0"),
        ({"lr": float("nan")}, ValueError, "lamb_: lr is nan (float)"),
        ({"beta1": 1.0}, ValueError, "lamb_: beta1 is 1.0 (float); expected a number in [0, 1)"),
        ({"beta2": -0.1}, ValueError, "lamb_: beta2 is -0.1 (float); expected a number in [0, 1)"),
        ({"eps": -1.0}, ValueError, "lamb_: eps is -1.0 (float); expected a number >= 0"),
        ({"weight_decay": float("nan")}, ValueError, "lamb_: weight_decay is nan (float); expected a number >= 0"),
        ({"gradient_scale": "1"}, TypeError, "lamb_: gradient_scale is '1' (str); expected a number"),
        ({"backend": "sse"}, ValueError, "lamb_: backend is 'sse'"),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_refused(change, error, message):
    case = LambCase.random([5])
    before = case.to("cpu")
    with pytest.raises(error) as raised:
        lamb_(*case.lists(), **{**HYPER, **change})
    assert message in str(raised.value)
    assert_same_bits_in_lists(case.lists(), before.lists())


def test_integer_parameters_and_sparse_gradients_are_refused():
    ones = [[torch.ones(3, dtype=torch.int64)] for _ in range(4)]
    with pytest.raises((ValueError, TypeError), match=r"lamb_: params\[0\] is int64 \(3,\) on cpu; expected"):
        lamb_(*ones, [torch.zeros(())], **HYPER)
    case = LambCase.random([3])
    before = case.params[0].clone()
    with pytest.raises((ValueError, TypeError), match=r"lamb_: grads\[0\].*sparse"):
        lamb_(case.params, [case.grads[0].to_sparse()], *case.lists()[2:], **HYPER)
    assert torch.equal(case.params[0], before)


def test_no_parameters_is_a_step_of_nothing():
    lamb_([], [], [], [], [], **HYPER)
    with FakeTensorMode():  # through the dispatcher
        lamb_([], [], [], [], [], **HYPER)


def test_autograd_notices_the_step():
    case = LambCase.random([5])
    weight = case.params[0].requires_grad_()
    product = weight * weight  # keeps the weight for its backward
    lamb_(*case.lists(), **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_passes_opcheck():
    case = LambCase.random([3, 17])
    hyper = {**HYPER, "zero_grads": True, "stochastic_rounding": True, "seed": 3}
    torch.library.opcheck(torch.ops.superfine.lamb_.default, case.all_lists(), hyper)


def test_fake_tensors_are_taken_and_nothing_is_computed():
    with FakeTensorMode():
        lists = [[torch.empty(5)] for _ in range(4)]
        lamb_(*lists, [torch.empty(())], **HYPER)
    assert lists[0][0].shape == (5,)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_compiles_into_a_graph():
    def step(*lists: list[Tensor]) -> Tensor:
        lamb_(*lists, **HYPER)
        return lists[0][0] * 2

    case = LambCase.random([17, 33])
    expected = case.to("cpu")
    doubled = torch.compile(step, fullgraph=True)(*case.lists())
    lamb_(*expected.lists(), **HYPER)
    assert_same_bits_in_lists(case.lists(), expected.lists())
    assert same_bits(doubled, expected.params[0] * 2)
