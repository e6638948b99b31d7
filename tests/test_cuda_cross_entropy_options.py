"""Targets, options, statistics and parts of cross-entropy on a GPU, CUDA C++ and Triton: against eager float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    class_weights,
    labels,
    logits,
)
from torch import Tensor

from superfine_kernels import _class_tiles
from superfine_kernels import _cross_entropy_backends as kernels
from superfine_kernels._library import opmath_dtype
from superfine_kernels._losses import (
    MEAN,
    NONE,
    ROW_RESULTS,
    Options,
    Rows,
    counted,
    reference_rows,
    reference_statistics,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ROWS = 7
OPTIONS = {
    "none": Options(),
    "smoothing": Options(label_smoothing=0.1),
    "z-loss": Options(z_loss=1e-3),
    "softcap": Options(softcap=5.0),
    "scale": Options(scale=0.3),
    "all": Options(label_smoothing=0.2, z_loss=1e-2, softcap=20.0, scale=1.5),
}
# One class; around one 16-byte pack; odd; more packs than a block has threads, Bert's.
VOCABS = [1, 7, 1001, 30522]


def case(
    kind: str, vocab: int, dtype: torch.dtype, options: Options, weighted: bool = False, targets: int = 5
) -> Rows:
    """Labels, classes by index with probabilities, or probabilities of all classes; some of them ignored."""
    real = opmath_dtype(dtype)
    x, w = logits(ROWS, vocab, dtype, DEVICE), class_weights(vocab, dtype, DEVICE) if weighted else None
    generator = torch.Generator().manual_seed(vocab)
    target: Tensor | None = labels(ROWS, vocab, DEVICE)
    probabilities = None
    if kind == "few":
        target = torch.randint(0, vocab, (ROWS, targets), generator=generator).int().to(DEVICE)
        target[:, targets // 2] = target[:, 0]  # the same class in several places
        target[0, -1] = options.ignore_index  # one place does not count
        probabilities = torch.rand(ROWS, targets + 3, generator=generator).to(DEVICE, real)[:, :targets]
    if kind == "dense":
        target = None
        probabilities = torch.rand(ROWS, vocab + 3, generator=generator).to(DEVICE, real)[:, :vocab]
    else:
        target[2] = options.ignore_index
    return Rows(x, target, probabilities, w, options)


def in_float64(rows: Rows, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, lse, and `scale` times dloss/dinput, by eager torch on the CPU."""
    target, probabilities, weight = (
        None if x is None else x.cpu() for x in (rows.target, rows.probabilities, rows.weight)
    )
    x = rows.input.detach().cpu().double().requires_grad_()
    y = rows.options.transform(x)
    wide = (x if x is None else x.double() for x in (probabilities, weight))
    losses, counts = reference_rows(y, target, *wide, rows.options)
    (gradient,) = torch.autograd.grad((losses * scale.cpu().double()).sum(), x)
    return losses.detach(), torch.where(counts, y.detach().logsumexp(1), 0.0), gradient


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def poisoned(like: Tensor) -> Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device)


