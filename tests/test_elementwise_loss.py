"""bce_with_logits and mse on the CPU: values and gradients against torch in float64, special values, bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    elementwise_in_float64,
    elementwise_inputs,
    elementwise_loss,
)
from support import ISAS, same_bits, threads
from torch import Tensor

from superfine_kernels import bce_with_logits, mse
from superfine_kernels._elements import SHORTEST_RUN, WINDOW, Pattern
from superfine_kernels._library import HUGE_PAGE_BYTES

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

LOSSES = ["bce_with_logits", "mse"]

# One element, around a vector of 16, the 64 lanes of a sum, a strip of 512, and the 16384 elements of a sum.
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 16383, 16384, 16385, 40000]

# (input, weight, pos_weight): scalars, one a class, one a row, one a channel with runs long and short, whole,
# dimensions that are broadcast between others, more classes than a strip.
BROADCASTS = [
    ((5, 7), (), (1,)),
    ((300, 70), (70,), (70,)),
    ((300, 70), (300, 1), (300, 70)),
    ((4, 3, 25, 9), (3, 1, 1), (4, 1, 1, 1)),
    ((40, 3, SHORTEST_RUN - 1), (3, 1), (40, 1, 1)),
    ((40, 3, SHORTEST_RUN), (3, 1), (40, 3, 1)),
    ((40, 3, 5), (40, 1, 5), (1, 1, 5)),
    ((6, 5000), (6, 1), (5000,)),
    ((2, 1, 3), (2, 1, 1), (1, 3)),
]


def run(loss: str, input: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options):
    """Loss and gradient of `input`, a leaf of its own."""
    leaf = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    x = leaf * 1 if options.get("inplace") else leaf
    value = elementwise_loss(loss, x, target, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), leaf.grad


def assert_agrees_with_float64(loss, x, t, weight=None, pos_weight=None, reduction="mean", upstream=None):
    options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    value, gradient = run(loss, x, t, upstream=upstream, **options)
    expected, expected_gradient = elementwise_in_float64(loss, x, t, upstream=upstream, **options)
    dtype = x.dtype
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == expected.shape
    assert gradient.dtype == dtype
    assert gradient.shape == x.shape
    tolerance = LOSS_TOLERANCE[dtype]
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    # Gradients of low precision may be rounded twice: before and after the upstream gradient.
    atol = GRADIENT_TOLERANCE[dtype]
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * atol, atol=atol)


# --- values --------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_torch_in_float64(loss, dtype, reduction):
    for size in SIZES:
        x, t = elementwise_inputs((size,), dtype)
        shape = (size,) if reduction == "none" else ()
        upstream = torch.linspace(-2, 2, size).reshape(shape) if shape else torch.tensor(-0.75)
        assert_agrees_with_float64(loss, x, t, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize(("shape", "weight", "pos_weight"), BROADCASTS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_broadcast_as_in_torch(loss, reduction, shape, weight, pos_weight):
    for dtype in (torch.float32, torch.bfloat16):
        x, t = elementwise_inputs(shape, dtype)
        w, p = torch.rand(weight) + 0.1, (3 * torch.rand(pos_weight) if loss == "bce_with_logits" else None)
        assert_agrees_with_float64(loss, x, t, w, p, reduction)


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    data=st.data(),
    loss=st.sampled_from(LOSSES),
    dtype=st.sampled_from(LOGIT_DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_any_broadcast(shape, data, loss, dtype, reduction):
    def broadcast() -> Tensor | None:
        if data.draw(st.booleans()):
            return None
        kept = [size if data.draw(st.booleans()) else 1 for size in shape]
        return torch.rand(kept[data.draw(st.integers(0, len(kept))) :], dtype=torch.float64) + 0.1

    x, t = elementwise_inputs(shape, dtype)
    weight, pos_weight = broadcast(), broadcast() if loss == "bce_with_logits" else None
    if weight is not None and dtype != torch.float64:
        weight = weight.float()
    if pos_weight is not None and dtype != torch.float64:
        pos_weight = pos_weight.float()
    assert_agrees_with_float64(loss, x, t, weight, pos_weight, reduction)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    keep=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_patterns_are_what_expand_gives(shape, keep):
    sizes = [size if kept else 1 for size, kept in zip(shape, keep, strict=False)]
    weight = torch.arange(math.prod(sizes), dtype=torch.float32).reshape(sizes)
    pattern = Pattern.of(weight, torch.Size(shape), torch.float32)
    assert torch.equal(pattern.whole(torch.Size(shape)), weight.expand(shape))
    assert pattern.values.is_contiguous()
    assert pattern.values.numel() * pattern.repeat >= min(WINDOW, math.prod(shape))
    assert pattern.repeat == 1 or pattern.repeat >= SHORTEST_RUN


@given(
    length=st.integers(1, 30),
    repeat=st.integers(1, 30),
    start=st.integers(0, 500),
    count=st.integers(1, 500),
)
def test_a_part_of_a_pattern_is_that_part(length, repeat, start, count):
    pattern = Pattern(torch.rand(length), repeat)
    part = pattern.part(slice(start, start + count))
    whole = pattern.whole(torch.Size([start + count]))
    if part is not pattern or start % pattern.cycle == 0:
        assert torch.equal(part.whole(torch.Size([count])), whole[start:])
    else:
        pytest.fail("the whole pattern for a part that begins within it")


@pytest.mark.parametrize(
    "target_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_targets_of_any_real_dtype(loss, dtype, target_dtype):
    x, _ = elementwise_inputs((7, 90), dtype)
    labels = torch.arange(630).reshape(7, 90) % 3 == 0
    expected = run(loss, x, labels.to(x.dtype))
    actual = run(loss, x, labels.to(target_dtype))
    assert same_bits(actual[0], expected[0])
    assert same_bits(actual[1], expected[1])


def test_float32_targets_are_not_rounded_beside_bfloat16():
    x, t = torch.zeros(1000, dtype=torch.bfloat16), torch.full((1000,), 1 + 2**-12)
    assert mse(x, t) == (1 + 2**-12) ** 2
    assert mse(x, t.double()) == mse(x, t)
    assert mse(x, torch.full((1000,), 1025)) == 1025**2  # no bfloat16


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_strides_do_not_matter(loss, reduction):
    x, t = elementwise_inputs((6, 70), torch.float32)
    expected = run(loss, x, t, reduction=reduction)
    spread = torch.full((6, 140), math.nan)
    spread[:, ::2] = x
    for layout in (x.t().contiguous().t(), spread[:, ::2], x[:1].expand(6, 70)):
        for target in (t, t.t().contiguous().t()):
            leaf = layout.detach().requires_grad_()
            value = elementwise_loss(loss, leaf, target, reduction=reduction)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            if layout.stride(0) == 0:
                assert_agrees_with_float64(loss, layout.contiguous(), t, reduction=reduction)
            else:
                assert same_bits(value.detach(), expected[0])
                assert same_bits(gradient, expected[1])


def test_float32_losses_and_gradients_are_within_a_few_units_of_the_exact_ones():
    # Against softplus forms that cancel nothing: torch's own loses digits where a logit agrees with its label.
    x = torch.cat([torch.linspace(-87, 87, 40001), torch.randn(5000) / 1000, torch.tensor([0.0])])
    wide = x.double()
    for label in (0.0, 1.0):
        sign = 2 * label - 1
        value, gradient = run("bce_with_logits", x, torch.full_like(x, label), reduction="none")
        exact = torch.where(sign * wide > 0, 0, -sign * wide) + (-wide.abs()).exp().log1p()
        exact_gradient = -sign * torch.sigmoid(-sign * wide)
        for ours, theirs in ((value, exact), (gradient, exact_gradient)):
            ulp = torch.exp2(theirs.abs().float().log2().floor().double() - 23)
            assert ((ours.double() - theirs).abs() <= 5 * ulp).all()


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_logits_far_out(dtype):
    x = torch.tensor([60000.0, -60000.0, 60000.0, -60000.0, 104.0, -104.0]).to(dtype)
    t = torch.tensor([1.0, 0, 0, 1, 1, 0]).to(dtype)
    value, gradient = run("bce_with_logits", x, t, reduction="none")
    expected = torch.tensor([0, 0, *x[:2].abs().tolist(), 0, 0]).to(value.dtype)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-44)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0, 1, -1, 0, 0]).to(dtype), rtol=0, atol=1e-44)


# --- infinities, NaN, nothing --------------------


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, 1.5, -3.0]


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_infinite_logits_have_the_limit_as_loss_and_spoil_no_neighbour(dtype):
    # Where torch multiplies zero by infinity: a masked logit that agrees with its label costs nothing.
    pairs = list(itertools.product(SPECIAL, [0.0, 1.0, 0.25, math.nan]))
    x, t = (torch.tensor(v).repeat(3).to(dtype) for v in zip(*pairs, strict=True))  # a group of 64 and a tail
    value, gradient = run("bce_with_logits", x, t, reduction="none")
    expected, expected_gradient = elementwise_in_float64("bce_with_logits", x, t, reduction="none")
    agrees = ((x == math.inf) & (t == 1)) | ((x == -math.inf) & (t == 0))
    infinite = x.isinf() & ~t.isnan() & ~agrees
    expected = expected.masked_fill(agrees, 0).masked_fill(infinite, math.inf)
    torch.testing.assert_close(value.double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": GRADIENT_TOLERANCE[dtype], "atol": GRADIENT_TOLERANCE[dtype]}
    torch.testing.assert_close(gradient.double(), expected_gradient, equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_squares_of_infinities_and_nan_are_as_in_torch(dtype):
    x, t = (
        torch.tensor(v).repeat(3).to(dtype) for v in zip(*itertools.product(SPECIAL, SPECIAL), strict=True)
    )
    value, gradient = run("mse", x, t, reduction="none")
    expected, expected_gradient = elementwise_in_float64("mse", x, t, reduction="none")
    torch.testing.assert_close(value.double(), expected, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected_gradient, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_compute(loss, reduction, shape):
    x, t = torch.empty(shape), torch.empty(shape)
    value, gradient = run(loss, x, t, reduction=reduction)
    assert gradient.shape == shape
    if reduction == "none":
        assert value.shape == shape
    elif reduction == "sum":
        assert value == 0
    else:
        assert value.isnan()


# --- bits --------------------


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_on_every_instruction_set_thread_count_and_run(loss, dtype):
    # Three sums, of which the last one ends in a strip that is no whole vector.
    x, t = elementwise_inputs((37, 1001), dtype)
    x[3, 17], x[5, :100] = math.nan, 100.0
    weight, pos_weight = torch.rand(37, 1), (torch.rand(1001) if loss == "bce_with_logits" else None)
    for reduction in ("mean", "sum", "none"):
        results = []
        for backend in [*(f"cpu:{isa}" for isa in ISAS), "cpu"]:
            for count in (1, 2):
                with threads(count):
                    options = {"reduction": reduction, "backend": backend, "pos_weight": pos_weight}
                    results.append(run(loss, x, t, weight=weight, **options))
        for value, gradient in results[1:]:
            assert same_bits(value, results[0][0])
            assert same_bits(gradient, results[0][1])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_too_large_for_the_caches_are_the_same(loss, dtype, reduction):
    # Above 4 MiB gradients pass the caches by, on huge pages; 5 more elements begin and end within a line.
    size = HUGE_PAGE_BYTES // dtype.itemsize + 5
    x, t = elementwise_inputs((size,), dtype)
    half = size // 2 + 3
    upstream = torch.rand(size) if reduction == "none" else None
    _, gradient = run(loss, x, t, reduction=reduction, upstream=upstream)
    for part in (slice(0, half), slice(half, size)):
        of_part = None if upstream is None else upstream[part]
        _, small = run(loss, x[part], t[part], reduction=reduction, upstream=of_part)
        assert same_bits(gradient[part], small)


def test_the_two_ways_to_the_gradient_agree_bit_for_bit():
    x, t = elementwise_inputs((40, 90), torch.float32)
    pos_weight, upstream = torch.rand(90), torch.full((40, 90), 1.0)
    _, fused = run("bce_with_logits", x, t, pos_weight=pos_weight, reduction="sum")
    _, later = run("bce_with_logits", x, t, pos_weight=pos_weight, reduction="none", upstream=upstream)
    assert same_bits(fused, later)


# --- what a mean divides by --------------------


@pytest.mark.parametrize("num_items", [7, 2.5, torch.tensor(7), torch.tensor([2.5], dtype=torch.float64)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_num_items_divides_the_sum(loss, dtype, inplace, num_items):
    x, t = elementwise_inputs((5, 9), dtype)
    weight = torch.rand(9)
    value, gradient = run(loss, x, t, weight=weight, num_items=num_items, inplace=inplace)
    expected, expected_gradient = elementwise_in_float64(loss, x, t, weight=weight, reduction="sum")
    torch.testing.assert_close(value.double(), expected / float(num_items), rtol=1e-5, atol=1e-6)
    tolerance = GRADIENT_TOLERANCE[dtype]
    torch.testing.assert_close(
        gradient.double(), expected_gradient / float(num_items), rtol=tolerance, atol=tolerance
    )


def test_a_weighted_mean_of_squares_divides_by_the_weights_and_a_weighted_bce_by_the_elements():
    x, t = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    assert mse(x, t, weight=torch.tensor([1.0, 3.0])) == (1 * 4 + 3 * 16) / 4
    assert mse(x.view(1, 2), t.view(1, 2), weight=torch.tensor([[2.0]])) == (4 + 16) / 2
    zero = bce_with_logits(torch.zeros(2), t, weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(zero.item(), 2 * math.log(2))
    nothing = x.clone().requires_grad_()
    loss = mse(nothing, t, weight=torch.zeros(2))
    assert loss.isnan()  # 0 / 0, as in torch
