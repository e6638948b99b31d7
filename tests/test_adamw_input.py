"""adamw_ at its boundary: bad lists are refused before anything is written, and torch around the op notices it."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_cases import ADAMW_DTYPES, AdamWCase
from support import assert_same_bits_in_lists, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from superfine_kernels import _cpu, adamw_

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
NATIVE = {name: value for name, value in HYPER.items() if name != "maximize"} | {
    "decoupled": True, "gradient_scale": 1.0, "zero_grads": False, "stochastic_rounding": False, "seed": 0,
}  # fmt: skip


# --- bad input --------------------


def _replace(name: str, tensor: Tensor):
    return lambda case: getattr(case, name).__setitem__(1, tensor)


BAD_LISTS = {
    "grads short": (lambda c: c.grads.pop(), "adamw_: grads has 1 tensors; expected 2, one for each of params"),
    "exp_avgs short": (lambda c: c.exp_avgs.pop(), "exp_avgs has 1 tensors; expected 2"),
    "exp_avg_sqs short": (lambda c: c.exp_avg_sqs.pop(), "exp_avg_sqs has 1 tensors; expected 2"),
    "max_exp_avg_sqs short": (lambda c: c.max_exp_avg_sqs.pop(), "max_exp_avg_sqs has 1 tensors; expected 2"),
    "steps short": (lambda c: c.steps.pop(), "steps has 1 tensors; expected 2"),
    "params short": (lambda c: c.params.pop(), "grads has 2 tensors; expected 1"),
    "grad dtype": (
        _replace("grads", torch.zeros(4, 5).bfloat16()),
        "adamw_: grads[1] is bfloat16 (4, 5) on cpu; expected float32 (4, 5) on cpu",
    ),
    "exp_avg dtype": (
        _replace("exp_avgs", torch.zeros(4, 5).half()),
        "adamw_: exp_avgs[1] is float16 (4, 5) on cpu; expected float32 (4, 5) on cpu",
    ),
    "exp_avg shape": (
        _replace("exp_avgs", torch.zeros(20)),
        "adamw_: exp_avgs[1] is float32 (20,) on cpu; expected float32 (4, 5) on cpu",
    ),
    "exp_avg_sq dtype": (_replace("exp_avg_sqs", torch.zeros(4, 5).double()), "exp_avg_sqs[1] is float64 (4, 5)"),
    "max dtype": (_replace("max_exp_avg_sqs", torch.zeros(4, 5).half()), "max_exp_avg_sqs[1] is float16 (4, 5)"),
    "step dtype": (_replace("steps", torch.tensor(3)), "steps[1] is int64 () on cpu; expected float32 () on cpu"),
    "step shape": (_replace("steps", torch.zeros(2)), "steps[1] is float32 (2,) on cpu; expected float32 () on cpu"),
    "param device": (
        _replace("params", torch.zeros(4, 5, device="meta")),
        "params[1] is float32 (4, 5) on meta",
    ),
    "grad device": (
        _replace("grads", torch.zeros(4, 5, device="meta")),
        "grads[1] is float32 (4, 5) on meta",
    ),
    "state is param": (lambda c: c.exp_avgs.__setitem__(1, c.params[1]), "overlap in memory"),
    "param twice": (lambda c: c.params.__setitem__(1, c.params[0][:20].view(4, 5)), "overlap in memory"),
    "step twice": (lambda c: c.steps.__setitem__(1, c.steps[0]), "overlap in memory"),
    "overlap by one": (lambda c: c.exp_avg_sqs.__setitem__(1, c.exp_avgs[0][4:24].view(4, 5)), "overlap in memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused_before_anything_is_written(name):
    spoil, message = BAD_LISTS[name]
    flat = AdamWCase.random([24, 20], amsgrad=True)
    case = AdamWCase(*([t.view(4, 5) if t.numel() == 20 else t for t in ts] for ts in flat.lists()))
    spoil(case)
    tensors = [t for ts in case.lists() for t in ts if t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError) as error:
        adamw_(*case.lists(), **HYPER)
    assert message in str(error.value)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1e-9}, "adamw_: lr is -1e-09 (float); expected a finite number >= 0"),
        ({"lr": float("nan")}, "adamw_: lr is nan (float)"),
        ({"lr": float("inf")}, "adamw_: lr is inf (float)"),
        ({"beta1": 1.0}, "adamw_: beta1 is 1.0 (float); expected a number in [0, 1)"),
        ({"beta2": -0.1}, "adamw_: beta2 is -0.1 (float); expected a number in [0, 1)"),
        ({"eps": -1.0}, "adamw_: eps is -1.0 (float); expected a number >= 0"),
        ({"weight_decay": float("nan")}, "adamw_: weight_decay is nan (float); expected a number >= 0"),
    ],
)
def test_bad_hyperparameters_are_refused(change, message):
    case = AdamWCase.random([5])
    before = case.to("cpu")
    with pytest.raises(ValueError) as error:
        adamw_(*case.lists(), **{**HYPER, **change})
    assert message in str(error.value)
    assert_same_bits_in_lists(case.lists(), before.lists())


def test_a_moment_of_a_dtype_that_no_step_takes_is_refused_before_the_others_move():
    case = AdamWCase.random([6, 7], torch.float64, torch.float64)
    case.exp_avgs[1], case.exp_avg_sqs[1] = torch.zeros(7), torch.zeros(7)
    before = case.to("cpu")
    with pytest.raises(
        ValueError, match=r"exp_avgs\[1\] is float32 \(7,\) on cpu; expected float64 \(7,\) on cpu"
    ):
        adamw_(*case.lists(), **HYPER)
    assert_same_bits_in_lists(case.lists(), before.lists())


def test_real_moments_beside_a_complex_parameter_are_refused_before_the_others_move():
    case = AdamWCase.random([6, 7])
    case.params[1], case.grads[1] = (torch.ones(7, dtype=torch.complex64) for _ in range(2))
    before = case.to("cpu")
    with pytest.raises(
        ValueError, match=r"exp_avgs\[1\] is float32 \(7,\) on cpu; expected complex64 \(7,\)"
    ):
        adamw_(*case.lists(), **HYPER)
    assert_same_bits_in_lists(case.lists()[2:], before.lists()[2:])
    assert all(map(torch.equal, case.params, before.params))


def test_integer_parameters_are_refused():
    ones = [[torch.ones(3, dtype=torch.int64)] for _ in range(4)]
    with pytest.raises((ValueError, TypeError), match=r"params\[0\] is int64 \(3,\) on cpu; expected"):
        adamw_(*ones, [], [torch.zeros(())], **HYPER)
    assert torch.equal(ones[0][0], torch.ones(3, dtype=torch.int64))


def test_sparse_gradients_are_refused_in_one_line():
    case = AdamWCase.random([3])
    before = case.to("cpu")
    lists = [case.params, [case.grads[0].to_sparse()], *case.lists()[2:]]
    with pytest.raises((ValueError, TypeError), match=r"adamw_: grads\[0\].*sparse") as error:
        adamw_(*lists, **HYPER)
    assert "\n" not in str(error.value)
    assert_same_bits_in_lists([case.params], [before.params])


@pytest.mark.parametrize("wrong", [None, 1.0, [1.0]])
def test_what_is_no_tensor_is_refused(wrong):
    case = AdamWCase.random([3])
    case.grads[0] = wrong
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        adamw_(*case.lists(), **HYPER)


def test_an_unknown_or_unusable_backend_is_named():
    case = AdamWCase.random([3])
    for backend, reason in [
        ("sse", "no such backend"),
        ("cpu:mmx", "has baseline"),
        ("cuda", "adamw_: backend is 'cuda'"),
    ]:
        with pytest.raises(ValueError) as error:
            adamw_(*case.lists(), **HYPER, backend=backend)
        assert reason in str(error.value)


def test_no_parameters_is_a_step_of_nothing():
    adamw_([], [], [], [], [], [], **HYPER)
    with FakeTensorMode():  # through the dispatcher
        adamw_([], [], [], [], [], [], **HYPER)


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"])
def test_a_tensor_beside_no_parameters_is_refused(name):
    case = AdamWCase.random([])
    getattr(case, name).append(torch.ones(1))
    with pytest.raises(ValueError, match=f"adamw_: {name} has 1 tensors; expected 0, one for each of params"):
        adamw_(*case.lists(), **HYPER)


# --- torch around the op --------------------


def test_autograd_notices_the_step():
    case = AdamWCase.random([5])
    weight = case.params[0].requires_grad_()
    product = weight * weight  # keeps the weight for its backward
    adamw_(*case.lists(), **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_failed_step_does_not_count_as_a_change():
    case = AdamWCase.random([5])
    version = case.params[0]._version
    with pytest.raises(ValueError):
        adamw_(*case.lists(), **{**HYPER, "lr": -1.0})
    assert case.params[0]._version == version


@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_reading_tensors_through_attributes_gives_the_same(param, state):
    # The way where a torch keeps its tensors otherwise than csrc/bind/torch_shim.h looks for them.
    case = AdamWCase.random([0, 1, 17, 600], param, state, amsgrad=True)
    case.params[2] = case.params[2].requires_grad_()
    expected = case.to("cpu")
    adamw_(*expected.lists(), **HYPER)
    reader = _cpu.TensorReader(torch)
    reader.use_attributes()
    assert not reader.uses_shim
    assert _cpu.adamw(reader, case.all_lists(), NATIVE, threads=2, isa="") == []
    assert_same_bits_in_lists(case.lists(), expected.lists())


def test_reading_through_attributes_refuses_the_same():
    reader = _cpu.TensorReader(torch)
    reader.use_attributes()
    case = AdamWCase.random([3, 4])
    case.grads[1] = torch.zeros(4, device="meta")
    with pytest.raises(
        ValueError, match=r"grads\[1\] is float32 \(4,\) on meta; expected float32 \(4,\) on cpu"
    ):
        _cpu.adamw(reader, case.all_lists(), NATIVE, threads=1, isa="")
    case.grads[1] = "four"
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got str"):
        _cpu.adamw(reader, case.all_lists(), NATIVE, threads=1, isa="")


@pytest.mark.parametrize("amsgrad", [False, True])
def test_passes_opcheck(amsgrad):
    case = AdamWCase.random([3, 17], amsgrad=amsgrad)
    torch.library.opcheck(
        torch.ops.superfine.adamw_.default, case.all_lists(), {**NATIVE, "zero_grads": amsgrad}
    )


def test_fake_tensors_are_taken_and_nothing_is_computed():
    with FakeTensorMode():
        lists = [[torch.empty(5)] for _ in range(4)]
        adamw_(*lists, [], [torch.empty(())], **HYPER)
    assert lists[0][0].shape == (5,)


def test_tensor_subclasses_are_stepped_through_their_own_dispatch():
    case = AdamWCase.random([7])
    lists = [[TwoTensor(t.clone(), 2 * t) for t in ts] for ts in case.lists()]
    twice = [[2 * t for t in ts] for ts in case.lists()]
    adamw_(*lists, **HYPER)
    adamw_(*case.lists(), **HYPER)
    adamw_(*twice, **HYPER)
    for k in range(6):
        if lists[k]:
            assert same_bits(lists[k][0].a, case.lists()[k][0])
            assert same_bits(lists[k][0].b, twice[k][0])


def test_two_python_threads_step_their_own_parameters():
    cases = [AdamWCase.random([9000 + i]) for i in range(4)]
    expected = [case.to("cpu") for case in cases]
    for case in expected:
        for _ in range(20):
            adamw_(*case.lists(), **HYPER)

    def work(case: AdamWCase) -> None:
        for _ in range(20):
            adamw_(*case.lists(), **HYPER)

    workers = [threading.Thread(target=work, args=(case,)) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for case, other in zip(cases, expected, strict=True):
        assert_same_bits_in_lists(case.lists(), other.lists())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_compiles_into_a_graph():
    def step(*lists: list[Tensor]) -> Tensor:
        adamw_(*lists, **HYPER)
        return lists[0][0] * 2

    case = AdamWCase.random([17, 33])
    expected = case.to("cpu")
    doubled = torch.compile(step, fullgraph=True)(*case.lists())
    adamw_(*expected.lists(), **HYPER)
    assert_same_bits_in_lists(case.lists(), expected.lists())
    assert same_bits(doubled, expected.params[0] * 2)


@pytest.mark.filterwarnings("ignore:.*that no kernel takes")
@pytest.mark.parametrize("which", ["params", "grads", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("through_attributes", [False, True])
def test_tensors_that_are_minus_their_memory_are_stepped_as_what_they_are(which, through_attributes):
    case = AdamWCase.random([5, 40])
    getattr(case, which)[1] = torch._neg_view(-getattr(case, which)[1])  # torch's lazy negation
    expected = case.to("cpu")
    assert not getattr(expected, which)[1].is_neg()
    reader = _cpu.TensorReader(torch)
    if through_attributes:
        reader.use_attributes()
    assert _cpu.adamw(reader, case.all_lists(), NATIVE, threads=1, isa="") == [1]
    expected.steps[0] += 1
    adamw_(*case.lists(), **HYPER)
    adamw_(*expected.lists(), **HYPER)
    for ours, theirs in zip(case.params[1:], expected.params[1:], strict=True):
        torch.testing.assert_close(ours, theirs)
