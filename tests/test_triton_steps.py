"""What the optimizers' Triton kernels take from the device: counts of steps, hyperparameters, whether to step."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import AdamWCase, LambCase, assert_same_bits
from moment_options import assert_same_options, on_cpu, random_options
from support import assert_same_bits_in_lists, pairwise

import superfine_kernels
from superfine_kernels.triton import _moments, adamw, lamb

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
]

COMMON = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-6, "gradient_scale": 0.5}
HYPER: dict[str, dict[str, Any]] = {
    "adamw": {**COMMON, "decoupled": True},
    "lamb": {**COMMON, "bias_correction": True, "grad_averaging": True, "adapt": True, "trust_clip": False},
}
CASES = {"adamw": AdamWCase, "lamb": LambCase}

#: (parameter, moments, options): every way in which a parameter or moments are kept.
STORAGES = [
    (torch.float32, torch.float32, ("anchors",)),
    (torch.float32, torch.uint8, ()),
    (torch.bfloat16, torch.bfloat16, ("remainders",)),
    (torch.bfloat16, torch.uint8, ("stochastic_rounding",)),
    (torch.float16, torch.float32, ("kahan",)),
]

# No element, and several programs of either op, the last with a mask.
SIZES = [0, 8200]

either_op = pytest.mark.parametrize("op", ["adamw", "lamb"])


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def step(op: str, case: AdamWCase, options: dict[str, Any] | None = None, **hyper: Any) -> list[int]:
    """By the kernels alone: what a public op does with its arguments is tested elsewhere."""
    own = {"zero_grads": False, "stochastic_rounding": False, "seed": 0, **(options or {})}
    more = [own.pop(name, []) for name in ("anchors", "remainders", "scales")]
    lists = [
        case.params,
        case.grads,
        case.exp_avgs,
        case.exp_avg_sqs,
        case.max_exp_avg_sqs,
        *more,
        case.steps,
    ]
    kernels = {"adamw": adamw.adamw_, "lamb": lamb.lamb_}
    return kernels[op](*lists, **{**HYPER[op], **own, **hyper})


def step_on_cpu(op: str, case: AdamWCase, options: dict[str, Any], **hyper: Any) -> None:
    public = {"adamw": superfine_kernels.adamw_, "lamb": superfine_kernels.lamb_}
    public[op](*case.lists(), **{**HYPER[op], **options, **hyper}, backend="cpu")


# --- hyperparameters on the device --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "names", "made"),
    pairwise(
        ["adamw", "lamb"],
        [("lr",), ("beta1",), ("beta2",), ("gradient_scale",), ("lr", "beta1", "beta2", "gradient_scale")],
        [(torch.float32, ()), (torch.float64, (1, 1))],
    ),
)
def test_tensors_give_the_bits_of_numbers(op, names, made):
    (dtype, shape), case = made, CASES[op].random([513])
    case.steps[0].fill_(3)
    expected = case.to("cpu")
    tensors = {name: torch.full(shape, HYPER[op][name], dtype=dtype) for name in names}
    assert step(op, case, **tensors) == []
    step_on_cpu(op, expected, {}, **{name: t.item() for name, t in tensors.items()})
    assert_same_bits(case, expected)


@either_op
@pytest.mark.parametrize(("param", "state", "names"), STORAGES)
def test_tensors_give_the_bits_of_numbers_in_every_storage(op, param, state, names):
    case = CASES[op].random(SIZES if names == ("anchors",) else [600], param, state)
    options = random_options(case, (*names, "zero_grads"))
    expected, expected_options = case.to("cpu"), on_cpu(options)
    tensors = {name: torch.tensor(HYPER[op][name], dtype=torch.float64) for name in ("lr", "gradient_scale")}
    step(op, case, options, **tensors)
    step_on_cpu(op, expected, expected_options)
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


@either_op
def test_what_a_tensor_holds_is_read_at_every_step(op):
    case = CASES[op].random([40])
    expected = case.to("cpu")
    lr = torch.tensor(1e-2, dtype=torch.float64)
    for value in (1e-2, 0.0, 3e-3):
        lr.fill_(value)
        step(op, case, lr=lr)
        step_on_cpu(op, expected, {}, lr=value)
    assert_same_bits(case, expected)


@either_op
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "gradient_scale"])
@pytest.mark.parametrize(
    ("tensor", "described"),
    [
        (torch.ones(2), r"float32 \(2,\) on cpu"),
        (torch.ones(0), r"float32 \(0,\) on cpu"),
        (torch.ones((), dtype=torch.int64), r"int64 \(\) on cpu"),
        (torch.ones((), dtype=torch.bfloat16), r"bfloat16 \(\) on cpu"),
        (torch.ones((), device="meta"), r"float32 \(\) on meta"),
    ],
)
def test_other_tensors_are_refused_before_anything_is_written(op, name, tensor, described):
    case = CASES[op].random([9])
    before = case.to("cpu")
    expected = "expected a number, or a float32 or float64 tensor of one element on cpu"
    with pytest.raises(ValueError, match=f"^{op}_: {name} is {described}; {expected}$"):
        step(op, case, {"zero_grads": True}, **{name: tensor})
    assert_same_bits(case, before)


# --- steps that are not taken -------------------------------------------------------------------------------


@either_op
@pytest.mark.parametrize(
    ("param", "state", "names", "zero_grads"), [(*one, bool(i % 2)) for i, one in enumerate(STORAGES)]
)
def test_a_scale_on_the_device_that_is_not_finite_skips_the_step(op, param, state, names, zero_grads):
    case = CASES[op].random([0, 600], param, state)  # several programs: the two tests below
    options = {**random_options(case, names), "zero_grads": zero_grads}
    before, options_before = case.to("cpu"), on_cpu(options)
    for dtype, value in ((torch.float32, torch.nan), (torch.float64, torch.inf), (torch.float32, -torch.inf)):
        assert step(op, case, options, gradient_scale=torch.tensor(value, dtype=dtype)) == []
    if zero_grads:
        for grad in before.grads:
            grad.zero_()
    assert_same_bits(case, before)
    assert_same_options(options, options_before)


@either_op
@pytest.mark.parametrize("param", [torch.float32, torch.float64])
def test_amsgrad_and_float64_are_skipped_too(op, param):
    case = CASES[op].random([513, 9000], param, param, amsgrad=op == "adamw")
    before = case.to("cpu")
    step(op, case, gradient_scale=torch.tensor([torch.nan]))
    assert_same_bits(case, before)


@either_op
def test_zeros_in_place_of_gradients_leave_their_neighbours_alone(op):
    # Views at 2-byte offsets, as in gradient buckets, of more than one program.
    whole = CASES[op].random([9000], torch.bfloat16, torch.bfloat16)
    before = whole.to("cpu")
    views = CASES[op](
        *([t[1:8999] for t in tensors] for tensors in list(vars(whole).values())[:5]), whole.steps
    )
    step(op, views, {"zero_grads": True}, gradient_scale=torch.tensor(torch.inf))
    before.grads[0][1:8999] = 0
    assert_same_bits(whole, before)


@either_op
def test_a_skipped_step_is_as_if_it_had_not_been(op):
    case = CASES[op].random([600], torch.bfloat16, torch.uint8)
    options = random_options(case, ("stochastic_rounding",))
    expected, expected_options = case.to("cpu"), on_cpu(options)
    scale = torch.tensor(0.5)
    for value in (0.5, torch.inf, 0.5):
        scale.fill_(value)
        step(op, case, options, gradient_scale=scale)
    for _ in range(2):
        step_on_cpu(op, expected, expected_options)
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


@either_op
def test_a_scale_that_is_finite_in_float64_alone_is_taken(op):
    case = CASES[op].random([40])
    expected = case.to("cpu")
    step(op, case, gradient_scale=torch.tensor(1e300, dtype=torch.float64))
    step_on_cpu(op, expected, {}, gradient_scale=1e300)
    assert_same_bits_in_lists(case.lists(), expected.lists())
    assert float(case.steps[0]) == 1.0


@either_op
@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_a_number_that_is_not_finite_is_used_as_it_is(op, scale):
    case = CASES[op].random([0, 40])
    expected = case.to("cpu")
    step(op, case, gradient_scale=scale)
    step_on_cpu(op, expected, {}, gradient_scale=scale)
    assert case.params[1].isnan().any()
    assert_same_bits_in_lists(case.lists(), expected.lists())


# --- counts of steps ----------------------------------------------------------------------------------------


@either_op
def test_every_tensor_has_a_count_of_its_own(op):
    # More tensors than one program counts; at the counts of those that have an element, powers of the betas are
    # anything from 0 to 1.
    case = CASES[op].random([int(i % 26 == 0) for i in range(131)])
    for i, count in enumerate(case.steps):
        count.fill_(float(i * i))
    expected = case.to("cpu")
    step(op, case)
    step_on_cpu(op, expected, {})
    assert_same_bits(case, expected)


@either_op
def test_parameters_without_elements_are_counted(op):
    case = CASES[op].random([0, 0])
    assert step(op, case) == []
    assert [float(count) for count in case.steps] == [1.0, 2.0]


@either_op
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_seed_gives_the_random_bits_of_the_cpu_kernel(op, seed):
    case = CASES[op].random([600, 600], torch.bfloat16, torch.uint8)
    case.steps[1].fill_(2.0**24 - 1)
    options = {**random_options(case, ("stochastic_rounding",)), "seed": seed}
    expected, expected_options = case.to("cpu"), on_cpu(options)
    step(op, case, options)
    step_on_cpu(op, expected, expected_options)
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


@either_op
@pytest.mark.parametrize(
    ("count", "described"),
    [
        (torch.zeros((), device="meta"), r"float32 \(\) on meta"),
        (torch.zeros(2), r"float32 \(2,\) on cpu"),
        (torch.zeros((), dtype=torch.float64), r"float64 \(\) on cpu"),
    ],
)
def test_counts_elsewhere_are_refused(op, count, described):
    case = CASES[op].random([9, 9])
    case.steps[1] = count
    with pytest.raises(
        ValueError, match=rf"^{op}_: steps\[1\] is {described}; expected float32 \(\) on cpu$"
    ):
        step(op, case)
    assert float(case.steps[0]) == 0.0


# --- the table of addresses ---------------------------------------------------------------------------------


@either_op
def test_addresses_are_copied_when_they_change(op):
    case = CASES[op].random([40, 50])
    step(op, case)
    before = _moments._on_device.cache_info()
    step(op, case)
    assert _moments._on_device.cache_info().misses == before.misses
    expected = case.to("cpu")
    case.grads[1] = torch.full_like(case.grads[1], 2.0)
    expected.grads[1].fill_(2.0)
    step(op, case)
    step_on_cpu(op, expected, {})
    assert _moments._on_device.cache_info().misses == before.misses + 1
    assert_same_bits(case, expected)


def test_no_more_tables_are_kept_than_a_few():
    maxsize = _moments._on_device.cache_info().maxsize
    assert maxsize is not None
    assert maxsize <= 16


def test_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(_moments, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _moments.reject_capture("adamw_", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"^lamb_: .* being captured .* triton cannot"):
        _moments.reject_capture("lamb_", torch.device("cuda:0"))
