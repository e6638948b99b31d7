"""adamw_ on a GPU, CUDA C++ and Triton: bit for bit the CPU kernel."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import ADAMW_DTYPES, AdamWCase, assert_same_bits
from moment_options import OPTIONS, assert_same_options, on_cpu, random_options, with_amsgrad

import superfine_kernels

pytestmark = pytest.mark.gpu

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

# Nothing, a tail without a pack, around a block's pass and a chunk (4096), several chunks.
SIZES = [0, 1, 7, 255, 4095, 4096, 4097, 100_003]


def step_on_cpu(case: AdamWCase, **options) -> AdamWCase:
    expected = case.to("cpu")
    superfine_kernels.adamw_(*expected.lists(), **HYPER, **options, backend="cpu")
    return expected


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_adamw_gives_the_bits_of_the_cpu_kernel(backend, param, state, amsgrad):
    case = AdamWCase.random(SIZES, param, state, amsgrad, device="cuda")
    for _ in range(3):
        expected = step_on_cpu(case)
        superfine_kernels.adamw_(*case.lists(), **HYPER, backend=backend)
        assert_same_bits(case, expected)


@pytest.mark.parametrize(
    ("param", "state", "names", "amsgrad"),
    with_amsgrad([*OPTIONS, (torch.float64, torch.float64, ("anchors", "zero_grads"))]),
)
def test_adamw_options_give_the_bits_of_the_cpu_kernel(backend, param, state, names, amsgrad):
    case = AdamWCase.random(SIZES, param, state, amsgrad, device="cuda")
    options = random_options(case, names)
    for _ in range(2):
        expected_options = on_cpu(options)
        expected = step_on_cpu(case, **expected_options)
        superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend=backend)
        assert_same_bits(case, expected)
        assert_same_options(options, expected_options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("param", "state", "names"),
    [
        (torch.float32, torch.float32, ()),
        (torch.float32, torch.float32, ("anchors",)),
        (torch.bfloat16, torch.bfloat16, ("kahan", "anchors", "zero_grads")),
        (torch.float16, torch.uint8, ("anchors",)),
        (torch.float64, torch.float64, ("anchors",)),
    ],
)
def test_adam_gives_the_bits_of_the_cpu_kernel(backend, param, state, names, weight_decay):
    case = AdamWCase.random(SIZES, param, state, device="cuda")
    options = random_options(case, names) | {"decoupled": False, "weight_decay": weight_decay}
    expected_options = on_cpu(options)
    expected = case.to("cpu")
    superfine_kernels.adamw_(*expected.lists(), **{**HYPER, **expected_options}, backend="cpu")
    superfine_kernels.adamw_(*case.lists(), **{**HYPER, **options}, backend=backend)
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("name", ["anchors", "remainders", "kahan"])
def test_adamw_minds_the_alignment_of_options(backend, name, state):
    case = AdamWCase.random([9001], torch.bfloat16, state, device="cuda")
    options = random_options(case, (name,))
    name = "anchors" if name == "anchors" else "remainders"
    options[name] = [torch.cat([t[:1], t])[1:] for t in options[name]]  # all but these are aligned
    expected_options = on_cpu(options)
    expected = step_on_cpu(case, **expected_options)
    superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend=backend)
    assert_same_bits(case, expected)
    assert_same_options(options, expected_options)


# As many tensors as one table of the CUDA kernel takes, one more; and one more than the table of counts takes.
@pytest.mark.parametrize("count", [430, 431, 513])
def test_adamw_over_many_tensors(backend, count):
    case = AdamWCase.random([1 + (37 * i) % 101 if i % 13 else 5000 for i in range(count)], device="cuda")
    for i, step in enumerate(case.steps):
        step.fill_(i % 100)
    expected = step_on_cpu(case)
    superfine_kernels.adamw_(*case.lists(), **HYPER, backend=backend)
    assert_same_bits(case, expected)


def test_adamw_over_all_dtypes_in_one_call(backend):
    cases = [AdamWCase.random([700, 3], param, state, device="cuda") for param, state in ADAMW_DTYPES]
    merged = AdamWCase(*([t for case in cases for t in case.lists()[k]] for k in range(6)))
    expected = step_on_cpu(merged)
    superfine_kernels.adamw_(*merged.lists(), **HYPER, backend=backend)
    assert_same_bits(merged, expected)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize(
    ("param", "state"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.uint8),
        (torch.bfloat16, torch.uint8),
    ],
)
def test_adamw_on_misaligned_views_leaves_their_neighbours_alone(backend, param, state, offset):
    whole = AdamWCase.random([9001], param, state, device="cuda")
    expected = whole.to("cpu")
    inner = AdamWCase.random([9001 - 2 * offset], param, state, device="cuda")
    options = random_options(inner, ())  # the scales of the views
    expected_options = on_cpu(options)
    for case, more, name in ((whole, options, backend), (expected, expected_options, "cpu")):
        views = [[t[offset:-offset] for t in tensors] for tensors in case.lists()[:4]]
        superfine_kernels.adamw_(*views, [], case.steps, **HYPER, **more, backend=name)
    assert_same_bits(whole, expected)
    assert_same_options(options, expected_options)


def test_adamw_8_bit_blocks_of_zeros_and_of_numbers_that_are_not_finite(backend):
    case = AdamWCase.random([5 * 256 + 9], torch.float32, torch.uint8, device="cuda")
    options = random_options(case, ())
    for tensors in (case.grads, case.exp_avgs, case.exp_avg_sqs):
        tensors[0][256:512] = 0
    case.grads[0][600] = math.inf
    case.grads[0][900] = math.nan
    expected_options = on_cpu(options)
    expected = step_on_cpu(case, **expected_options)
    superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend=backend)
    # Codes mean nothing where the scale is NaN; a GPU's NaN has other bits.
    finite = torch.ones(5 * 256 + 9, dtype=torch.bool)
    finite[512:1024] = False
    for actual, wanted in zip(case.lists()[2:4], expected.lists()[2:4], strict=True):
        assert torch.equal(actual[0].cpu()[finite], wanted[0][finite])
    torch.testing.assert_close(
        options["scales"][0].cpu(), expected_options["scales"][0], rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(case.params[0].cpu(), expected.params[0], rtol=0, atol=0, equal_nan=True)


def test_adamw_keeps_nothing_of_what_is_rounded_to_infinity(backend):
    case = AdamWCase.random([300], torch.float16, torch.float32, device="cuda")
    options = random_options(case, ("kahan",))
    case.params[0][:100] = 65504  # of which the step makes more
    case.exp_avgs[0][:100] = -1e5
    case.exp_avg_sqs[0][:100] = 1e-6
    for _ in range(2):
        expected_options = on_cpu(options)
        expected = step_on_cpu(case, **expected_options)
        superfine_kernels.adamw_(*case.lists(), **HYPER, **options, backend=backend)
        assert expected.params[0][:100].isinf().all()
        assert not expected_options["remainders"][0][:100].any()
        assert_same_bits(case, expected)
        assert_same_options(options, expected_options)


def test_adamw_runs_in_order_on_the_current_stream(backend):
    case = AdamWCase.random([1 << 20], device="cuda")
    expected = step_on_cpu(case)
    gradient = case.grads[0].clone()
    case.grads[0].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: a kernel on another stream would see the zeros
        case.grads[0].copy_(gradient)
        superfine_kernels.adamw_(*case.lists(), **HYPER, backend=backend)
    stream.synchronize()
    assert_same_bits(case, expected)


def test_adamw_steps_a_tensor_of_more_than_2_to_the_31_elements(backend):
    n = 2**31 + 4099
    needed = 4 * n * 2 + (1 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    tensors = [torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)]
    tensors[3].square_()
    # The first and last chunks: an index of 32 bits would hit the wrong ones.
    ends = [slice(0, 5000), slice(n - 5000, n)]
    expected = [AdamWCase(*([t[end].cpu()] for t in tensors), [], [torch.zeros(())]) for end in ends]
    superfine_kernels.adamw_(
        *([t] for t in tensors), [], [torch.zeros((), device="cuda")], **HYPER, backend=backend
    )
    for end, case in zip(ends, expected, strict=True):
        superfine_kernels.adamw_(*case.lists(), **HYPER, backend="cpu")
        assert torch.equal(tensors[0][end].cpu(), case.params[0])
        assert torch.equal(tensors[2][end].cpu(), case.exp_avgs[0])
        assert torch.equal(tensors[3][end].cpu(), case.exp_avg_sqs[0])


def test_adamw_refuses_tensors_on_two_devices(backend):
    case = AdamWCase.random([3, 4], device="cuda")
    case.grads[1] = case.grads[1].cpu()
    before = case.params[0].clone()
    with pytest.raises(ValueError, match=r"adamw_: grads\[1\] is .* on cpu; expected .* on cuda:0"):
        superfine_kernels.adamw_(*case.lists(), **HYPER, backend=backend)
    assert torch.equal(case.params[0], before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_and_the_current_one_stays(backend):
    case = AdamWCase.random([5000], device="cuda:1")
    expected = step_on_cpu(case)
    with torch.cuda.device(0):
        superfine_kernels.adamw_(*case.lists(), **HYPER, backend=backend)
        assert torch.cuda.current_device() == 0
        assert torch.zeros(1, device="cuda").device.index == 0
    assert_same_bits(case, expected)
