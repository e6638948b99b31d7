"""cross_entropy on the CPU: values and gradients against torch in float64, bits, bad input, autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import GRADIENT_TOLERANCE, LOGIT_DTYPES, LOSS_TOLERANCE, class_weights, labels, logits
from support import ISAS, pairwise, same_bits, threads
from torch import Tensor

from superfine_kernels import cross_entropy
from superfine_kernels._library import HUGE_PAGE_BYTES
from superfine_kernels._losses import REDUCTIONS

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

# One class, around a vector of 16, the 64 lanes of a sum, the 512 gradients staged at a time, and the 4096
# logits of a block; then two blocks and a tail.
VOCABS = [1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 8193]


def run(
    input: Tensor,
    target: Tensor,
    *arguments,
    upstream: Tensor | None = None,
    function=cross_entropy,
    **options,
):
    """Loss and gradient of `input`, a leaf of its own."""
    leaf = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf if not options.get("inplace") else leaf * 1, target, *arguments, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad


def torch_in_float64(input: Tensor, target: Tensor, weight: Tensor | None = None, **options):
    options.pop("inplace", None)
    upstream = options.pop("upstream", None)
    upstream = None if upstream is None else upstream.double()
    wide = None if weight is None else weight.double()
    wide_target = target.double() if target.is_floating_point() else target.long()
    function = torch.nn.functional.cross_entropy
    return run(input.double(), wide_target, wide, upstream=upstream, function=function, **options)


def assert_agrees_with_float64(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options
) -> None:
    loss, gradient = run(input, target, weight, **options)
    expected_loss, expected_gradient = torch_in_float64(input, target, weight, **options)
    dtype = input.dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == expected_loss.shape
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        loss.double(), expected_loss, rtol=LOSS_TOLERANCE[dtype], atol=LOSS_TOLERANCE[dtype], equal_nan=True
    )
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=GRADIENT_TOLERANCE[dtype], atol=GRADIENT_TOLERANCE[dtype]
    )


# --- values --------------------


@pytest.mark.parametrize(
    ("dtype", "reduction", "label_smoothing", "weighted"),
    pairwise(LOGIT_DTYPES, ["mean", "sum", "none"], [0.0, 0.1, 1.0], [False, True]),
)
def test_agrees_with_torch_in_float64(dtype, reduction, label_smoothing, weighted):
    for vocab in VOCABS:
        x, t = logits(5, vocab, dtype), labels(5, vocab)
        t[2] = -100
        weight = class_weights(vocab, dtype) + 0.1 if weighted else None
        upstream = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5]) if reduction == "none" else torch.tensor(-0.75)
        assert_agrees_with_float64(
            x, t, weight, reduction=reduction, label_smoothing=label_smoothing, upstream=upstream
        )


@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 600),
    dtype=st.sampled_from(LOGIT_DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 1),
    weighted=st.booleans(),
    ignore_index=st.integers(-3, 600),
    int32=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 10.0, 1000.0]),
)
def test_any_arguments(rows, vocab, dtype, reduction, label_smoothing, weighted, ignore_index, int32, spread):
    x = (logits(rows, vocab, torch.float64) * spread / 4).to(dtype)
    t = labels(rows, vocab).to(torch.int32 if int32 else torch.int64)
    t[::3] = ignore_index
    weight = class_weights(vocab, dtype) + 0.1 if weighted else None
    loss, gradient = run(
        x, t, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    expected_loss, expected_gradient = torch_in_float64(
        x, t, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if bool((t == ignore_index).all()):
        expected_gradient.zero_()  # torch gives 0 / 0 for a mean over nothing
    scale = max(1.0, float(x.abs().max()) if x.numel() else 1.0) * max(rows, 1)
    torch.testing.assert_close(
        loss.double(),
        expected_loss,
        rtol=LOSS_TOLERANCE[dtype],
        atol=LOSS_TOLERANCE[dtype] * scale,
        equal_nan=True,
    )
    # Two-phase gradients come from a rounded lse: an error in proportion to the largest logit.
    factor = max(1.0, float(x.abs().max()) / 10) if reduction == "none" and x.numel() else 1.0
    tolerance = GRADIENT_TOLERANCE[dtype] * factor
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 7, 4), (2, 7, 3, 2), (1, 7, 1), (2, 7, 0)])
def test_shapes_are_those_of_torch(shape, reduction):
    x = torch.randn(shape)
    classes_dim = 0 if len(shape) == 1 else 1
    t = torch.randint(0, 7, [n for d, n in enumerate(shape) if d != classes_dim])
    assert_agrees_with_float64(x, t, torch.rand(7) + 0.1, reduction=reduction, label_smoothing=0.1)


def _strided(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "rows of a wider matrix":
        wide = torch.full((x.shape[0], x.shape[1] + 11), math.nan, dtype=x.dtype)
        wide[:, 5:-6] = x
        return wide[:, 5:-6]
    if layout == "every second row":
        return torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0]
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["transposed", "rows of a wider matrix", "every second row", "expanded"])
def test_logits_of_any_strides(layout, reduction):
    x, t = logits(6, 70, torch.float32), labels(6, 70)
    view = _strided(x, layout).requires_grad_()
    loss = cross_entropy(view, t, reduction=reduction, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), view)
    expected = run(view.detach().contiguous(), t, reduction=reduction, label_smoothing=0.1)
    assert same_bits(loss.detach(), expected[0])
    assert same_bits(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_of_any_strides(dtype):
    x, t = logits(6, 9, torch.float32), labels(6, 9).to(dtype)
    expected = run(x, t.long())
    spread = torch.full((6, 3), -7, dtype=dtype)  # a label read from beside its place would be refused
    spread[:, 1] = t
    for strided in (spread[:, 1], t[0].expand(6), t.flip(0).flip(0)):
        loss, gradient = run(x, strided)
        if strided is spread[:, 1] or strided.stride(0) != 0:
            assert same_bits(loss, expected[0])
            assert same_bits(gradient, expected[1])
        else:
            assert same_bits(loss, run(x, t[:1].repeat(6))[0])


def test_float32_exponentials_are_within_1_1_units():
    # With lse = 0 and scale = 1 the gradient of every class but the target's is exp(x) itself.
    x = torch.cat(
        [torch.linspace(-87.3, 0, 20000), -torch.rand(5000), torch.tensor([-88.0, -1e30, -math.inf])]
    )
    sums, one = torch.tensor([[0.0], [1.0]]), torch.ones(1)
    arguments = (torch.tensor([len(x)]), None, None, -100, 0.0, 0.0, 0.0, 1.0, sums, one, "")
    gradient = torch.ops.superfine.cross_entropy_backward(torch.cat([x, torch.zeros(1)])[None], *arguments)[
        0, :-1
    ]
    exact = x.double().exp()
    ulp = torch.exp2(exact.float().log2().floor().double() - 23)
    normal = slice(0, 25000)
    assert ((gradient.double() - exact).abs()[normal] <= 1.1 * ulp[normal]).all()
    assert (gradient[25000:] == 0).all()


# --- infinities and NaN --------------------


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_vocabulary_is_as_in_torch(dtype, label_smoothing, reduction):
    # Whole blocks of -inf before, between and after finite logits, and a row with a single finite one.
    vocab = 3 * 4096 + 5
    x, t = logits(4, vocab, dtype), torch.tensor([vocab - 1, 10, 5000, 8])
    x[0, : 4096 + 1] = -math.inf
    x[1, 4096:] = -math.inf
    x[2, 4000:] = -math.inf
    x[2, 5000] = 1.0
    x[3] = -math.inf
    x[3, 8] = -3.0
    loss, gradient = run(x, t, reduction=reduction, label_smoothing=label_smoothing)
    expected_loss, expected_gradient = torch_in_float64(
        x, t, reduction=reduction, label_smoothing=label_smoothing
    )
    assert not expected_gradient.isnan().any()
    tolerance = GRADIENT_TOLERANCE[dtype]
    torch.testing.assert_close(
        loss.double(), expected_loss, rtol=LOSS_TOLERANCE[dtype], atol=LOSS_TOLERANCE[dtype]
    )
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)
    if label_smoothing == 0:
        assert (gradient[x == -math.inf] == 0).all()


@pytest.mark.parametrize("offset", [-5.0, -88.7, -104.0, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_of_minus_infinity_before_very_negative_logits(dtype, offset):
    # Relative to the maximum, whatever stands for the maximum of an empty block may be far above it.
    offset = offset * 8 if dtype == torch.float64 else offset  # float64 exponentials overflow at 709, not 88
    x = torch.full((1, 4096 + 10), offset, dtype=dtype)
    x[:, :4096] = -math.inf
    loss, gradient = run(x, torch.tensor([4100]))
    torch.testing.assert_close(loss.item(), math.log(10), rtol=1e-5, atol=1e-5)
    expected = torch.full((4106,), 0.1, dtype=dtype)
    expected[:4096] = 0
    expected[4100] -= 1
    torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=1e-6)


def test_infinite_losses_are_those_of_torch():
    x = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, -math.inf]])
    t = torch.tensor([1, 0])
    for label_smoothing in (0.0, 0.1):
        loss, _ = run(x, t, reduction="none", label_smoothing=label_smoothing)
        expected, _ = torch_in_float64(x, t, reduction="none", label_smoothing=label_smoothing)
        assert loss[0] == math.inf
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70, 4097])  # in a full group, in a second block, in a tail
def test_a_row_beyond_saving_spoils_no_other(place, bad, reduction):
    x, t = logits(3, 4100, torch.float32), labels(3, 4100)
    clean_loss, clean_gradient = run(x, t, reduction="none")
    x[1] = -math.inf if bad == -math.inf else x[1]
    x[1, place] = bad
    loss, gradient = run(x, t, reduction=reduction)
    assert loss.isnan().any()
    assert gradient[1].isnan().any()
    if reduction == "none":
        assert loss.isnan().tolist() == [False, True, False]
        assert same_bits(loss[::2], clean_loss[::2])
    torch.testing.assert_close(gradient[::2], clean_gradient[::2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2, 0])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(garbage, ignore_index, inplace):
    x, t = logits(4, 9, torch.float32), torch.tensor([1, ignore_index, 3, ignore_index])
    expected_loss, expected_gradient = run(x[::2], t[::2], ignore_index=ignore_index, label_smoothing=0.1)
    x[1::2] = garbage
    loss, gradient = run(x, t, ignore_index=ignore_index, label_smoothing=0.1, inplace=inplace)
    assert same_bits(loss, expected_loss)
    assert same_bits(gradient[::2], expected_gradient)
    assert same_bits(gradient[1::2], torch.zeros(2, 9))


@pytest.mark.parametrize("garbage", [0.0, math.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored(reduction, garbage):
    x, t = torch.full((3, 5), garbage), torch.full((3,), -100)
    loss, gradient = run(x, t, reduction=reduction)
    assert same_bits(gradient, torch.zeros(3, 5))
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert not loss.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    loss, gradient = run(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), reduction=reduction)
    expected = torch.nn.functional.cross_entropy(
        torch.empty(0, 5), torch.empty(0).long(), reduction=reduction
    )
    assert same_bits(loss, expected)
    assert gradient.shape == (0, 5)


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
def test_huge_logits(value):
    x = torch.zeros(2, 5)
    x[:, 1] = value
    loss, gradient = run(x, torch.tensor([1, 0]), reduction="none")
    expected_loss, expected_gradient = torch_in_float64(x, torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_common_offset_costs_no_accuracy(label_smoothing):
    # lse - x_t, taken after rounding lse to float32, would be off by 0.004 here.
    x, t = logits(4, 300, torch.float32) + 65536.0, labels(4, 300)
    loss, gradient = run(x, t, label_smoothing=label_smoothing)
    expected_loss, expected_gradient = torch_in_float64(x, t, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


# --- bits --------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_same_bits_on_every_instruction_set_thread_count_and_run(dtype, label_smoothing):
    # 8200 classes: two blocks and a tail that is no whole vector; a thread takes 4 of the 5 rows at a time.
    x, t, weight = logits(5, 8200, dtype), labels(5, 8200), class_weights(8200, dtype)
    x[3, :5000] = -math.inf
    x[4, 17] = math.nan
    for reduction in REDUCTIONS:
        results = []
        for backend in [*(f"cpu:{isa}" for isa in ISAS), "cpu"]:
            for count in (1, 2):
                with threads(count):
                    results.append(
                        run(
                            x,
                            t,
                            weight,
                            reduction=reduction,
                            label_smoothing=label_smoothing,
                            backend=backend,
                        )
                    )
        for loss, gradient in results[1:]:
            assert same_bits(loss, results[0][0])
            assert same_bits(gradient, results[0][1])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [(torch.float32, 1031), (torch.float32, 13), (torch.bfloat16, 2053), (torch.float64, 1025)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_too_large_for_the_caches_are_the_same(reduction, dtype, vocab, label_smoothing):
    # Above 4 MiB gradients pass the caches by, on huge pages; odd rows begin and end within a line.
    rows = HUGE_PAGE_BYTES // (vocab * dtype.itemsize) + 2
    x, t, weight = logits(rows, vocab, dtype), labels(rows, vocab), class_weights(vocab, dtype)
    half = rows // 2
    assert x.nbytes > HUGE_PAGE_BYTES > x[half:].nbytes
    upstream = torch.rand(rows) if reduction == "none" else None
    options = {"reduction": "sum" if reduction == "mean" else "none", "label_smoothing": label_smoothing}
    _, gradient = run(x, t, weight, **options, upstream=upstream)
    for part in (slice(0, half), slice(half, rows)):
        _, small = run(
            x[part], t[part], weight, **options, upstream=None if upstream is None else upstream[part]
        )
        assert same_bits(gradient[part], small)


@pytest.mark.parametrize("num_items", [7, 2.5, torch.tensor(7), torch.tensor([2.5], dtype=torch.float64)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_num_items_divides_the_sum(dtype, inplace, num_items):
    leaf = torch.randn(5, 9).to(dtype).requires_grad_()
    target = torch.tensor([1, -100, 3, 8, 0])
    loss = cross_entropy(1 * leaf, target, num_items=num_items, inplace=inplace)
    (actual,) = torch.autograd.grad(loss, leaf)
    expected = torch.nn.functional.cross_entropy(leaf.float(), target, reduction="sum") / float(num_items)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaf)[0])


def test_with_num_items_a_loss_of_ignored_labels_is_zero():
    x = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(x, torch.full((3,), -100), num_items=12)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("num_items", "reduction", "message"),
    [
        (0, "mean", r"num_items is 0 .* expected a finite number above 0"),
        (-1.0, "mean", "num_items is -1.0"),
        (float("nan"), "mean", "num_items is nan"),
        (torch.tensor(0), "mean", r"num_items is int64 \(\) on cpu; expected a finite number above 0"),
        (
            torch.ones(2),
            "mean",
            r"num_items is float32 \(2,\) on cpu; expected a number, or a tensor of one element",
        ),
        (torch.ones((), requires_grad=True), "mean", "num_items is .* expected a constant"),
        (4, "sum", "num_items is 4 .* expected None beside a reduction that is not 'mean'"),
        (4, "none", "num_items is 4"),
    ],
)
def test_bad_num_items_are_refused(num_items, reduction, message):
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), num_items=num_items, reduction=reduction)
