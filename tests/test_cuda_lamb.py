"""lamb_ on a GPU, CUDA C++ and Triton: bit for bit the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ADAMW_DTYPES, LambCase, assert_same_bits
from moment_options import OPTIONS, assert_same_options, on_cpu, random_options

import superfine_kernels

pytestmark = pytest.mark.gpu

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1}

# Nothing, around one row of lanes (32), one block (2048) and one chunk (8192) of the sums; a tensor of more chunks
# than a sum has lanes; the last is larger than half of any L2 cache, so that a batch holds nothing else.
SIZES = [0, 1, 31, 32, 33, 2047, 2048, 2049, 8191, 8192, 8193, 100_003, 1_100_001, 20_000_001]


def step_on_cpu(case: LambCase, **hyper) -> LambCase:
    expected = case.to("cpu")
    superfine_kernels.lamb_(*expected.lists(), **{**HYPER, **hyper}, backend="cpu")
    return expected


@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_gives_the_bits_of_the_cpu_kernel(backend, param, state):
    case = LambCase.random(SIZES, param, state, device="cuda")
    for _ in range(2):
        expected = step_on_cpu(case)
        superfine_kernels.lamb_(*case.lists(), **HYPER, backend=backend)
        assert_same_bits(case, expected)


@pytest.mark.parametrize(
    "hyper",
    [
        {"bias_correction": False, "grad_averaging": False},
        {"adapt": False},
        {"trust_clip": True},
        {"gradient_scale": 0.3, "maximize": True},
    ],
    ids=str,
)
def test_every_option_counts(backend, hyper):
    case = LambCase.random([9000], device="cuda")
    case.params[0].mul_(100)  # a trust ratio above 1
    expected = step_on_cpu(case, **hyper)
    superfine_kernels.lamb_(*case.lists(), **HYPER, **hyper, backend=backend)
    assert_same_bits(case, expected)


@pytest.mark.parametrize(
    ("param", "state", "names"), [*OPTIONS, (torch.float64, torch.float64, ("anchors", "zero_grads"))]
)
def test_options_give_the_bits_of_the_cpu_kernel(backend, param, state, names):
    case = LambCase.random(SIZES[:-1], param, state, device="cuda")
    options = random_options(case, names)
    for _ in range(2):
        expected_options = on_cpu(options)
        expected = step_on_cpu(case, **expected_options)
        superfine_kernels.lamb_(*case.lists(), **HYPER, **options, backend=backend)
        assert_same_bits(case, expected)
        assert_same_options(options, expected_options)


# As many tensors as one table of the CUDA kernel takes, one more; and one more than the table of counts takes.
@pytest.mark.parametrize("count", [430, 431, 513])
def test_many_tensors(backend, count):
    case = LambCase.random([1 + (37 * i) % 101 if i % 13 else 20_000 for i in range(count)], device="cuda")
    for i, step in enumerate(case.steps):
        step.fill_(i % 100)
    expected = step_on_cpu(case)
    superfine_kernels.lamb_(*case.lists(), **HYPER, backend=backend)
    assert_same_bits(case, expected)


def test_all_dtypes_in_one_call(backend):
    cases = [LambCase.random([9000, 3], param, state, device="cuda") for param, state in ADAMW_DTYPES]
    merged = LambCase(**{name: [t for case in cases for t in vars(case)[name]] for name in vars(cases[0])})
    expected = step_on_cpu(merged)
    superfine_kernels.lamb_(*merged.lists(), **HYPER, backend=backend)
    assert_same_bits(merged, expected)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.uint8])
def test_misaligned_views_leave_their_neighbours_alone(backend, state):
    whole = LambCase.random([20_001], torch.float32, state, device="cuda")
    expected = whole.to("cpu")
    options = random_options(LambCase.random([19_999], torch.float32, state, device="cuda"), ())
    expected_options = on_cpu(options)  # the scales of the views
    for case, more, name in ((whole, options, backend), (expected, expected_options, "cpu")):
        views = [[t[1:-1] for t in tensors] for tensors in case.lists()[:4]]
        superfine_kernels.lamb_(*views, case.steps, **HYPER, **more, backend=name)
    assert_same_bits(whole, expected)
    assert_same_options(options, expected_options)


def test_same_bits_on_every_run(backend):
    cases = [LambCase.random([3_000_000, 5], device="cuda") for _ in range(4)]
    for case in cases:
        superfine_kernels.lamb_(*case.lists(), **HYPER, backend=backend)
    for case in cases[1:]:
        assert_same_bits(case, cases[0])


def test_clips_by_the_norm_over_all_parameters(backend):
    from superfine.optim import LAMB

    on_gpu = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (5000, 3)]
    on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in on_gpu]
    for p, q in zip(on_gpu, on_cpu, strict=True):
        q.grad = torch.randn(q.shape)
        p.grad = q.grad.cuda()
    a, b = LAMB(on_gpu, max_grad_norm=1.0), LAMB(on_cpu, max_grad_norm=1.0)
    a.step()
    b.step()
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for p, q in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)
