"""What the optimizers' GPU steps share: steps captured in a graph, hyperparameters on the device, steps not taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_cases import ADAMW_DTYPES, AdamWCase, LambCase, assert_same_bits
from moment_options import OPTIONS, assert_same_options, on_cpu, random_options
from torch import Tensor

import superfine_kernels

pytestmark = pytest.mark.gpu

OPS = {
    "adamw_": (AdamWCase, superfine_kernels.adamw_, superfine_kernels.adamw_groups_),
    "lamb_": (LambCase, superfine_kernels.lamb_, superfine_kernels.lamb_groups_),
}
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "gradient_scale": 0.5}
HYPER = {**NUMBERS, "eps": 1e-7, "weight_decay": 0.1}

# Nothing, one element, around a chunk of both ops (4096 and 8192).
SIZES = [0, 1, 4097, 8193]


@pytest.fixture(params=sorted(OPS))
def op(request) -> str:
    return request.param


def random_case(op: str, *args: Any, **kwargs: Any) -> AdamWCase:
    return OPS[op][0].random(*args, **kwargs)


def step(op: str, case: AdamWCase, backend: str, **hyper: Any) -> None:
    OPS[op][1](*case.lists(), **{**HYPER, **hyper}, backend=backend)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """An error where torch would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def on_device(numbers: dict[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(number, dtype=dtype, device="cuda") for name, number in numbers.items()}


# --- graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_replays_count_on_and_give_the_bits_of_eager_steps(op, backend, param, state):
    case = random_case(op, SIZES, param, state, device="cuda")
    options = random_options(case, ())
    expected = case.to("cuda")
    step(op, case.to("cuda"), backend, **options)  # loads the kernels
    graph = captured(lambda: step(op, case, backend, **options))
    assert_same_bits(case, expected)  # capturing ran nothing
    for _ in range(3):
        graph.replay()
        step(op, expected, backend, **options)
        assert_same_bits(case, expected)
    assert [t.item() for t in case.steps] == [i + 3 for i in range(len(SIZES))]


def test_replays_round_at_random_anew(op, backend):
    case = random_case(op, SIZES, torch.bfloat16, torch.uint8, device="cuda")
    options = random_options(case, ("stochastic_rounding", "zero_grads"))
    step(op, case.to("cuda"), backend, **{**options, "scales": [t.clone() for t in options["scales"]]})
    expected, expected_options = case.to("cpu"), on_cpu(options)
    gradients = [[torch.randn_like(g) for g in case.grads] for _ in range(3)]
    graph = captured(lambda: step(op, case, backend, **options))
    for values in gradients:
        for ours, theirs, value in zip(case.grads, expected.grads, values, strict=True):
            ours.copy_(value)
            theirs.copy_(value)
        graph.replay()
        step(op, expected, "cpu", **expected_options)
        assert_same_bits(case, expected)
        assert_same_options(options, expected_options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replays_read_hyperparameters_as_they_are_then(op, backend, dtype):
    case = random_case(op, SIZES, device="cuda")
    hyper = on_device(NUMBERS, dtype)
    step(op, case.to("cuda"), backend, **hyper)
    expected = case.to("cpu")
    graph = captured(lambda: step(op, case, backend, **hyper))
    for numbers in (
        (1e-2, 0.9, 0.999, 0.5),
        (3e-3, 0.8, 0.99, -2.0),
        (1e-3, 0.9, 0.95, math.nan),
        (0.0, 0.0, 0.5, 1.0),
    ):
        for tensor, number in zip(hyper.values(), numbers, strict=True):
            tensor.fill_(number)
        graph.replay()
        if math.isfinite(numbers[-1]):
            step(op, expected, "cpu", **{name: tensor.item() for name, tensor in hyper.items()})
        assert_same_bits(case, expected)


# --- hyperparameters on the device --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "names", [(name,) for name in NUMBERS] + [("lr", "gradient_scale"), tuple(NUMBERS)], ids="+".join
)
def test_hyperparameters_on_the_device_count_as_numbers_do(op, backend, names, dtype):
    case = random_case(op, SIZES, device="cuda")
    tensors = on_device({name: NUMBERS[name] for name in names}, dtype)
    tensors[names[0]] = tensors[names[0]].reshape(1)
    numbers = {name: tensor.item() for name, tensor in tensors.items()}
    expected = case.to("cpu")
    for _ in range(2):
        with nothing_waits():
            step(op, case, backend, **tensors)
        step(op, expected, "cpu", **numbers)
    assert_same_bits(case, expected)


def test_a_step_waits_for_nothing(op, backend):
    case = random_case(op, SIZES, device="cuda")
    with nothing_waits():
        step(op, case, backend)
    assert [t.item() for t in case.steps] == [i + 1 for i in range(len(SIZES))]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "described"),
    [
        (torch.ones(2), r"float32 \(2,\) on cuda:0"),
        (torch.ones(0), r"float32 \(0,\) on cuda:0"),
        (torch.ones((), dtype=torch.bfloat16), r"bfloat16 \(\) on cuda:0"),
        (torch.ones((), dtype=torch.int64), r"int64 \(\) on cuda:0"),
    ],
)
def test_refuses_other_hyperparameters_on_the_device(op, backend, name, value, described):
    case = random_case(op, SIZES, device="cuda")
    before = case.to("cuda")
    expected = "expected a number, or a float32 or float64 tensor of one element on cuda:0"
    with pytest.raises(ValueError, match=f"^{op}: {name} is {described}; {expected}"):
        step(op, case, backend, **{name: value.cuda()})
    assert_same_bits(case, before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_refuses_hyperparameters_on_another_device(op, backend):
    case = random_case(op, SIZES, device="cuda")
    before = case.to("cuda")
    with pytest.raises(ValueError, match=rf"^{op}: lr is float32 \(\) on cuda:1; expected .* on cuda:0"):
        step(op, case, backend, lr=torch.ones((), device="cuda:1"))
    assert_same_bits(case, before)


# --- steps that are not taken -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("param", "state", "names"),
    [
        *((param, state, ()) for param, state in ADAMW_DTYPES),
        *OPTIONS,
        (torch.float64, torch.float64, ("zero_grads",)),
    ],
)
def test_a_step_not_taken_leaves_all_but_zeroed_gradients(op, backend, param, state, names, scale):
    case = random_case(op, SIZES, param, state, device="cuda")
    options = random_options(case, names)
    before, options_before = case.to("cpu"), on_cpu(options)
    step(op, case, backend, **options, gradient_scale=torch.tensor(scale, device="cuda"))
    if options["zero_grads"]:
        before.grads = [torch.zeros_like(g) for g in before.grads]
    assert_same_bits(case, before)
    assert_same_options(options, options_before)


