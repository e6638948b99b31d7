"""The Triton kernels of lamb_, in Triton's interpreter: same bits as the CPU kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import ADAMW_DTYPES, LambCase, assert_same_bits
from moment_options import OPTIONS, assert_same_options, on_cpu, random_options
from support import assert_same_bits_in_lists

import superfine_kernels
from superfine_kernels.triton import lamb as triton_lamb

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
]

HYPER = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True,
    "grad_averaging": True, "adapt": True, "trust_clip": False, "gradient_scale": 1.0,
}  # fmt: skip

# Nothing, one element, around one row of lanes (32), one block (2048), one program (8192), and several programs.
SIZES = [0, 1, 31, 32, 33, 2049, 8192, 8193]
# Of other dtypes the same programs: without an element, short, and a whole one before a single element.
FEWER = [0, 33, 8193]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def same_step_on_cpu(case: LambCase, **hyper: float) -> LambCase:
    expected = case.to("cpu")
    superfine_kernels.lamb_(*expected.lists(), **{**HYPER, **hyper}, backend="cpu")
    return expected


def step(case: LambCase, **hyper: float) -> list[int]:
    options = {"zero_grads": False, "stochastic_rounding": False, "seed": 0}
    return triton_lamb.lamb_(*case.all_lists(), **{**HYPER, **options, **hyper})


@pytest.mark.parametrize(("param", "state"), [pair for pair in ADAMW_DTYPES if pair[0] != torch.float64])
def test_gives_the_bits_of_the_cpu_kernel(param, state):
    case = LambCase.random(SIZES if param == state == torch.float32 else FEWER, param, state)
    expected = same_step_on_cpu(case)
    assert step(case) == []
    assert_same_bits(case, expected)


# A program with a mask (and a second block), for some also one without.
@pytest.mark.parametrize(
    ("param", "state", "names", "sizes"),
    [(*one, [2100] if i % 4 else [100, 8192]) for i, one in enumerate(OPTIONS)],
)
def test_options_give_the_bits_of_the_cpu_kernel(param, state, names, sizes):
    case = LambCase.random(sizes, param, state)
    options = random_options(case, names)
    expected, expected_options = case.to("cpu"), on_cpu(options)
    superfine_kernels.lamb_(*expected.lists(), **{**HYPER, **expected_options}, backend="cpu")
    superfine_kernels.lamb_(*case.lists(), **{**HYPER, **options}, backend="triton")
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


@pytest.mark.parametrize(("param", "state", "names"), [one for one in OPTIONS if "zero_grads" not in one[2]])
def test_numbers_at_the_ends_of_their_range_as_on_the_cpu(param, state, names):
    # Of 8-bit moments: blocks of zeros, of subnormal numbers, with infinity, with NaN, and a short one.
    case = LambCase.random([4 * 256 + 100, 500], param, state)
    case.params[0][:4] = torch.tensor([0.0, -0.0, 65519.0, -1e-40])
    case.params[1][:2] = torch.tensor([3.4e38, torch.nan])
    case.grads[0][:256] = 0
    case.grads[0][256:512] = 1e-38
    case.grads[0][600] = torch.inf
    case.grads[0][900:902] = torch.tensor([torch.nan, torch.inf])
    options = random_options(case, names)
    if state == torch.uint8:
        options["scales"][0][:, :2] = torch.tensor([0.0, 1e-38])
        options["scales"][0][1, 4] = torch.nan
    expected, expected_options = case.to("cpu"), on_cpu(options)
    superfine_kernels.lamb_(*expected.lists(), **{**HYPER, **expected_options}, backend="cpu")
    superfine_kernels.lamb_(*case.lists(), **{**HYPER, **options}, backend="triton")
    assert_same_bits_in_lists(case.lists(), expected.lists())
    for name in ("anchors", "remainders", "scales"):
        assert_same_bits_in_lists([options.get(name, [])], [expected_options.get(name, [])])


def test_float64_agrees_to_the_last_digits():
    # Not the last bit: the interpreter has no fused multiply-add in float64.
    case = LambCase.random(SIZES, torch.float64, torch.float64)
    expected = same_step_on_cpu(case)
    step(case)
    for ours, theirs in zip(case.lists(), expected.lists(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "hyper",
    [
        {"bias_correction": False},
        {"grad_averaging": False},
        {"adapt": False},
        {"trust_clip": True},
        {"gradient_scale": -0.3},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
    ],
    ids=str,
)
def test_every_hyperparameter_counts(hyper):
    case = LambCase.random([513])
    case.params[0].mul_(100)  # a trust ratio above 1
    expected = same_step_on_cpu(case, **hyper)
    step(case, **hyper)
    assert_same_bits(case, expected)


def test_the_sums_of_more_chunks_than_there_are_lanes_are_added_in_order():
    # The second launch alone: 300 chunks go around the 4 x 32 lanes three times.
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(300, 2, generator=generator, dtype=torch.float64)
    table = torch.tensor([[*[0] * 9, 300 * triton_lamb.CHUNK, 0]])
    scalars = torch.ones(1, 14, dtype=torch.float64)  # lr, adapted, taken
    scalars[0, 11] = torch.inf  # the largest trust ratio
    step_sizes = torch.full((1,), torch.nan, dtype=torch.float64)
    triton_lamb._lamb_step_size[(1,)](
        table, scalars, sums, step_sizes, CHUNK=triton_lamb.CHUNK, SUM_BLOCKS=4, LANES=32
    )
    padded = torch.zeros(384, 2, dtype=torch.float64)
    padded[:300] = sums
    x = padded[:128] + padded[128:256] + padded[256:]
    x = x.view(4, 32, 2)
    for half in (16, 8, 4, 2, 1):
        x = x[:, :half] + x[:, half:]
    x = (x[0] + x[2]) + (x[1] + x[3])
    assert step_sizes.item() == -(x[0, 0].sqrt() / x[0, 1].sqrt()).item()


def test_every_program_finds_its_tensor():
    # More tensors than a power of two, some of them empty, some of several programs.
    case = LambCase.random([(i * 37) % 11 if i % 9 else 8193 for i in range(19)])
    expected = same_step_on_cpu(case)
    step(case)
    assert_same_bits(case, expected)


def test_zero_norms_and_nan_as_on_the_cpu():
    case = LambCase.random([40, 40, 40])
    case.params[0].zero_()
    case.grads[1].zero_()
    case.exp_avgs[1].zero_()
    case.grads[2][3] = float("nan")
    expected = same_step_on_cpu(case, weight_decay=0.0)
    step(case, weight_decay=0.0)
    assert case.params[2].isnan().nonzero().flatten().tolist() == [3]
    for tensors in (*case.lists(), *expected.lists()):
        tensors[2].nan_to_num_()
    assert_same_bits(case, expected)


def test_misaligned_views_leave_their_neighbours_alone():
    # Views at 4-byte offsets, as in gradient buckets: no 16-byte access may be used.
    whole = LambCase.random([9000])
    expected = whole.to("cpu")
    for case, backend in ((whole, "triton"), (expected, "cpu")):
        views = [[t[1:8999] for t in tensors] for tensors in case.lists()[:4]]
        superfine_kernels.lamb_(*views, case.steps, **HYPER, backend=backend)
    assert_same_bits(whole, expected)


def test_misaligned_codes_and_scales_leave_their_neighbours_alone():
    whole = LambCase.random([9000], torch.float32, torch.uint8)
    expected = whole.to("cpu")
    scales = torch.rand(80)
    scales_of = {"triton": scales, "cpu": scales.clone()}
    for case, backend in ((whole, "triton"), (expected, "cpu")):
        views = [[t[1:8999] for t in tensors] for tensors in case.lists()[:4]]
        own = [scales_of[backend][3:75].view(2, 36)]
        superfine_kernels.lamb_(*views, case.steps, **HYPER, scales=own, backend=backend)
    assert_same_bits(whole, expected)
    assert torch.equal(scales, scales_of["cpu"])


def test_autograd_notices_the_step():
    case = LambCase.random([5])
    weight = case.params[0].requires_grad_()
    product = weight * weight  # keeps the weight for its backward
    superfine_kernels.lamb_(*case.lists(), **HYPER, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_tensors_is_a_step_of_nothing():
    assert step(LambCase([], [], [], [], [], [])) == []


def test_bad_lists_are_refused_before_anything_is_written():
    case = LambCase.random([20, 9])
    before = case.to("cpu")
    case.exp_avgs[1] = torch.zeros(8)
    with pytest.raises(
        ValueError, match=r"lamb_: exp_avgs\[1\] is float32 \(8,\) on cpu; expected float32 \(9,\)"
    ):
        step(case)
    case.exp_avgs[1] = case.params[1]
    with pytest.raises(ValueError, match="lamb_: params and optimizer state overlap in memory"):
        step(case)
    case.exp_avgs[1] = before.exp_avgs[1]
    assert_same_bits(case, before)
