"""bce_with_logits and mse on a GPU, CUDA C++ and Triton: against eager torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    elementwise_in_float64,
    elementwise_inputs,
    elementwise_loss,
)
from torch import Tensor

from superfine_kernels._elements import Pattern

pytestmark = pytest.mark.gpu

LOSSES = ["bce_with_logits", "mse"]


def run(backend, loss, x, t, upstream=None, inplace=False, **options) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    output = leaf * 1 if inplace else leaf
    value = elementwise_loss(loss, output, t, inplace=inplace, backend=backend, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), leaf.grad


def assert_agrees(backend, loss, x, t, upstream=None, inplace=False, **options) -> None:
    value, gradient = run(backend, loss, x, t, upstream, inplace, **options)
    expected, expected_gradient = elementwise_in_float64(loss, x, t, upstream=upstream, **options)
    tolerance = LOSS_TOLERANCE[x.dtype]
    torch.testing.assert_close(value.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    tolerance = GRADIENT_TOLERANCE[x.dtype]
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=2 * tolerance, atol=tolerance)


def skip_float64(backend, dtype):
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA C++ has no float64 kernel")


# One element, a warp, a block's threads, the elements of a block, and more than the one block that sums has threads.
@pytest.mark.parametrize("size", [1, 31, 32, 33, 256, 257, 8191, 8192, 8193, 9_000_000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_torch_in_float64(backend, loss, dtype, reduction, size):
    skip_float64(backend, dtype)
    if size > 10**6 and (reduction != "mean" or dtype != torch.float32):
        pytest.skip("one large case is enough")
    x, t = elementwise_inputs((size,), dtype, "cuda")
    upstream = torch.linspace(-1, 1, size) if reduction == "none" else torch.tensor(0.5)
    assert_agrees(backend, loss, x, t, upstream.cuda(), reduction=reduction)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_in_place_and_at_odd_addresses(backend, loss, dtype):
    skip_float64(backend, dtype)
    x, t = elementwise_inputs((20001,), dtype, "cuda")
    assert_agrees(backend, loss, x[1:], t[1:], inplace=True)
    assert_agrees(backend, loss, x[1:], t.float()[:-1] if dtype != torch.float64 else t[:-1])


@pytest.mark.parametrize(
    ("shape", "weight", "pos_weight"),
    [
        ((300, 70), (70,), (300, 1)),
        ((3, 5005), (3, 1), (5005,)),
        ((4, 3, 25, 9), (3, 1, 1), (4, 3, 25, 9)),
        ((40, 3, 5), (40, 1, 5), (1, 1, 5)),
        ((30, 70), (), (1, 1)),
        ((3, 1 << 20), (3, 1), (1 << 20,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_broadcast_as_in_torch(backend, loss, reduction, shape, weight, pos_weight):
    x, t = elementwise_inputs(shape, torch.float32, "cuda")
    w = torch.rand(weight).cuda() + 0.1
    p = 3 * torch.rand(pos_weight).cuda() if loss == "bce_with_logits" else None
    assert_agrees(backend, loss, x, t, weight=w, pos_weight=p, reduction=reduction)


def test_quotients_of_any_length_and_run(cuda_module):
    # Lengths around powers of two, where a multiplication in place of a division is closest to being off by one.
    x = torch.zeros(1 << 20, device="cuda")
    t = torch.ones_like(x)
    for length in (2047, 2048, 2049, 4095, 4097, 65535, 65537, 349525):
        values = torch.arange(length, device="cuda", dtype=torch.float32)
        for repeat in (1, 3, 17, 1024):
            arguments = ("mse", x, t, values, repeat, None, 1, 0, 1.0, False, "cuda")
            losses = torch.ops.superfine.elementwise_loss(*arguments)[0]
            assert torch.equal(losses, Pattern(values, repeat).whole(x.shape))


def test_infinities_and_nan_spoil_no_neighbour(backend):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.5] * 4, device="cuda")
    t = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.25] * 4 + [math.nan] * 4, device="cuda")
    value, gradient = run(backend, "bce_with_logits", x, t, reduction="none")
    expected, expected_gradient = run("cpu", "bce_with_logits", x.cpu(), t.cpu(), reduction="none")
    torch.testing.assert_close(value.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gives_the_same_bits_on_every_run(backend, loss):
    x, t = elementwise_inputs((3000, 1001), torch.float32, "cuda")
    first = run(backend, loss, x, t)
    for _ in range(5):
        again = run(backend, loss, x, t)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_float64_is_left_to_triton_or_torch():
    x, t = elementwise_inputs((1000,), torch.float64, "cuda")
    with pytest.raises(
        ValueError, match=r"mse: input is float64 \(1000,\) on cuda:0; expected float32, bfloat16"
    ):
        elementwise_loss("mse", x, t, backend="cuda")
    assert_agrees(None, "mse", x, t)


def test_over_more_than_2_to_the_30_elements(backend):
    size = (1 << 30) + 8192 * 3 + 5
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("needs 8 GiB of free GPU memory")
    x = torch.full((size,), 3.0, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.ones(5, device="cuda")
    x.data[-1] = 5.0
    loss = elementwise_loss("mse", x, torch.ones_like(x), weight=weight[:1], reduction="sum", backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.item(), 4.0 * (size - 1) + 16, rtol=1e-6, atol=0)
    assert x.grad[-2:].tolist() == [4.0, 8.0]


def test_runs_in_order_on_the_current_stream(backend):
    source, t = elementwise_inputs((100_000,), torch.float32, "cuda")
    expected, _ = run(backend, "mse", source, t)
    x, stream = torch.zeros_like(source), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        loss = elementwise_loss("mse", x, t, backend=backend)
    stream.synchronize()
    assert torch.equal(loss, expected)
