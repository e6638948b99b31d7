"""The Triton kernel of adamw_, in Triton's interpreter: same bits as the CPU kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import ADAMW_DTYPES, AdamWCase, assert_same_bits

import superfine_kernels
from superfine_kernels.triton import adamw as triton_adamw

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
]

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}

# Nothing, one element, around one iteration (512), around one program (4096), and several programs.
SIZES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 9000]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def same_step_on_cpu(case: AdamWCase, **hyper: float) -> AdamWCase:
    expected = case.to("cpu")
    superfine_kernels.adamw_(*expected.lists(), **{**HYPER, **hyper}, backend="cpu")
    return expected


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("param", "state"), [pair for pair in ADAMW_DTYPES if pair[0] != torch.float64])
def test_gives_the_bits_of_the_cpu_kernel(param, state, amsgrad):
    case = AdamWCase.random(SIZES, param, state, amsgrad)
    expected = same_step_on_cpu(case)
    assert triton_adamw.adamw_(*case.lists(), **HYPER) == []
    assert_same_bits(case, expected)


def test_float64_agrees_to_the_last_digits():
    # Not the last bit: the interpreter has no fused multiply-add in float64.
    case = AdamWCase.random(SIZES, torch.float64, torch.float64, amsgrad=True)
    expected = same_step_on_cpu(case)
    triton_adamw.adamw_(*case.lists(), **HYPER)
    for ours, theirs in zip(case.lists(), expected.lists(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "hyper",
    [{"maximize": True}, {"weight_decay": 0.0}, {"lr": 0.0}, {"eps": 0.0}, {"beta1": 0.0, "beta2": 0.0}],
)
def test_every_hyperparameter_counts(hyper):
    case = AdamWCase.random([513])
    expected = same_step_on_cpu(case, **hyper)
    triton_adamw.adamw_(*case.lists(), **{**HYPER, **hyper})
    assert_same_bits(case, expected)


def test_every_program_finds_its_tensor():
    # More tensors than a power of two, some of them empty, some of several programs.
    case = AdamWCase.random([(i * 37) % 11 if i % 7 else 4097 for i in range(35)])
    expected = same_step_on_cpu(case)
    triton_adamw.adamw_(*case.lists(), **HYPER)
    assert_same_bits(case, expected)


def test_mixed_dtypes_in_one_call():
    cases = [AdamWCase.random([700, 3], param, state) for param, state in ADAMW_DTYPES[:5]]
    merged = AdamWCase(*([t for case in cases for t in case.lists()[k]] for k in range(6)))
    expected = same_step_on_cpu(merged)
    triton_adamw.adamw_(*merged.lists(), **HYPER)
    assert_same_bits(merged, expected)


def test_misaligned_views_leave_their_neighbours_alone():
    # Views at 4-byte offsets, as in gradient buckets: no 16-byte access may be used.
    whole = AdamWCase.random([5000])
    expected = whole.to("cpu")
    superfine_kernels.adamw_(
        *([t[1:4999] for t in tensors] for tensors in expected.lists()[:4]),
        [],
        expected.steps,
        **HYPER,
        backend="cpu",
    )
    triton_adamw.adamw_(
        *([t[1:4999] for t in tensors] for tensors in whole.lists()[:4]), [], whole.steps, **HYPER
    )
    assert_same_bits(whole, expected)


def test_transposed_parameters_are_stepped_in_place():
    case = AdamWCase.random([600])
    expected = same_step_on_cpu(case)
    transposed = [[t.view(20, 30).t() for t in tensors] for tensors in case.lists()[:4]]
    assert triton_adamw.adamw_(*transposed, [], case.steps, **HYPER) == []
    assert_same_bits(case, expected)


def test_layouts_and_dtypes_without_a_kernel_are_left_alone_and_named():
    def tensors() -> list[torch.Tensor]:
        return [torch.ones(6), torch.ones(4, 6)[:, :3], torch.ones(6, dtype=torch.complex64)]

    lists = [tensors() for _ in range(4)]
    steps = [torch.zeros(()) for _ in range(3)]
    assert triton_adamw.adamw_(*lists, [], steps, **HYPER) == [1, 2]
    assert [float(s) for s in steps] == [1.0, 0.0, 0.0]
    assert torch.equal(lists[0][1], tensors()[1])
    assert torch.equal(lists[0][2], tensors()[2])
    assert not torch.equal(lists[0][0], tensors()[0])


def test_nan_gradients_reach_the_amsgrad_maximum():
    case = AdamWCase.random([8], amsgrad=True)
    case.grads[0][3] = float("nan")
    triton_adamw.adamw_(*case.lists(), **HYPER)
    for tensors in (case.params, case.exp_avgs, case.exp_avg_sqs, case.max_exp_avg_sqs):
        assert tensors[0].isnan().nonzero().flatten().tolist() == [3]


def test_serves_the_public_op_when_asked():
    case = AdamWCase.random([1000])
    expected = same_step_on_cpu(case)
    superfine_kernels.adamw_(*case.lists(), **HYPER, backend="triton")
    assert_same_bits(case, expected)


def test_autograd_notices_the_step():
    case = AdamWCase.random([5])
    weight = case.params[0].requires_grad_()
    product = weight * weight  # keeps the weight for its backward
    triton_adamw.adamw_(*case.lists(), **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_tensors_is_a_step_of_nothing():
    assert triton_adamw.adamw_([], [], [], [], [], [], **HYPER) == []


def replace(name, tensor):
    return lambda case: getattr(case, name).__setitem__(1, tensor)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.grads.pop(), r"grads has 1 tensors; expected 2"),
        (lambda c: c.steps.pop(), r"steps has 1 tensors; expected 2"),
        (
            replace("grads", torch.zeros(9).bfloat16()),
            r"grads\[1\] is bfloat16 \(9,\) on cpu; expected float32",
        ),
        (
            replace("exp_avgs", torch.zeros(8)),
            r"exp_avgs\[1\] is float32 \(8,\) on cpu; expected float32 \(9,\)",
        ),
        (replace("exp_avg_sqs", torch.zeros(9).double()), r"exp_avg_sqs\[1\] is float64"),
        (replace("steps", torch.tensor(3)), r"steps\[1\] is int64 \(\) on cpu; expected float32"),
        (replace("params", torch.zeros(9, device="meta")), r"params\[1\] is float32 \(9,\) on meta"),
        (lambda c: c.exp_avgs.__setitem__(1, c.params[1]), r"overlap in memory"),
        (lambda c: c.params.__setitem__(1, c.params[0][:9]), r"overlap in memory"),
    ],
)
def test_bad_lists_are_refused_before_anything_is_written(spoil, message):
    case = AdamWCase.random([20, 9])
    spoil(case)
    before = [[t.clone() for t in tensors] for tensors in case.lists()]
    with pytest.raises(ValueError, match=message):
        triton_adamw.adamw_(*case.lists(), **HYPER)
    for old, new in zip(before, case.lists(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True) if a.device.type == "cpu")
