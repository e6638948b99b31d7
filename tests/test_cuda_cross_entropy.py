"""Cross-entropy on a GPU, CUDA C++ and Triton: against eager torch in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from kernel_cases import (
    GRADIENT_TOLERANCE,
    LOGIT_DTYPES,
    LOSS_TOLERANCE,
    class_weights,
    cross_entropy_in_float64,
    labels,
    logits,
)
from torch import Tensor

import superfine_kernels
from superfine_kernels._library import DTYPE_CODES, opmath_dtype
from superfine_kernels._losses import ROW_RESULTS, Options, Rows

pytestmark = pytest.mark.gpu


def where(tensor: Tensor) -> dict[str, int]:
    return {"stream": torch.cuda.current_stream(tensor.device).cuda_stream, "device": tensor.device.index}


def labelled(x: Tensor, t: Tensor, weight: Tensor | None = None, **options: float) -> Rows:
    return Rows(x, t, None, weight, Options(**options))


def stride_of(scale: Tensor | None) -> int:
    return scale.stride(0) if scale is not None and scale.numel() > 1 else 0


def forward(backend: str, rows: Rows, dlogits: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Losses, lse and mass by one backend; results are poisoned first where the test allocates them."""
    if backend == "triton":
        from superfine_kernels.triton.cross_entropy import cross_entropy_forward

        return cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
    from superfine_kernels import _cuda

    results = poisoned(rows.new_results(ROW_RESULTS))
    _cuda.cross_entropy_forward(
        _cuda.CrossEntropy(**rows.native()), out=results.data_ptr(), statistics=False,
        dlogits=0 if dlogits is None else dlogits.data_ptr(), scale=0 if scale is None else scale.data_ptr(),
        scale_stride=stride_of(scale), **where(rows.input),
    )  # fmt: skip
    return results


def backward(
    backend: str, rows: Rows, results: Tensor, scale: Tensor, dlogits: Tensor | None = None
) -> Tensor:
    dlogits = poisoned(rows.input) if dlogits is None else dlogits
    sums = results[1:ROW_RESULTS]
    if backend == "triton":
        from superfine_kernels.triton.cross_entropy import cross_entropy_backward

        return cross_entropy_backward(rows, sums, scale, dlogits)
    from superfine_kernels import _cuda

    _cuda.cross_entropy_backward(
        _cuda.CrossEntropy(**rows.native()), sums=sums.data_ptr(), scale=scale.data_ptr(),
        scale_stride=stride_of(scale), dlogits=dlogits.data_ptr(), **where(rows.input),
    )  # fmt: skip
    return dlogits


def poisoned(like: Tensor) -> Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device)


def assert_same(backend: str, actual: Tensor, expected: Tensor) -> None:
    """Equal bits from CUDA; Triton compiles a kernel per kind of arguments, and each may fuse otherwise."""
    if backend == "cuda":
        assert torch.equal(actual, expected)
    else:
        tolerance = max(LOSS_TOLERANCE[actual.dtype], GRADIENT_TOLERANCE[actual.dtype])
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)


# --- cross-entropy --------------------------------------------------------------------------------------

# One class; below, at and above one pack; odd (every row at another alignment); more than one block's pass of
# packs; BERT's and, in float32, one whose row fits into no multiprocessor's shared memory.
VOCABS = [1, 2, 3, 7, 8, 9, 33, 1000, 4097, 30522, 128_256]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_cross_entropy_agrees_with_torch_in_float64(backend, dtype, vocab, label_smoothing, weighted):
    rows = 9
    x, t = logits(rows, vocab, dtype, "cuda"), labels(rows, vocab, "cuda")
    t[1] = -100
    w = class_weights(vocab, dtype, "cuda") if weighted else None
    scale = torch.linspace(-1, 1, rows, dtype=opmath_dtype(dtype), device="cuda")
    expected_losses, expected_lse, expected = cross_entropy_in_float64(x, t, w, label_smoothing, scale)
    expected_lse[1] = 0

    dlogits = poisoned(x)
    rows_of = functools.partial(labelled, t=t, weight=w, label_smoothing=label_smoothing)
    results = forward(backend, rows_of(x), dlogits, scale)
    alone = forward(backend, rows_of(x))
    recomputed = backward(backend, rows_of(x), results, scale)
    in_place = x.clone()
    forward(backend, rows_of(in_place), in_place, scale)
    in_place_later = backward(backend, rows_of(x), results, scale, dlogits=x)

    assert_close(results[0], expected_losses, LOSS_TOLERANCE[dtype])
    assert_close(results[1], expected_lse, LOSS_TOLERANCE[dtype])
    if (
        vocab * x.element_size() < 64 << 10
    ):  # a longer row may be spread over a cluster if its gradient is wanted
        assert_same(backend, alone, results)
    else:
        assert_close(alone, results.cpu().double(), LOSS_TOLERANCE[dtype])
    assert_same(backend, in_place, dlogits)
    assert_same(backend, in_place_later, recomputed)
    for gradient in (dlogits, recomputed):
        assert_close(gradient, expected, GRADIENT_TOLERANCE[dtype])
        assert not gradient[1].any()


