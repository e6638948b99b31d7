"""Targets, options, statistics and parts in the Triton kernels of cross-entropy, against the formula in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton_interpreter
from kernel_cases import GRADIENT_TOLERANCE, LOGIT_DTYPES, LOSS_TOLERANCE, class_weights, labels, logits

from superfine_kernels import _cross_entropy_backends as backends
from superfine_kernels import cross_entropy, linear_cross_entropy
from superfine_kernels._class_tiles import join, row_results
from superfine_kernels._library import opmath_dtype
from superfine_kernels._losses import Options, Rows
from superfine_kernels.triton.cross_entropy import (
    MAX_BLOCK,
    MAX_SLOTS,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_part,
)

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # numpy's nanmax, in the interpreter's tl.max
]

ROWS = 4
INF = math.inf


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


def case(
    kind: str,
    vocab: int = 300,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    targets: int = 5,
    **options: float,
) -> Rows:
    """Labels, slots (with probabilities, or with 1 for each) or probabilities of all classes; seeded by the sizes."""
    x, w = logits(ROWS, vocab, dtype), class_weights(vocab, dtype) if weighted else None
    generator = torch.Generator().manual_seed(vocab)
    target: Tensor | None = labels(ROWS, vocab)
    probabilities = None
    if kind == "dense":
        target, probabilities = None, 3 * torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64)
    elif kind.startswith("slots"):
        target = torch.randint(0, vocab, (ROWS, targets), generator=generator)
        target[0, -1] = -100
        probabilities = torch.randn(ROWS, targets, generator=generator, dtype=torch.float64)
        probabilities = probabilities if kind == "slots" else None
    if probabilities is not None:
        probabilities = probabilities.softmax(1).to(opmath_dtype(dtype))
    return Rows(x, target, probabilities, w, Options(**options))


def value_of_classes(rows: Rows) -> Tensor:
    """v in float64: rows x classes."""
    classes = rows.classes or rows.input.shape[1]
    options, count = rows.options, len(rows.input)
    if rows.target is None:
        q = rows.probabilities.double()
        counted = torch.ones(count, dtype=torch.bool)
    else:
        target = rows.target.reshape(count, -1).long()
        p = (
            torch.ones(target.shape).double()
            if rows.probabilities is None
            else rows.probabilities.double().clone()
        )
        slots = target != options.ignore_index
        counted = slots.any(1)
        inside = slots & (target >= 0) & (target < classes)
        q = torch.zeros(count, classes).double()
        q.scatter_add_(1, target.clamp(0, classes - 1), torch.where(inside, p, 0.0))
    w = torch.ones(classes).double() if rows.weight is None else rows.weight.double()
    v = w * ((1 - options.label_smoothing) * q + options.label_smoothing / classes)
    return torch.where(counted[:, None], v, 0.0)


def in_float64(rows: Rows, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, mass, and `scale` times dloss/dinput, by the formula of csrc/math/cross_entropy.h and autograd."""
    options, v = rows.options, value_of_classes(rows)
    counted = v.sum(1) != 0
    x = rows.input.double().requires_grad_()
    y = options.transform(x)
    lse = torch.where(counted, y.logsumexp(1), 0.0)
    of_classes = torch.where(v == 0, 0.0, v * (lse[:, None] - y))
    loss = of_classes.sum(1) + options.z_loss * lse**2
    (gradient,) = torch.autograd.grad((loss * scale.double()).sum(), x)
    return loss.detach(), lse.detach(), v.sum(1), gradient


def assert_agrees(rows: Rows) -> None:
    """Results, and the gradient of forward, in place and not, and of backward."""
    dtype = rows.input.dtype
    scale = torch.tensor([0.5, 2.0, -1.0, 0.25][: len(rows.input)], dtype=opmath_dtype(dtype))
    *expected, expected_gradient = in_float64(rows, scale)
    dlogits = torch.full(rows.input.shape, float("nan"), dtype=dtype)
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    assert torch.equal(cross_entropy_forward(rows), results)
    recomputed = cross_entropy_backward(rows, results[1:], scale)

    tolerance = LOSS_TOLERANCE[dtype]
    assert results.dtype == opmath_dtype(dtype)
    torch.testing.assert_close(results.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)
    tolerance = GRADIENT_TOLERANCE[dtype]
    for gradient in (dlogits, recomputed):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=4 * tolerance, atol=tolerance)

    overwritten = dataclasses.replace(rows, input=rows.input.clone())
    assert torch.equal(cross_entropy_forward(overwritten, dlogits=overwritten.input, scale=scale), results)
    assert torch.equal(overwritten.input, dlogits)
    overwritten = dataclasses.replace(rows, input=rows.input.clone())
    cross_entropy_backward(overwritten, results[1:], scale, overwritten.input)
    assert torch.equal(overwritten.input, recomputed)