def test_a_number_that_is_not_finite_is_used(op, backend):
    case = random_case(op, SIZES, device="cuda")
    step(op, case, backend, gradient_scale=math.nan)
    assert [t.item() for t in case.steps] == [i + 1 for i in range(len(SIZES))]
    assert all(t.isnan().all() for t in case.exp_avgs)


# --- groups -------------------------------------------------------------------------------------------------


def grouped(op: str, cases: list[AdamWCase], hypers: list[dict[str, Any]]) -> tuple[list, dict]:
    """An optimizer's groups and state, `cases` a group each, whose first parameters have no gradient."""
    groups, state = [], {}
    common = dict.fromkeys(("maximize", "zero_grads", "stochastic_rounding", "amsgrad", "anchored"), False)
    rules = {
        "adamw_": {"decoupled": True},
        "lamb_": {"bias_correction": True, "grad_averaging": True, "adapt": True, "trust_clip": False},
    }
    for seed, (case, hyper) in enumerate(zip(cases, hypers, strict=True)):
        params = [torch.nn.Parameter(t) for t in case.params]
        for i, param in enumerate(params):
            param.grad = case.grads[i] if i > 0 else None
            state[param] = {
                "step": case.steps[i], "exp_avg": case.exp_avgs[i], "exp_avg_sq": case.exp_avg_sqs[i]
            }  # fmt: skip
        groups.append((params, {**HYPER, **rules[op], **common, "seed": seed, **hyper}))
    return groups, state


def test_groups_in_one_call_are_stepped_as_lists_are(op, cuda_module):
    cases = [random_case(op, [5, *SIZES], param, state, device="cuda") for param, state in ADAMW_DTYPES]
    expected = [case.to("cpu") for case in cases]
    hypers: list[dict[str, Any]] = [
        {"lr": 1e-3 * (i + 1), "beta1": 0.9 - 0.05 * i, "zero_grads": i % 2 == 0} for i in range(len(cases))
    ]
    last = {**hypers[-1], **on_device({"lr": hypers[-1]["lr"]}, torch.float64)}
    groups, state = grouped(op, cases, [*hypers[:-1], last])
    for _ in range(2):
        with nothing_waits():
            OPS[op][2](groups, state)
        for seed, (case, hyper) in enumerate(zip(expected, hypers, strict=True)):
            lists = [tensors[1:] for tensors in case.lists()]
            OPS[op][1](*lists, **{**HYPER, **hyper}, seed=seed, backend="cpu")
    for case, wanted in zip(cases, expected, strict=True):
        assert_same_bits(case, wanted)


def test_a_group_whose_step_is_not_taken_does_not_hold_up_others(op, cuda_module):
    cases = [random_case(op, [5, *SIZES], device="cuda") for _ in range(2)]
    expected = [case.to("cpu") for case in cases]
    scales = [on_device({"gradient_scale": scale}, torch.float32) for scale in (math.nan, 1.0)]
    OPS[op][2](*grouped(op, cases, scales))
    lists = [tensors[1:] for tensors in expected[1].lists()]
    OPS[op][1](*lists, **{**HYPER, "gradient_scale": 1.0}, seed=1, backend="cpu")
    for case, wanted in zip(cases, expected, strict=True):
        assert_same_bits(case, wanted)