@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_on_strided_rows_touches_nothing_beside_them(backend, dtype, shift):
    rows, vocab = 6, 1001
    wide, all_labels = logits(rows, 1100, dtype, "cuda"), labels(2 * rows, vocab, "cuda").int()
    x, t, scale = wide[:, shift : shift + vocab], all_labels[::2], torch.ones(rows, device="cuda")
    expected_losses, _, expected = cross_entropy_in_float64(x, t, None, 0.0, scale)
    before = wide.clone()
    dense = poisoned(x)  # rows of another alignment than the input's
    losses, *_ = forward(backend, labelled(x, t), dense, scale)
    assert_close(losses, expected_losses, LOSS_TOLERANCE[dtype])
    assert_close(dense, expected, GRADIENT_TOLERANCE[dtype])
    forward(backend, labelled(x, t), x, scale)
    assert_same(backend, x, dense)
    assert torch.equal(wide[:, :shift], before[:, :shift])
    assert torch.equal(wide[:, shift + vocab :], before[:, shift + vocab :])


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_cross_entropy_ignored_bad_and_hopeless_rows(backend, dtype):
    rows, vocab = 8, 1003
    x, t = logits(rows, vocab, dtype, "cuda"), labels(rows, vocab, "cuda")
    x[1], t[1] = float("nan"), -100
    t[2], t[3], t[4] = -1, vocab, 2**40
    x[5] = -math.inf
    x[6, 100] = float("nan")
    x[7, : vocab // 2] = -math.inf
    t[7] = vocab - 1
    scale = torch.tensor(math.inf, device="cuda", dtype=opmath_dtype(dtype))
    dlogits = poisoned(x)
    results = forward(backend, labelled(x, t), dlogits, torch.ones_like(scale))
    ignored = backward(backend, labelled(x, t), results, scale)
    losses = results[0]
    assert losses.isnan().tolist() == [False, False, True, True, True, True, True, False]
    assert not results[:, 1].any()
    assert results[:, 2:5].isnan().all()
    for gradient in (dlogits, ignored):
        assert not gradient[1].any()
        assert gradient[2:5].isnan().all()
        assert gradient[5:7].isnan().any(dim=1).all()
    good = [0, 7]
    expected_losses, _, expected = cross_entropy_in_float64(x[good], t[good], None, 0.0, torch.ones(2))
    assert_close(losses[good], expected_losses, LOSS_TOLERANCE[dtype])
    assert_close(dlogits[good], expected, GRADIENT_TOLERANCE[dtype])
    assert not dlogits[7, : vocab // 2].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_a_common_offset_costs_no_accuracy(backend, label_smoothing):
    x, t = logits(4, 3001, torch.float32, "cuda") + 65536.0, labels(4, 3001, "cuda")
    scale, dlogits = torch.ones(4, device="cuda"), poisoned(x)
    expected_losses, _, expected = cross_entropy_in_float64(x, t, None, label_smoothing, scale)
    losses, *_ = forward(backend, labelled(x, t, label_smoothing=label_smoothing), dlogits, scale)
    assert_close(losses, expected_losses, 1e-5)
    assert_close(dlogits, expected, 1e-6)


# Bert's, and one that is spread over the blocks of a cluster where there are some.
@pytest.mark.parametrize("vocab", [30522, 150_000])
def test_cross_entropy_gives_the_same_bits_on_every_run(backend, vocab):
    x, t = logits(300, vocab, torch.float32, "cuda"), labels(300, vocab, "cuda")
    scale, first = torch.rand(300, device="cuda"), poisoned(x)
    for options in ({}, {"label_smoothing": 0.1}):
        results = forward(backend, labelled(x, t, **options), first, scale)
        for _ in range(5):
            again = poisoned(x)
            assert torch.equal(forward(backend, labelled(x, t, **options), again, scale), results)
            assert torch.equal(again, first)


def test_cross_entropy_over_more_than_2_to_the_31_logits(backend):
    rows, vocab = 2**16 + 5, 2**15 + 8
    needed = rows * vocab * 2 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    x = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    t, scale = torch.randint(0, vocab, (rows,), device="cuda"), torch.tensor(1.0, device="cuda")
    ends = torch.tensor([0, 1, rows - 2, rows - 1], device="cuda")
    few, few_labels = x[ends], t[ends]
    expected = poisoned(few)
    expected_results = forward(backend, labelled(few, few_labels), expected, scale)
    results = forward(backend, labelled(x, t), x, scale)
    assert_same(backend, results[:, ends], expected_results)
    assert_same(backend, x[ends], expected)


def test_cross_entropy_runs_in_order_on_the_current_stream(backend):
    source, t = logits(64, 5001, torch.float32, "cuda"), labels(64, 5001, "cuda")
    expected = forward(backend, labelled(source, t))
    x, stream = torch.zeros_like(source), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        results = forward(backend, labelled(x, t))
    stream.synchronize()
    assert torch.equal(results, expected)


# Fewer and more rows than the one block that sums them has threads.
@pytest.mark.parametrize("rows", [1, 33, 1024, 5000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denominator_and_mean_stay_on_the_device(cuda_module, dtype, weighted, rows):
    vocab = 50
    t = labels(rows, vocab, "cuda")
    t[rows // 2] = -100
    w = class_weights(vocab, dtype, "cuda") if weighted else None
    losses = torch.rand(rows, dtype=dtype, device="cuda")
    out, mean, total = (torch.full((n,), float("nan"), dtype=dtype, device="cuda") for n in (2, 1, 1))
    rows_of = Rows(losses[:, None].expand(-1, vocab), t, None, w, Options())
    cuda_module.cross_entropy_denominator(
        cuda_module.CrossEntropy(**rows_of.native()), out=out.data_ptr(), **where(t)
    )
    for denominator, result in ((out.data_ptr(), mean), (0, total)):
        cuda_module.cross_entropy_reduce(
            losses=losses.data_ptr(),
            rows=rows,
            dtype=DTYPE_CODES[dtype],
            denominator=denominator,
            out=result.data_ptr(),
            **where(t),
        )
    kept = t[t != -100].cpu()
    expected = torch.ones(len(kept)).double().sum() if w is None else w.cpu().double()[kept].sum()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_close(out, torch.stack([expected, 1 / expected]), tolerance)
    assert_close(total[0], losses.cpu().double().sum(), tolerance)
    if rows > 1:
        assert_close(mean[0], losses.cpu().double().sum() / expected, tolerance)
    else:
        assert mean.isinf().all()  # a loss, and no row that counts: only possible in this test
    assert torch.isfinite(out).all() == (len(kept) > 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_public_cross_entropy_on_the_gpu(backend, reduction, inplace):
    if inplace and reduction == "none":
        pytest.skip("in place needs a reduction")
    x, t = logits(50, 777, torch.float32, "cuda").requires_grad_(), labels(50, 777, "cuda")
    t[::3] = -100
    reference = x.detach().cpu().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference, t.cpu(), reduction=reduction)
    expected.sum().backward()
    loss = superfine_kernels.cross_entropy(x * 1, t, reduction=reduction, inplace=inplace, backend=backend)
    loss.sum().backward()
    assert_close(loss.detach(), expected.detach(), 1e-5)
    assert_close(x.grad, reference.grad, 1e-6)


def test_all_labels_ignored_gives_nan_and_zero_gradients(backend):
    x, t = logits(5, 77, torch.float32, "cuda").requires_grad_(), torch.full((5,), -100, device="cuda")
    loss = superfine_kernels.cross_entropy(x, t, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert not x.grad.any()


# --- two GPUs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_and_the_current_one_stays(backend):
    x, t = logits(5, 500, torch.float32, "cuda:1"), labels(5, 500, "cuda:1")
    expected, _, _ = cross_entropy_in_float64(x, t, None, 0.0, torch.ones(5))
    with torch.cuda.device(0):
        losses, *_ = forward(backend, labelled(x, t))
        assert torch.cuda.current_device() == 0
    assert_close(losses, expected, 1e-5)
