"""The Triton kernels of cross-entropy, in Triton's interpreter, against eager torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    class_weights,
    cross_entropy_in_float64,
    labels,
    logits,
)

from superfine_kernels._library import opmath_dtype
from superfine_kernels._losses import Options, Rows
from superfine_kernels.triton.cross_entropy import MAX_BLOCK, cross_entropy_backward, cross_entropy_forward

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # numpy's nanmax, in the interpreter's tl.max
]

ROWS = 4
# One class, a tail in a block, a block of odd size, exactly one block, and a second one of a single class.
VOCABS = [1, 3, 33, MAX_BLOCK, MAX_BLOCK + 1]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype)


def labelled(x, t, w=None, **options) -> Rows:
    return Rows(x, t, None, w, Options(**options))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_agrees_with_torch_in_float64(dtype, vocab, label_smoothing, weighted):
    x, t = logits(ROWS, vocab, dtype), labels(ROWS, vocab)
    t[1] = -100
    w = class_weights(vocab, dtype) if weighted else None
    scale = torch.tensor([0.5, 2.0, -1.0, 0.25], dtype=opmath_dtype(dtype))
    expected_losses, expected_lse, expected_gradient = cross_entropy_in_float64(
        x, t, w, label_smoothing, scale
    )

    dlogits, rows = poisoned(x), labelled(x, t, w, label_smoothing=label_smoothing)
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    losses, lse, _ = results
    recomputed = cross_entropy_backward(rows, results[1:], scale)

    tolerance = LOSS_TOLERANCE[dtype]
    assert results.dtype == opmath_dtype(dtype)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=tolerance, atol=tolerance)
    expected_lse[1] = 0
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    for gradient in (dlogits, recomputed):
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.double(),
            expected_gradient,
            rtol=GRADIENT_TOLERANCE[dtype],
            atol=GRADIENT_TOLERANCE[dtype],
        )
        assert not gradient[1].any()


def test_one_scale_for_all_rows_and_none_without_gradient():
    x, t, one = logits(ROWS, 50, torch.float32), labels(ROWS, 50), torch.tensor(0.125)
    expected_losses, _, expected = cross_entropy_in_float64(x, t, None, 0.0, one.expand(ROWS))
    results = cross_entropy_forward(labelled(x, t))
    torch.testing.assert_close(results[0].double(), expected_losses, rtol=1e-5, atol=1e-5)
    for scale in (one, one.reshape(1)):
        gradient = cross_entropy_backward(labelled(x, t), results[1:], scale)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_in_place_equals_out_of_place(label_smoothing):
    x, t, scale = logits(ROWS, MAX_BLOCK + 7, torch.float32), labels(ROWS, MAX_BLOCK + 7), torch.rand(ROWS)
    rows, expected = labelled(x, t, label_smoothing=label_smoothing), poisoned(x)
    expected_results = cross_entropy_forward(rows, dlogits=expected, scale=scale)
    results = cross_entropy_forward(rows, dlogits=x, scale=scale)
    assert torch.equal(results, expected_results)
    assert torch.equal(x, expected)


def test_strided_rows_and_labels_touch_nothing_beside_them():
    vocab = 37
    wide, all_labels = logits(ROWS, 48, torch.float32), labels(2 * ROWS, vocab).int()
    x, t = wide[:, 5 : 5 + vocab], all_labels[::2]
    scale = torch.ones(ROWS)
    expected_losses, _, expected = cross_entropy_in_float64(x, t, None, 0.0, scale)
    before = wide.clone()
    losses = cross_entropy_forward(labelled(x, t), dlogits=x, scale=scale)[0]
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide[:, :5], before[:, :5])
    assert torch.equal(wide[:, 5 + vocab :], before[:, 5 + vocab :])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("ignore_index", [-100, 2, 1])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(garbage, ignore_index):
    x, t = logits(ROWS, 9, torch.float32), torch.tensor([0, ignore_index, 3, ignore_index])
    x[1], x[3] = garbage, garbage
    scale = torch.tensor(float("inf"))  # 1 / denominator, where every row is ignored
    rows, dlogits = labelled(x, t, ignore_index=ignore_index, label_smoothing=0.1, z_loss=0.1), poisoned(x)
    results = cross_entropy_forward(rows, statistics=True, dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(rows, results[1:3], scale)
    assert not results[:, [1, 3]].any()
    for gradient in (dlogits, recomputed):
        assert not gradient[[1, 3]].any()


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1, 2**40, -(2**40)])
def test_labels_out_of_range_give_nan_and_no_stray_access(bad):
    x, t = logits(ROWS, 9, torch.float32), torch.tensor([0, bad, 3, 8])
    w, scale = class_weights(9, torch.float32), torch.ones(ROWS)
    expected = cross_entropy_in_float64(x[[0, 2, 3]], t[[0, 2, 3]], w, 0.1, scale[:3])
    rows, dlogits = labelled(x, t, w, label_smoothing=0.1), poisoned(x)
    results = cross_entropy_forward(rows, statistics=True, dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(rows, results[1:3], scale)
    assert results[:, 1].isnan().all()
    assert dlogits[1].isnan().all()
    assert recomputed[1].isnan().all()
    torch.testing.assert_close(results[0, [0, 2, 3]].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits[[0, 2, 3]].double(), expected[2], rtol=1e-5, atol=1e-6)


def test_minus_infinity_logits_alone_and_in_whole_blocks():
    vocab = 2 * MAX_BLOCK + 5
    x, t, scale = logits(3, vocab, torch.float32), torch.tensor([vocab - 1, vocab - 2, 7]), torch.ones(3)
    x[0, : MAX_BLOCK + 1] = -math.inf  # the running maximum starts at -inf, and stays there for a block
    x[1, -MAX_BLOCK // 2 : -4] = -math.inf
    x[2, 8:] = -math.inf
    expected_losses, expected_lse, expected = cross_entropy_in_float64(x, t, None, 0.0, scale)
    dlogits = poisoned(x)
    losses, lse, _ = cross_entropy_forward(labelled(x, t), dlogits=dlogits, scale=scale)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits.double(), expected, rtol=1e-5, atol=1e-6)
    assert not dlogits[0, : MAX_BLOCK + 1].any()


def test_infinite_losses_are_those_of_torch():
    x, t = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, -math.inf]]), torch.tensor([1, 0])
    assert cross_entropy_forward(labelled(x, t))[0, 0] == math.inf
    smoothed = cross_entropy_forward(labelled(x, t, label_smoothing=0.1))[0]
    expected = torch.nn.functional.cross_entropy(x, t, reduction="none", label_smoothing=0.1)
    assert torch.equal(smoothed, expected)  # both infinite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"])
def test_a_row_beyond_saving_spoils_no_other(bad):
    x, t, scale = logits(3, 40, torch.float32), labels(3, 40), torch.ones(3)
    if bad == "all -inf":
        x[1] = -math.inf
    else:
        x[1, 20] = bad
    dlogits = poisoned(x)
    results = cross_entropy_forward(labelled(x, t), dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(labelled(x, t), results[1:], scale)
    assert results[0].isnan().tolist() == [False, True, False]
    for gradient in (dlogits, recomputed):
        assert gradient[1].isnan().any()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_common_offset_costs_no_accuracy(label_smoothing):
    # lse - x_t, taken after rounding lse to float32, would be off by 0.004 here.
    x, t, scale = logits(ROWS, 300, torch.float32) + 65536.0, labels(ROWS, 300), torch.ones(ROWS)
    expected_losses, _, expected = cross_entropy_in_float64(x, t, None, label_smoothing, scale)
    rows, dlogits = labelled(x, t, label_smoothing=label_smoothing), poisoned(x)
    losses = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)[0]
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits.double(), expected, rtol=1e-5, atol=1e-6)


def test_logits_near_the_largest_number_have_a_loss():
    # The square of lse overflows; without z-loss it does not count.
    x, t = torch.tensor([[1e30, -1e30, 1e30], [-3e38, 0.0, 1.0]]), torch.tensor([0, 1])
    expected, _, _ = cross_entropy_in_float64(x, t, None, 0.0, torch.ones(2))
    torch.testing.assert_close(cross_entropy_forward(labelled(x, t))[0].double(), expected)


def test_no_rows():
    rows = labelled(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert cross_entropy_forward(rows).shape == (3, 0)
    assert cross_entropy_forward(rows, statistics=True).shape == (6, 0)
    assert cross_entropy_backward(rows, torch.empty(2, 0), torch.ones(())).shape == (0, 5)


GOOD = {
    "input": torch.zeros(2, 5),
    "target": torch.zeros(2, dtype=torch.int64),
    "probabilities": None,
    "weight": None,
    "options": Options(),
}
GRADIENT = {"dlogits": torch.zeros(2, 5), "scale": torch.ones(())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 5).int()}, r"input is int32 \(2, 5\) on cpu; expected floating-point"),
        ({"input": torch.zeros(5)}, r"input is float32 \(5,\)"),
        ({"input": torch.zeros(2, 0)}, r"input is float32 \(2, 0\)"),
        ({"input": torch.zeros(5, 2).t()}, r"input.stride\(\) is \(1, 2\)"),
        (
            {"target": torch.zeros(3).long()},
            r"target is int64 \(3,\) on cpu; expected int64 or int32 \(2,\) or",
        ),
        ({"target": torch.zeros(2)}, r"target is float32"),
        ({"target": torch.zeros(3, 2).long().t()}, r"target.stride\(\) is \(1, 2\)"),
        (
            {"target": None},
            r"probabilities is None .*; expected float32 \(2, 5\) on cpu where target is None",
        ),
        ({"target": None, "probabilities": torch.zeros(2, 4)}, r"probabilities is float32 \(2, 4\)"),
        ({"target": None, "probabilities": torch.zeros(2, 5).half()}, r"probabilities is float16"),
        ({"target": None, "probabilities": torch.zeros(5, 2).t()}, r"probabilities.stride\(\) is \(1, 2\)"),
        ({"probabilities": torch.zeros(2)}, r"probabilities is float32 \(2,\)"),
        ({"weight": torch.ones(4)}, r"weight is float32 \(4,\) on cpu; expected dense float32 \(5,\)"),
        ({"weight": torch.ones(5).double()}, r"weight is float64"),
        ({"first_class": -1}, r"first_class is -1"),
        ({"classes": 7, "first_class": 3}, r"first_class is 3 .*; expected 0 to 2: 5 classes of 7"),
        ({"classes": 4}, r"first_class is 0"),
        ({"classes": 6}, r"classes is 6 .*cross_entropy_part"),
        ({"options": Options(label_smoothing=1.5)}, r"label_smoothing is 1.5"),
        ({"options": Options(z_loss=-1.0)}, r"z_loss is -1.0"),
        ({"options": Options(softcap=-1.0)}, r"softcap is -1.0"),
        ({"options": Options(scale=0.0)}, r"scale is 0.0"),
        ({"dlogits": torch.zeros(2, 4)}, r"dlogits is float32 \(2, 4\)"),
        ({"dlogits": torch.zeros(2, 5).bfloat16()}, r"dlogits is bfloat16"),
        ({"dlogits": torch.zeros(5, 2).t()}, r"dlogits.stride\(\) is \(1, 2\)"),
        ({"scale": None}, r"scale is None"),
        ({"scale": torch.ones(3)}, r"scale is float32 \(3,\)"),
        ({"scale": torch.ones(()).double()}, r"scale is float64"),
        ({"statistics": True, "target": torch.zeros(2, 3).long()}, r"statistics is True .* one label a row"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    rest = {key: value for key, value in {**GRADIENT, **change}.items() if key in ("statistics", *GRADIENT)}
    rows = Rows(**{**GOOD, **{key: value for key, value in change.items() if key not in rest}})
    with pytest.raises(ValueError, match="cross_entropy_forward: " + message):
        cross_entropy_forward(rows, **rest)


def test_backward_refuses_sums_of_another_shape():
    with pytest.raises(ValueError, match=r"cross_entropy_backward: sums is float32 \(3, 2\)"):
        cross_entropy_backward(Rows(**GOOD), torch.zeros(3, 2), torch.ones(()))