def parts_of(rows: Rows, *cuts: int) -> list[Rows]:
    """The rows cut into parts of the classes, at columns of any alignment."""
    ends = sorted({0, *cuts, rows.input.shape[1]})
    return [
        Rows(rows.input[:, a:b], rows.target, rows.probabilities, rows.weight, rows.options, a, ends[-1])
        for a, b in itertools.pairwise(ends)
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_agrees_with_torch_in_float64(backend, dtype, vocab, kind, options):
    rows = case(kind, vocab, dtype, options, weighted=vocab % 2 == 1)
    scale = torch.linspace(-1, 1, ROWS, dtype=opmath_dtype(dtype), device=DEVICE)
    losses, lse, gradient = in_float64(rows, scale)
    tolerance = LOSS_TOLERANCE[dtype] * max(1.0, losses.abs().max().item() / 10)
    scaled = GRADIENT_TOLERANCE[dtype] * max(1.0, gradient.abs().max().item())

    _, results = kernels.run_forward(rows, NONE, 0.0, None, False, backend)
    assert results.shape == (ROW_RESULTS, ROWS)
    assert_close(results[0], losses, tolerance)
    assert_close(results[1], lse, tolerance)
    sums = results[1:].contiguous()
    assert_close(kernels.run_backward(rows, sums, scale, backend), gradient, scaled)
    in_place = Rows(rows.input.clone(), rows.target, rows.probabilities, rows.weight, options)
    kernels.gradient_to(in_place, sums, scale, in_place.input, backend)
    assert_close(in_place.input, gradient, scaled)

    divisor = counted(rows.target, options.ignore_index).sum().item() if kind == "few" else ROWS
    if kind != "labels":
        dlogits = poisoned(rows.input)
        loss, fused = kernels.run_forward(rows, MEAN, 0.0, dlogits, False, backend)
        assert_close(loss, losses.sum() / divisor, tolerance)
        assert_close(fused[0], losses, tolerance)
        assert_close(dlogits, in_float64(rows, torch.tensor(1 / divisor, dtype=torch.float64))[2], scaled)


# One, up to a warp's, more than a block's threads: all classes of a row, and some twice.
@pytest.mark.parametrize("targets", [1, 2, 33, 64, 700])
def test_any_number_of_classes_by_index(backend, targets):
    for vocab, options in itertools.product((9, 4100), (OPTIONS["none"], OPTIONS["all"])):
        rows = case("few", vocab, torch.float32, options, targets=targets)
        scale = torch.tensor(0.5, device=DEVICE)
        losses, _, gradient = in_float64(rows, scale)
        _, results = kernels.run_forward(rows, NONE, 0.0, None, False, backend)
        tolerance = 1e-5 * max(1.0, losses.abs().max().item())
        assert_close(results[0], losses, tolerance)
        assert_close(
            kernels.run_backward(rows, results[1:].contiguous(), scale, backend), gradient, tolerance
        )


@pytest.mark.parametrize("options", [OPTIONS["none"], OPTIONS["all"]], ids=["none", "all"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_statistics_of_labels(backend, dtype, options):
    for vocab in VOCABS:
        rows = case("labels", vocab, dtype, options)
        rows.target[0] = rows.input[0].argmax()
        rows.target[3] = vocab
        _, results = kernels.run_forward(rows, NONE, 0.0, None, True, backend)
        y, good = options.transform(rows.input.cpu().double()), [0, 1, 2, 4, 5, 6]
        expected = reference_statistics(y[good], rows.target.cpu()[good], options.ignore_index)
        assert_close(results[ROW_RESULTS:, good], expected, LOSS_TOLERANCE[dtype])
        assert not results[:, 2].any()
        assert results[:, 3].isnan().all()


def test_of_equal_logits_the_first_is_the_best(backend):
    x = torch.zeros(3, 5003, device=DEVICE)
    x[:, [700, 4500]] = 1
    target = torch.tensor([700, 4500, 0], device=DEVICE)
    for options in (Options(), OPTIONS["all"]):
        rows = Rows(x, target, None, None, options)
        assert kernels.run_forward(rows, NONE, 0.0, None, True, backend)[1][-1].tolist() == [1, 0, 0]
        best = _class_tiles.join(
            torch.stack([kernels.part(p, True, backend) for p in parts_of(rows, 1000, 4100)])
        )[-1]
        assert best.tolist() == [700] * 3


@pytest.mark.parametrize("options", [OPTIONS["none"], OPTIONS["smoothing"], OPTIONS["all"]])
@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_parts_of_the_classes_make_the_whole(backend, dtype, kind, options):
    rows, scale = case(kind, 4100, dtype, options, weighted=True), torch.tensor(0.5, device=DEVICE)
    scale = scale.to(opmath_dtype(dtype))
    statistics = kind == "labels"
    parts = parts_of(rows, 1, 13, 2048)
    joined = _class_tiles.join(torch.stack([kernels.part(p, statistics, backend) for p in parts]))
    results = _class_tiles.row_results(joined, rows.target, options)
    _, whole = kernels.run_forward(rows, NONE, 0.0, None, statistics, backend)
    tolerance = 2 * LOSS_TOLERANCE[dtype] * max(1.0, whole[0].abs().max().item() / 10)
    if kind == "few":
        results = torch.where(counted(rows.target, options.ignore_index), results, 0.0)
    assert_close(results, whole.cpu().double(), tolerance)

    sums = whole[1:ROW_RESULTS].contiguous()
    expected = kernels.run_backward(rows, sums, scale, backend).cpu().double()
    tile = torch.cat([kernels.run_backward(p, sums, scale, backend) for p in parts], dim=1)
    assert_close(tile, expected, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["labels", "few"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_ignored_and_bad_rows_whatever_they_hold(backend, dtype, kind):
    options = OPTIONS["all"]
    rows, scale = case(kind, 1003, dtype, options), torch.tensor(float("inf"), device=DEVICE)
    scale = scale.to(opmath_dtype(dtype))
    x, target = rows.input, rows.target.view(ROWS, -1)
    x[2] = float("nan")
    x[3], x[4, 5] = float("nan"), float("inf")
    for row, bad in ((0, -1), (1, 1003)):
        target[row, -1] = bad
    dlogits = poisoned(x)
    _, results = kernels.run_forward(rows, NONE, 0.0, dlogits, False, backend)
    assert results[0].isnan().tolist() == [True, True, False, True, False, False, False]
    assert results[:, :2].isnan().all()
    assert not results[:, 2].any()
    assert not dlogits[2].any()
    assert dlogits[:2].isnan().all()
    gradient = kernels.run_backward(rows, results[1:].contiguous(), scale, backend)
    assert not gradient[2].any()
    assert gradient[:2].isnan().all()
    part = kernels.part(parts_of(rows, 500)[0], False, backend)
    assert part[:, 2].tolist() == [0, 1, 0, 0]
    assert part[2, :2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_touch_nothing_beside_the_rows(backend, dtype):
    vocab, options = 1001, OPTIONS["all"]
    for shift, kind in itertools.product((0, 1, 5), ("labels", "few", "dense")):
        rows = case(kind, vocab, dtype, options)
        wide = torch.full((ROWS, 1100), 7.0, dtype=dtype, device=DEVICE)
        view = wide[:, shift : shift + vocab]
        view.copy_(rows.input)
        scale = torch.tensor(1.0, device=DEVICE)
        losses, _, gradient = in_float64(rows, scale)
        inside = Rows(view, rows.target, rows.probabilities, None, options)
        _, results = kernels.run_forward(inside, NONE, 0.0, view, False, backend)
        assert_close(results[0], losses, LOSS_TOLERANCE[dtype] * max(1.0, losses.max().item() / 10))
        assert_close(view, gradient, GRADIENT_TOLERANCE[dtype] * max(1.0, gradient.abs().max().item()))
        assert (wide[:, :shift] == 7).all()
        assert (wide[:, shift + vocab :] == 7).all()


@pytest.mark.parametrize("softcap", [2.5, 1e4])
def test_softcap_is_accurate_where_it_is_flat_and_where_it_is_not(backend, softcap):
    x = torch.tensor([[18.0, 1e-3, -17.0, 0.4]], device=DEVICE)
    rows = Rows(x, torch.tensor([1], device=DEVICE), None, None, Options(softcap=softcap))
    one = torch.tensor(1.0, device=DEVICE)
    losses, _, gradient = in_float64(rows, one)
    _, results = kernels.run_forward(rows, NONE, 0.0, None, False, backend)
    found = kernels.run_backward(rows, results[1:].contiguous(), one, backend)
    torch.testing.assert_close(results[0].cpu().double(), losses, rtol=3e-6, atol=0)
    torch.testing.assert_close(found.cpu().double(), gradient, rtol=1e-5, atol=0)
