"""The Triton kernel of adamw_, in Triton's interpreter: same bits as the CPU kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import ADAMW_DTYPES, AdamWCase, assert_same_bits
from moment_options import OPTIONS, assert_same_options, on_cpu, random_options, with_amsgrad
from support import assert_same_bits_in_lists

import superfine_kernels
from superfine_kernels.triton import adamw as triton_adamw

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
]

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

# Nothing, one element, around one iteration (512), around one program (4096), and several programs.
SIZES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 9000]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def same_step_on_cpu(case: AdamWCase, **hyper: float) -> AdamWCase:
    expected = case.to("cpu")
    superfine_kernels.adamw_(*expected.lists(), **{**HYPER, **hyper}, backend="cpu")
    return expected


def step(case: AdamWCase, **hyper: float) -> list[int]:
    options = {
        "decoupled": True, "gradient_scale": 1.0, "zero_grads": False, "stochastic_rounding": False, "seed": 0,
    }  # fmt: skip
    return triton_adamw.adamw_(*case.all_lists(), **{**HYPER, **options, **hyper})


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("param", "state"), [pair for pair in ADAMW_DTYPES if pair[0] != torch.float64])
def test_gives_the_bits_of_the_cpu_kernel(param, state, amsgrad):
    case = AdamWCase.random(
        SIZES if param == state == torch.float32 else [0, 513, 4097], param, state, amsgrad
    )
    expected = same_step_on_cpu(case)
    assert step(case) == []
    assert_same_bits(case, expected)


@pytest.mark.parametrize(("param", "state", "names", "amsgrad"), with_amsgrad(OPTIONS))
def test_options_give_the_bits_of_the_cpu_kernel(param, state, names, amsgrad):
    case = AdamWCase.random([0, 513] if amsgrad else [4097], param, state, amsgrad)
    options = random_options(case, names)
    expected, expected_options = case.to("cpu"), on_cpu(options)
    superfine_kernels.adamw_(*expected.lists(), **HYPER, **expected_options, backend="cpu")
    superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend="triton")
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


def test_remainders_at_the_ends_of_their_range_as_on_the_cpu():
    # Rounding up carries into the exponent, past the largest number, and below zero; NaN stays one.
    high = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0**-126, 3e38, float("inf"), float("nan")])
    case = AdamWCase.random([4 * len(high)], torch.bfloat16, torch.float32)
    case.params[0] = high.bfloat16().repeat_interleave(4)
    remainders = torch.tensor([0, 1, 2**15 - 1, -(2**15)], dtype=torch.int16).repeat(len(high))
    case.grads[0].zero_()
    case.exp_avgs[0].zero_()
    expected, options = case.to("cpu"), {"remainders": [remainders.clone()], "weight_decay": 0.0}
    superfine_kernels.adamw_(*expected.lists(), **{**HYPER, **options}, backend="cpu")
    superfine_kernels.adamw_(
        *case.lists(), **{**HYPER, "weight_decay": 0.0}, remainders=[remainders], backend="triton"
    )
    assert torch.equal(case.params[0].view(torch.int16), expected.params[0].view(torch.int16))
    assert torch.equal(remainders, options["remainders"][0])


#: What rounds to infinity in each dtype, what is subnormal, and what is no number.
EDGES = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-40, 65519.0, 65520.0, 3.3895e38, -3.4e38, torch.inf, -torch.inf, torch.nan]
)


@pytest.mark.parametrize(("param", "state", "names"), [one for one in OPTIONS if "zero_grads" not in one[2]])
def test_numbers_at_the_ends_of_their_range_as_on_the_cpu(param, state, names):
    # Of 8-bit moments: blocks of zeros, of subnormal numbers, with infinity, with NaN, and a short one.
    case = AdamWCase.random([4 * 256 + 100], param, state)
    case.params[0][: len(EDGES)] = EDGES
    case.params[0].neg_()
    case.grads[0][:256] = 0
    case.grads[0][256:512] = 1e-38
    case.grads[0][600] = torch.inf
    case.grads[0][900:902] = torch.tensor([torch.nan, torch.inf])
    options = random_options(case, names)
    if state == torch.uint8:
        options["scales"][0][:, :2] = torch.tensor([0.0, 1e-38])
        options["scales"][0][1, 4] = torch.nan
    expected, expected_options = case.to("cpu"), on_cpu(options)
    for _ in range(2):
        superfine_kernels.adamw_(*expected.lists(), **HYPER, **expected_options, backend="cpu")
        superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend="triton")
    assert_same_bits_in_lists(case.lists(), expected.lists())
    for name in ("anchors", "remainders", "scales"):
        assert_same_bits_in_lists([options.get(name, [])], [expected_options.get(name, [])])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("param", "state", "names"),
    [
        (torch.float32, torch.float32, ()),
        (torch.float32, torch.uint8, ("anchors",)),
        (torch.bfloat16, torch.bfloat16, ("remainders", "anchors", "zero_grads")),
        (torch.bfloat16, torch.bfloat16, ("stochastic_rounding",)),
        (torch.float16, torch.float32, ("kahan", "anchors")),
    ],
)
def test_coupled_decay_gives_the_bits_of_the_cpu_kernel(param, state, names, weight_decay):
    case = AdamWCase.random([513], param, state)
    options = random_options(case, names)
    expected, expected_options = case.to("cpu"), on_cpu(options)
    hyper = {**HYPER, "weight_decay": weight_decay, "decoupled": False, "gradient_scale": -0.3}
    superfine_kernels.adamw_(*expected.lists(), **hyper, **expected_options, backend="cpu")
    superfine_kernels.adamw_(*case.lists(), **hyper, **options, backend="triton")
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


def test_what_is_rounded_at_random_follows_from_seed_and_step():
    first, second, third = (AdamWCase.random([600], torch.bfloat16, torch.uint8) for _ in range(3))
    third.steps[0] += 1
    for case, seed in ((first, 1), (second, 2), (third, 1)):
        options = {**random_options(case, ("stochastic_rounding",)), "seed": seed}
        superfine_kernels.adamw_(*case.lists(), **{**HYPER, "lr": 0.0}, **options, backend="triton")
    assert not torch.equal(first.exp_avg_sqs[0], second.exp_avg_sqs[0])
    assert not torch.equal(first.exp_avg_sqs[0], third.exp_avg_sqs[0])


def test_remainders_of_both_kinds_in_one_call():
    split = AdamWCase.random([600], torch.bfloat16, torch.bfloat16)
    options = [random_options(split, ("remainders",)), random_options(split, ("kahan",))]
    remainders = [one["remainders"][0] for one in options]
    merged = AdamWCase(*(tensors * 2 for tensors in split.lists())).to("cpu")
    expected, expected_remainders = merged.to("cpu"), [r.clone() for r in remainders]
    superfine_kernels.adamw_(*expected.lists(), **HYPER, remainders=expected_remainders, backend="cpu")
    superfine_kernels.adamw_(*merged.lists(), **HYPER, remainders=remainders, backend="triton")
    assert_same_bits(merged, expected)
    assert_same_bits_in_lists([remainders], [expected_remainders])


def test_float64_agrees_to_the_last_digits():
    # Not the last bit: the interpreter has no fused multiply-add in float64.
    case = AdamWCase.random(SIZES, torch.float64, torch.float64, amsgrad=True)
    expected = same_step_on_cpu(case)
    step(case)
    for ours, theirs in zip(case.lists(), expected.lists(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "hyper",
    [
        {"gradient_scale": -0.3},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"eps": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
    ],
)
def test_every_hyperparameter_counts(hyper):
    case = AdamWCase.random([513])
    expected = same_step_on_cpu(case, **hyper)
    step(case, **hyper)
    assert_same_bits(case, expected)


def test_every_program_finds_its_tensor():
    # More tensors than a power of two, some of them empty, some of several programs.
    case = AdamWCase.random([(i * 37) % 11 if i % 7 else 4097 for i in range(35)])
    expected = same_step_on_cpu(case)
    step(case)
    assert_same_bits(case, expected)


def test_mixed_dtypes_in_one_call():
    cases = [AdamWCase.random([700, 3], param, state) for param, state in ADAMW_DTYPES[:6]]
    merged = AdamWCase(*([t for case in cases for t in case.lists()[k]] for k in range(6)))
    expected = same_step_on_cpu(merged)
    step(merged)
    assert_same_bits(merged, expected)


def test_misaligned_views_leave_their_neighbours_alone():
    # Views at 2-byte offsets, as in gradient buckets: no 16-byte access may be used.
    whole = AdamWCase.random([5000], torch.bfloat16, torch.bfloat16)
    expected = whole.to("cpu")
    anchors, remainders = torch.randn(5000).bfloat16(), torch.full((5000,), -3, dtype=torch.int16)
    remainders_of = {"triton": remainders, "cpu": remainders.clone()}
    for case, backend in ((whole, "triton"), (expected, "cpu")):
        views = [[t[1:4999] for t in tensors] for tensors in case.lists()[:4]]
        superfine_kernels.adamw_(
            *views, [], case.steps, **HYPER, anchors=[anchors[1:4999]], remainders=[remainders_of[backend][1:4999]],
            zero_grads=True, backend=backend,
        )  # fmt: skip
    assert_same_bits(whole, expected)
    assert torch.equal(remainders, remainders_of["cpu"])


def test_misaligned_codes_and_scales_leave_their_neighbours_alone():
    whole = AdamWCase.random([5000], torch.float32, torch.uint8)
    expected = whole.to("cpu")
    scales = torch.rand(50)
    scales_of = {"triton": scales, "cpu": scales.clone()}
    for case, backend in ((whole, "triton"), (expected, "cpu")):
        views = [[t[1:4999] for t in tensors] for tensors in case.lists()[:4]]
        own = [scales_of[backend][3:43].view(2, 20)]
        superfine_kernels.adamw_(*views, [], case.steps, **HYPER, scales=own, backend=backend)
    assert_same_bits(whole, expected)
    assert torch.equal(scales, scales_of["cpu"])


def test_transposed_parameters_are_stepped_in_place():
    case = AdamWCase.random([600])
    expected = same_step_on_cpu(case)
    transposed = [[t.view(20, 30).t() for t in tensors] for tensors in case.lists()[:4]]
    superfine_kernels.adamw_(*transposed, [], case.steps, **HYPER, backend="triton")
    assert_same_bits(case, expected)


def test_layouts_and_dtypes_without_a_kernel_are_left_alone_and_named():
    def tensors() -> list[torch.Tensor]:
        return [torch.ones(6), torch.ones(4, 6)[:, :3], torch.ones(6, dtype=torch.complex64)]

    lists = [tensors() for _ in range(4)]
    steps = [torch.zeros(()) for _ in range(3)]
    assert step(AdamWCase(*lists, [], steps)) == [1, 2]
    assert [float(s) for s in steps] == [1.0, 0.0, 0.0]
    assert torch.equal(lists[0][1], tensors()[1])
    assert torch.equal(lists[0][2], tensors()[2])
    assert not torch.equal(lists[0][0], tensors()[0])


def test_nan_gradients_reach_the_amsgrad_maximum():
    case = AdamWCase.random([8], amsgrad=True)
    case.grads[0][3] = float("nan")
    step(case)
    for tensors in (case.params, case.exp_avgs, case.exp_avg_sqs, case.max_exp_avg_sqs):
        assert tensors[0].isnan().nonzero().flatten().tolist() == [3]


def test_serves_the_public_op_when_asked():
    case = AdamWCase.random([1000])
    expected = same_step_on_cpu(case)
    superfine_kernels.adamw_(*case.lists(), **HYPER, backend="triton")
    assert_same_bits(case, expected)


@pytest.mark.parametrize("name", ["params", "grads"])
def test_autograd_notices_what_is_written(name):
    case = AdamWCase.random([5])
    weight = getattr(case, name)[0].requires_grad_()
    product = weight * weight  # keeps the weight for its backward
    superfine_kernels.adamw_(*case.lists(), **HYPER, zero_grads=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_tensors_is_a_step_of_nothing():
    assert step(AdamWCase([], [], [], [], [], [])) == []


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
        (replace("steps", torch.tensor(3)), r"steps\[1\] is int64 \(\) on cpu; expected float32 \(\) on cpu"),
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
        step(case)
    for old, new in zip(before, case.lists(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True) if a.device.type == "cpu")


REMAINDER = (
    r"expected int16 \(9,\) on cpu beside a bfloat16 parameter, or the dtype of a bfloat16 or float16 one"
)
SCALES = r"expected a contiguous float32 \(2, 1\) on the device of the parameter, for uint8 moments"


@pytest.mark.parametrize(
    ("param", "state", "options", "message"),
    [
        (
            torch.float32, torch.float32, {"remainders": [torch.zeros(9, dtype=torch.int16)]},
            rf"remainders\[0\] is int16 \(9,\) on cpu; {REMAINDER}",
        ),
        (
            torch.float32, torch.float32, {"remainders": [torch.zeros(9)]},
            rf"remainders\[0\] is float32 \(9,\) on cpu; {REMAINDER}",
        ),
        (
            torch.float16, torch.float16, {"remainders": [torch.zeros(9, dtype=torch.int16)]},
            r"remainders\[0\] is int16 \(9,\) on cpu; expected int16 \(9,\) on cpu beside a bfloat16 parameter",
        ),
        (
            torch.bfloat16, torch.bfloat16, {"remainders": [torch.zeros(9).half()]},
            r"remainders\[0\] is float16 \(9,\) on cpu",
        ),
        (
            torch.bfloat16, torch.bfloat16, {"remainders": [torch.zeros(8).bfloat16()]},
            r"remainders\[0\] is bfloat16 \(8,\) on cpu",
        ),
        (
            torch.float32, torch.float32, {"anchors": [torch.zeros(8)]},
            r"anchors\[0\] is float32 \(8,\) on cpu; expected float32 \(9,\) on cpu",
        ),
        (
            torch.float32, torch.float32, {"anchors": [torch.zeros(9)] * 2},
            r"anchors has 2 tensors; expected 1, one for each of params",
        ),
        (
            torch.float32, torch.float16, {},
            r"exp_avgs\[0\] is float16 \(9,\) on cpu; expected float32 \(9,\) on cpu",
        ),
        (torch.float64, torch.uint8, {"scales": [torch.zeros(2, 1)]}, r"exp_avgs\[0\] is uint8 \(9,\) on cpu"),
        (torch.float32, torch.uint8, {}, rf"scales\[0\] is missing; {SCALES}"),
        (
            torch.float32, torch.uint8, {"scales": [torch.zeros(1, 2)]},
            rf"scales\[0\] is float32 \(1, 2\) on cpu; {SCALES}",
        ),
        (
            torch.float32, torch.uint8, {"scales": [torch.zeros(2, 1).double()]},
            rf"scales\[0\] is float64 \(2, 1\) on cpu; {SCALES}",
        ),
        (
            torch.float32, torch.uint8, {"scales": [torch.zeros(2, 3)[:, ::3]]},
            rf"scales\[0\] is float32 \(2, 1\) on cpu; {SCALES}",
        ),
        (
            torch.float32, torch.float32, {"scales": [torch.zeros(2, 1)]},
            r"scales\[0\] is float32 \(2, 1\) on cpu; expected none beside moments that are not uint8",
        ),
        (
            torch.float32, torch.uint8,
            {"scales": [torch.zeros(2, 1)], "max_exp_avg_sqs": [torch.zeros(9, dtype=torch.uint8)]},
            r"max_exp_avg_sqs\[0\] is uint8 \(9,\) on cpu; expected none beside uint8 moments, which AMSGrad",
        ),
    ],
)  # fmt: skip
def test_bad_options_are_refused_as_by_the_cpu_kernel(param, state, options, message):
    case = AdamWCase.random([9], param, state)
    lists = {name: tensors for name, tensors in vars(case).items() if name != "max_exp_avg_sqs"}
    for backend in ("triton", "cpu"):
        with pytest.raises(ValueError, match=f"adamw_: {message}"):
            superfine_kernels.adamw_(**lists, **HYPER, **options, backend=backend)


def test_scales_may_not_overlap():
    case = AdamWCase.random([9, 9], torch.float32, torch.uint8)
    for backend in ("triton", "cpu"):
        with pytest.raises(ValueError, match="overlap in memory"):
            superfine_kernels.adamw_(*case.lists(), **HYPER, scales=[torch.zeros(2, 1)] * 2, backend=backend)


def test_integer_parameters_are_refused_as_by_the_cpu_kernel():
    ones = [[torch.ones(3, dtype=torch.int64)] for _ in range(4)]
    for backend in ("triton", "cpu"):
        with pytest.raises(
            ValueError, match=r"params\[0\] is int64 \(3,\) on cpu; expected a float32, bfloat16"
        ):
            superfine_kernels.adamw_(*ones, [], [torch.zeros(())], **HYPER, backend=backend)


def test_zeroed_gradients_may_not_overlap():
    case = AdamWCase.random([9, 9])
    case.grads[1] = case.grads[0]
    with pytest.raises(ValueError, match="overlap in memory"):
        step(case, zero_grads=True)
    assert step(case) == []