# --- targets and options ------------------------------------------------------------------------------------

ALONE = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"scale": 0.3}, {"softcap": 5.0}]
TOGETHER = {"label_smoothing": 0.2, "z_loss": 1e-2, "scale": 1.7, "softcap": 4.0}
KINDS = ["label", "slots", "slots of 1", "dense"]


@pytest.mark.parametrize("options", [*ALONE, TOGETHER], ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_agrees_with_the_formula(kind, options):
    assert_agrees(case(kind, **options))


# A constant, a tail in a block, and a second block; every pair of dtype, kind and size, but not all three together.
@pytest.mark.parametrize(
    ("dtype", "kind", "vocab"),
    [
        (dtype, kind, [1, 7, MAX_BLOCK + 1][(i + j) % 3])
        for i, dtype in enumerate(LOGIT_DTYPES)
        for j, kind in enumerate(KINDS)
    ],
)
def test_all_options_together_with_weights_in_every_dtype(dtype, kind, vocab):
    assert_agrees(case(kind, vocab, dtype, weighted=True, **TOGETHER))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_of_all_classes_agree_with_torch(weighted, label_smoothing):
    rows = case("dense", 50, torch.float64, weighted, label_smoothing=label_smoothing)
    expected = torch.nn.functional.cross_entropy(
        rows.input, rows.probabilities, rows.weight, reduction="none", label_smoothing=label_smoothing
    )
    torch.testing.assert_close(cross_entropy_forward(rows)[0], expected)


# One slot, a tail, exactly one pass over them, and a second and third pass; of 11 classes most are in several slots.
@pytest.mark.parametrize(
    ("targets", "vocab"),
    [(1, 11), (2, 500), (5, 11), (MAX_SLOTS, 500), (MAX_SLOTS + 1, 11), (2 * MAX_SLOTS + 1, 500)],
)
def test_any_number_of_slots_and_classes_in_several_of_them(targets, vocab):
    assert_agrees(case("slots", vocab, targets=targets, weighted=True, label_smoothing=0.1, softcap=10.0))


def test_slots_say_the_same_as_probabilities_of_all_classes():
    slots = case("slots", 40, weighted=True, **TOGETHER)
    q = torch.zeros(ROWS, 40).scatter_add_(
        1, slots.target.clamp(min=0), torch.where(slots.target < 0, 0.0, slots.probabilities)
    )
    dense = dataclasses.replace(slots, target=None, probabilities=q)
    torch.testing.assert_close(cross_entropy_forward(slots), cross_entropy_forward(dense))


def test_ignored_slots_add_nothing_and_rows_of_them_are_zero():
    rows = case("slots", 9, z_loss=0.1, label_smoothing=0.1)
    rows.target[1] = -100
    rows.target[2, 1:] = -100
    rows.probabilities[1] = math.nan
    rows.probabilities[2, 1:] = math.nan
    rows.input[1] = math.nan
    dlogits, scale = torch.full_like(rows.input, math.nan), torch.ones(())
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(rows, results[1:], scale)
    one = Rows(rows.input[2:3], rows.target[2:3, :1], rows.probabilities[2:3, :1], None, rows.options)
    torch.testing.assert_close(results[:, 2:3], cross_entropy_forward(one))
    assert results.isfinite().all()
    assert not results[:, 1].any()
    for gradient in (dlogits, recomputed):
        assert not gradient[1].any()
        assert gradient.isfinite().all()


def test_rows_without_slots_are_ignored():
    for probabilities in (None, torch.empty(2, 0)):
        none = torch.empty(2, 0, dtype=torch.int64)
        rows = Rows(torch.randn(2, 5), none, probabilities, None, Options(z_loss=1.0))
        dlogits = torch.full_like(rows.input, math.nan)
        assert not cross_entropy_forward(rows, dlogits=dlogits, scale=torch.ones(())).any()
        assert not dlogits.any()


@pytest.mark.parametrize(("bad", "targets"), [(-1, 3), (9, 3), (2**40, 3), (9, MAX_SLOTS + 3)])
def test_slots_out_of_range_give_nan_and_no_stray_access(targets, bad):
    rows = case("slots", 9, targets=targets, weighted=True, label_smoothing=0.1)
    expected = cross_entropy_forward(rows)
    rows.target[1, targets // 2] = bad
    dlogits, scale = torch.zeros_like(rows.input), torch.ones(())
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(rows, results[1:], scale)
    part = cross_entropy_part(rows)
    others = [0, 2, 3]
    assert torch.equal(results[:, others], expected[:, others])
    assert results[:, 1].isnan().all()
    assert part[2].isnan().tolist() == [False, True, False, False]
    for gradient in (dlogits, recomputed):
        assert gradient[1].isnan().all()
        assert gradient[others].isfinite().all()


def test_strided_targets_probabilities_and_logits_touch_nothing_beside_them():
    rows = case("slots", 37, **TOGETHER)
    wide = logits(ROWS, 48, torch.float32)
    target = torch.full((2 * ROWS, 9), 12345, dtype=torch.int32)
    probabilities = torch.full((ROWS, 8), math.nan)
    target[::2, 2:7], probabilities[:, 1:6] = rows.target.int(), rows.probabilities
    apart = Rows(wide[:, 5:42], target[::2, 2:7], probabilities[:, 1:6], None, rows.options)
    dense = dataclasses.replace(rows, input=wide[:, 5:42].clone())
    expected, gradient = torch.empty_like(dense.input), torch.ones(())
    results = cross_entropy_forward(dense, dlogits=expected, scale=gradient)
    before = wide.clone()
    assert torch.equal(cross_entropy_forward(apart, dlogits=apart.input, scale=gradient), results)
    assert torch.equal(wide[:, 5:42], expected)
    assert torch.equal(wide[:, :5], before[:, :5])
    assert torch.equal(wide[:, 42:], before[:, 42:])


# --- numbers at the edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["label", "slots", "dense"])
def test_minus_infinity_logits_of_classes_that_no_one_wants(kind):
    rows = case(kind, 2 * MAX_BLOCK + 5)
    v = value_of_classes(rows)
    rows.input[0, :MAX_BLOCK] = -INF  # a whole block before there is a maximum
    rows.input[1, 100:-3] = -INF
    rows.input[v != 0] = 0.0
    if kind == "dense":
        finite = case(kind, 2 * MAX_BLOCK + 5)
        assert_agrees(finite)
        rows.input.copy_(finite.input)
        rows.probabilities[:, 7] = 0
        rows.input[2, 7] = -INF
        results = cross_entropy_forward(rows)[0]
        assert results.isnan().tolist() == [False, False, True, False]  # 0 * -inf, as in torch
        return
    assert_agrees(rows)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_infinite_losses_of_probabilities_are_those_of_torch(options):
    x = torch.tensor([[0.0, -INF, 1.0], [0.0, 1.0, -INF], [-INF, -INF, -INF], [INF, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    expected = torch.nn.functional.cross_entropy(x, q, reduction="none", **options)
    losses = cross_entropy_forward(Rows(x, None, q, None, Options(**options)))[0]
    torch.testing.assert_close(losses, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_spoils_its_row_alone(kind):
    rows, scale = case(kind, 40, **TOGETHER), torch.ones(())
    rows.input[1, 20] = math.nan
    dlogits = torch.zeros_like(rows.input)
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    recomputed = cross_entropy_backward(rows, results[1:], scale)
    assert results[0].isnan().tolist() == [False, True, False, False]
    for gradient in (dlogits, recomputed):
        assert gradient[1].isnan().any()
        assert gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_costs_no_accuracy(kind):
    rows, scale = case(kind, MAX_BLOCK + 300, label_smoothing=0.1, weighted=True), torch.ones(ROWS)
    rows.input.add_(65536.0)
    loss, _, _, gradient = in_float64(rows, scale)
    dlogits = torch.zeros_like(rows.input)
    results = cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    torch.testing.assert_close(results[0].double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_softcap_and_its_slope_have_all_digits():
    # Small logits, where 1 - exp cancels, and ones where tanh is nearly 1 and 1 - tanh^2 would cancel.
    x = torch.tensor([[1e-20, -1e-6, 1e-3, 0.3, 0.7, -2.0, 8.0, -12.0, 30.0, -INF, INF]])
    one, options = torch.ones(()), Options(softcap=1.0)
    for dtype, digits in ((torch.float32, 1e-6), (torch.float64, 2e-15)):
        capped = torch.tanh(x.to(dtype).double())[0]
        at_classes = torch.stack(
            [
                cross_entropy_part(
                    Rows(x.to(dtype), torch.tensor([c]), None, None, options), statistics=True
                )[5, 0]
                for c in range(x.shape[1])
            ]
        )
        torch.testing.assert_close(at_classes.double(), capped, rtol=digits, atol=0)
        # Of the gradient, v times the slope is what remains where lse is far above.
        q = torch.ones(x.shape, dtype=opmath_dtype(dtype))
        sums = torch.tensor([[1e4], [1.0]], dtype=opmath_dtype(dtype))
        rows = Rows(x.to(dtype), None, q, None, options)
        slope = -cross_entropy_backward(rows, sums, one.to(opmath_dtype(dtype)))[0].double()
        expected = 1 / torch.cosh(x.to(dtype).double())[0] ** 2
        torch.testing.assert_close(slope, expected, rtol=digits, atol=0)


# --- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, TOGETHER], ids=["plain", "together"])
@pytest.mark.parametrize("vocab", [1, 33, 2 * MAX_BLOCK + 1])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_statistics_agree_with_torch_in_float64(dtype, vocab, options):
    rows = case("label", vocab, dtype, weighted=True, **options)
    rows.target[1] = -100
    rows.input[2, vocab // 2 :] = 3.0  # the first of equals is the largest
    rows.target[2] = vocab // 2
    rows.target[3] = rows.input[3].double().argmax()
    results = cross_entropy_forward(rows, statistics=True)
    assert torch.equal(results[:3], cross_entropy_forward(rows))
    y = rows.options.transform(rows.input.double())
    logp = y.log_softmax(1)
    counted = torch.tensor([True, False, True, True])
    expected = torch.stack(
        [
            torch.where(counted, logp.gather(1, rows.target.clamp(min=0)[:, None])[:, 0], 0.0),
            torch.where(counted, -(logp.exp() * logp).sum(1), 0.0),
            torch.where(counted, y.argmax(1) == rows.target, False).double(),
        ]
    )
    torch.testing.assert_close(results[3:].double(), expected, rtol=LOSS_TOLERANCE[dtype], atol=1e-5)
    assert results[5, 3] == 1


def test_statistics_with_masked_classes():
    x = torch.full((3, MAX_BLOCK + 3), -INF)
    x[0, 5], x[0, MAX_BLOCK + 1] = 1.0, 2.0  # two blocks with one class each
    x[1, MAX_BLOCK:] = 0.0  # a block without any
    x[2, 7] = -3e38
    t = torch.tensor([MAX_BLOCK + 1, MAX_BLOCK + 1, 7])
    logprob, entropy, correct = cross_entropy_forward(Rows(x, t, None, None, Options()), statistics=True)[3:]
    p = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(
        logprob, torch.stack([p[1].log(), torch.tensor(1 / 3).log(), torch.tensor(0.0)])
    )
    torch.testing.assert_close(
        entropy, torch.stack([-(p * p.log()).sum(), torch.tensor(3.0).log(), torch.tensor(0.0)])
    )
    assert correct.tolist() == [1, 0, 1]


# --- parts ----------------------------------------------------------------------------------------------------

# One class, less than a block, a block and a tail; the rest.
BOUNDS = [0, 1, 8, 2 * MAX_BLOCK - 100, 2 * MAX_BLOCK]


def parts_of(rows: Rows) -> list[Rows]:
    return [
        dataclasses.replace(
            rows, input=rows.input[:, first:end].clone(), first_class=first, classes=BOUNDS[-1]
        )
        for first, end in itertools.pairwise(BOUNDS)
    ]


def divided(kind: str, weighted: bool, options: dict[str, float]) -> Rows:
    """Rows for `parts_of`: one ignored, one with a part without a maximum, one of equals in two parts."""
    rows = case(kind, BOUNDS[-1], weighted=weighted, **options)
    if rows.target is not None:
        rows.target[1] = -100
        rows.target[2:] = rows.target[2:].remainder(8)
        rows.target[3, ...] = 3
    # -inf where no one wants a class of the part, or else far below.
    wanted = value_of_classes(rows)[2, 1:8].any()
    rows.input[2, 1:8] = -40.0 if wanted else -INF
    rows.input[3, [3, 2000]] = rows.input[3].max() + 1
    return rows


@pytest.mark.parametrize(
    ("weighted", "options"),
    [(False, {}), (False, {"softcap": 5.0}), (True, TOGETHER)],
    ids=["plain", "softcap", "together"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_together_are_the_whole(kind, weighted, options):
    rows, statistics = divided(kind, weighted, options), kind == "label"
    whole = cross_entropy_forward(rows, statistics=statistics)
    parts = torch.stack([cross_entropy_part(part, statistics=statistics) for part in parts_of(rows)])
    joined = row_results(join(parts), rows.target, rows.options)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
    if statistics:
        assert whole[5, 3] == 1

    scale = torch.tensor([0.5, 2.0, -1.0, 0.25])
    expected = cross_entropy_backward(rows, whole[1:3], scale)
    gradients = []
    for part in parts_of(rows):
        gradients.append(cross_entropy_backward(part, whole[1:3], scale))
        cross_entropy_backward(part, whole[1:3], scale, part.input)
        assert torch.equal(part.input, gradients[-1])
    # A class in several slots: their sum is taken in another order where a block has other sizes.
    torch.testing.assert_close(torch.cat(gradients, 1), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, TOGETHER], ids=["plain", "together"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_cpu_kernels(kind, options):
    rows, statistics = divided(kind, True, options), kind == "label"
    sums, scale = cross_entropy_forward(rows)[1:], torch.tensor(0.5)
    for part in parts_of(rows):
        triton, cpu = (backends.part(part, statistics, name) for name in ("triton", "cpu"))
        torch.testing.assert_close(triton, cpu, rtol=1e-5, atol=1e-5)
        gradients = []
        for name in ("triton", "cpu"):
            gradients.append(torch.full_like(part.input, math.nan))
            backends.gradient_to(part, sums, scale, gradients[-1], name)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_parts_of_rows_that_do_not_count():
    t = torch.tensor([-100, 12, 3])
    rows = Rows(torch.randn(3, 4), t, None, None, Options(label_smoothing=0.1), first_class=2, classes=10)
    results = cross_entropy_part(rows, statistics=True)
    assert results[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert results[2, 1].isnan()
    assert results[:, 2].isfinite().all()
    sums = torch.zeros(2, 3)
    gradient = cross_entropy_backward(rows, sums, torch.ones(()))
    assert not gradient[0].any()
    assert gradient[1].isnan().all()


# --- the ops --------------------------------------------------------------------------------------------------


@pytest.fixture
def _on_cpu_tensors(monkeypatch):
    monkeypatch.setattr("superfine_kernels._backends._serves", lambda backend, device: True)


@pytest.mark.usefixtures("_on_cpu_tensors")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:])
def test_cross_entropy_through_these_kernels(kind, reduction):
    rows, options = case(kind, 60, weighted=True), {**TOGETHER, "return_stats": kind == "label"}
    target = rows.probabilities if kind == "dense" else rows.target
    options["probabilities"] = rows.probabilities if kind == "slots" else None
    found = []
    for backend in ("triton", "reference"):
        x = rows.input.clone().requires_grad_()
        result = cross_entropy(x, target, rows.weight, reduction=reduction, **options, backend=backend)
        loss, statistics = result if options["return_stats"] else (result, ())
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        found.append([loss, gradient, *statistics])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_on_cpu_tensors")
def test_linear_cross_entropy_through_these_kernels():
    input, head = torch.randn(ROWS, 8), torch.randn(2500, 8)  # three tiles, and a tail in a block
    target = labels(ROWS, 2500)
    found = []
    for backend in ("triton", "cpu"):
        leaves = [input.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, target, **TOGETHER, tile_bytes=1024, backend=backend)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
