"""linear_cross_entropy against float64 and against the loss by way of all logits."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from support import ISAS, one_warning, pairwise
from torch import Tensor

from superfine_kernels import linear_cross_entropy
from superfine_kernels._class_tiles import LEAST_CLASSES, SUM_ROWS
from superfine_kernels.linear_cross_entropy import cost

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

# Three tiles, the last of them narrow; rows so few that a tile is as narrow as it may be.
ROWS, FEATURES, CLASSES = 37, 16, 2 * LEAST_CLASSES + 5
TILE_BYTES = 37 * 8
BACKENDS = [None, "reference", *(f"cpu:{isa}" for isa in ISAS)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 2e-14}


def problem(dtype: torch.dtype = torch.float32, rows: int = ROWS, classes: int = CLASSES, bias: bool = True):
    x = torch.randn(rows, FEATURES, dtype=torch.float64).to(dtype).requires_grad_()
    w = (torch.randn(classes, FEATURES, dtype=torch.float64) / 3).to(dtype).requires_grad_()
    b = torch.randn(classes, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, classes, (rows,))
    target[::5] = -100
    return x, w, b, target


def results(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """The loss, and gradients for an upstream gradient that differs from 1 and from row to row."""
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    wanted = [t for t in inputs if t is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def in_float64(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options) -> list[Tensor]:
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, w, b)]
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    return results(F.cross_entropy(F.linear(*wide), target, **options), *wide)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        scale = e.abs().amax().clamp(min=1e-30) if e.numel() > 0 else 1.0
        assert e.numel() == 0 or ((a.double() - e).abs().amax() / scale).item() <= tolerance


@pytest.mark.parametrize(
    ("dtype", "reduction", "weighted", "smoothing", "backend"),
    pairwise(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        ["mean", "sum", "none"],
        [False, True],
        [0.0, 0.1],
        BACKENDS,
    ),
)
def test_loss_and_gradients_are_those_of_float64(dtype, reduction, weighted, smoothing, backend):
    x, w, b, target = problem(dtype)
    weight = torch.rand(CLASSES, dtype=torch.float64).to(dtype) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, **options, tile_bytes=TILE_BYTES, backend=backend
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    actual = results(loss, x, w, b)
    assert [g.dtype for g in actual[1:]] == [dtype] * 3
    assert_close(actual, in_float64(x, w, b, target, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows):
    x, w, b, target = problem(rows=rows)
    target = target.clamp(min=0)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        assert_close(results(loss, x, w, b), in_float64(x, w, b, target, reduction=reduction), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_than_a_block_of_a_sum(dtype):
    x, w, b, target = problem(dtype, rows=2 * SUM_ROWS + 3)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=4 * len(x))
    assert_close(results(loss, x, w, b), in_float64(x, w, b, target), TOLERANCE[dtype])


@pytest.mark.parametrize("classes", [1, 2, LEAST_CLASSES - 1, LEAST_CLASSES, LEAST_CLASSES + 1])
def test_numbers_of_classes_around_a_tile(classes):
    x, w, b, target = problem(classes=classes)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=TILE_BYTES)
    expected = in_float64(x, w, b, target)
    actual = results(loss, x, w, b)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=1e-6)


def test_the_loss_does_not_depend_on_the_tiles():
    x, w, b, target = problem()
    losses = [
        linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=bytes_).item()
        for bytes_ in (TILE_BYTES, 37 * 4 * 1280, 1 << 30)
    ]
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


@pytest.mark.parametrize("dims", [(), (3,), (2, 3), (2, 0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_inputs_have_any_number_of_leading_dimensions(dims, reduction):
    x = torch.randn(*dims, FEATURES, requires_grad=True)
    w = torch.randn(50, FEATURES, requires_grad=True)
    target = torch.randint(0, 50, dims)
    loss = linear_cross_entropy(x, w, target, reduction=reduction)
    logits = F.linear(x, w).reshape(-1, 50)
    expected = F.cross_entropy(logits, target.reshape(-1), reduction=reduction)
    expected = expected.reshape(dims) if reduction == "none" else expected
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w))
    )


def test_any_strides():
    x = torch.randn(FEATURES, 9).t().requires_grad_()
    w = torch.randn(FEATURES, 50).t().requires_grad_()
    target = torch.randint(0, 50, (18,), dtype=torch.int32)[::2]
    loss = linear_cross_entropy(x, w, target)
    expected = F.cross_entropy(F.linear(x, w), target.long())
    torch.testing.assert_close(results(loss, x, w), results(expected, x, w))


# --- what trains --------------------


def profiled(step) -> tuple[int, int]:
    """How many matrix products `step` makes, and the bytes of the largest memory that an op asks for."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    events = profile.events()
    products = sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in events)
    return products, max(event.self_cpu_memory_usage for event in events)


@pytest.mark.parametrize("trained", ["x", "w", "b", "xw", "xwb", "wb"])
def test_what_is_frozen_takes_no_product_and_gets_no_gradient(trained):
    x, w, b, target = problem()
    tensors = {"x": x, "w": w, "b": b}
    expected = in_float64(x, w, b, target)
    for name, t in tensors.items():
        t.requires_grad_(name in trained)
    tiles = 3
    loss = []
    options = {"linear_bias": b, "tile_bytes": TILE_BYTES}
    assert profiled(lambda: loss.append(linear_cross_entropy(x, w, target, **options)))[0] == tiles
    products = tiles * (1 + ("x" in trained) + ("w" in trained))
    assert profiled(lambda: loss[0].backward())[0] == products
    for (name, t), e in zip(tensors.items(), expected[1:], strict=True):
        if name in trained:
            torch.testing.assert_close(t.grad.double() * 0.5, e, rtol=2e-6, atol=1e-7)
        else:
            assert t.grad is None


def test_logits_are_never_whole():
    rows, classes = 64, 40 * LEAST_CLASSES
    x, w, b, target = problem(rows=rows, classes=classes)
    _, largest = profiled(
        lambda: linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=rows * 4).backward()
    )
    assert largest == 4 * w.numel() == 4 * rows * classes / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_held_beside_the_gradients_is_a_twentieth_of_the_logits(dtype):
    rows, features, classes = 1024, 768, 50257
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    w = (torch.randn(classes, features) * features**-0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(linear_cross_entropy(x, w, target), [x, w])
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    gradients = (x.numel() + w.numel()) * x.element_size()
    assert gradients < max(held) < gradients + 0.05 * rows * classes * x.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_the_weight_add_up_where_asked(dtype):
    x, w, b, target = problem(dtype)
    expected = in_float64(x, w, b, target)[2] * 2  # in_float64's upstream gradient is 0.5
    into = torch.ones(CLASSES, FEATURES)
    for _ in range(2):
        linear_cross_entropy(
            x, w, target, linear_bias=b, tile_bytes=TILE_BYTES, accumulate_into=into
        ).backward()
    assert w.grad is None
    assert_close([(into - 1) / 2], [expected], TOLERANCE[dtype])
    w.grad = torch.zeros_like(w)
    linear_cross_entropy(x, w, target, linear_bias=b, accumulate_into=w.grad).backward()
    assert_close([w.grad], [expected], TOLERANCE[dtype])


def test_accumulation_is_refused_where_eager_torch_computes():
    x, w, _, target = problem(torch.float64, rows=5, classes=7)
    into = torch.zeros(7, FEATURES, dtype=torch.float64)
    loss = linear_cross_entropy(x, w, target, accumulate_into=into)
    with pytest.raises(RuntimeError, match="expected none beside accumulate_into"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected none beside accumulate_into"):
        torch.func.grad(lambda w: linear_cross_entropy(x, w, target, accumulate_into=into))(w)
    assert not into.any()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_leaves_accumulation_and_backward_alone(backward_inside):
    x, w, b, target = problem()
    into = torch.zeros(CLASSES, FEATURES)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        linear_cross_entropy(x, w, target, accumulate_into=into)  # evaluates
    loss = linear_cross_entropy(x, w, target, linear_bias=b, accumulate_into=into)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        loss.backward()
    assert_close([into / 2], [in_float64(x, w, b, target)[2]], TOLERANCE[torch.float32])


def test_second_derivatives_of_a_bias_alone():
    x, w, b, target = problem(torch.float64, rows=5, classes=7)
    x, w = x.detach(), w.detach()
    with one_warning("a second derivative is asked for"):
        (g,) = torch.autograd.grad(linear_cross_entropy(x, w, target, linear_bias=b), b, create_graph=True)
    (ours,) = torch.autograd.grad(g.square().sum(), b)
    (g,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), b, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(g.square().sum(), b)[0])


def test_meta_tensors_have_a_meta_loss():
    x, w, target = (
        torch.empty(3, 4, device="meta"),
        torch.empty(5, 4, device="meta"),
        torch.empty(3, device="meta"),
    )
    assert linear_cross_entropy(x, w, target.long()).shape == ()
    assert linear_cross_entropy(x, w, target.long(), reduction="none").device.type == "meta"


# --- labels and numbers --------------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_ignored_rows_have_no_gradient_whatever_they_hold(backend):
    x, w, b, target = problem()
    with torch.no_grad():
        x[::5] = math.nan
    clean = x.detach().clone().nan_to_num(0).requires_grad_()
    loss = linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=TILE_BYTES, backend=backend)
    expected = linear_cross_entropy(clean, w, target, linear_bias=b, tile_bytes=TILE_BYTES)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    grad, w.grad = w.grad, None
    expected.backward()
    torch.testing.assert_close(x.grad, clean.grad)
    torch.testing.assert_close(grad, w.grad)
    assert not x.grad[::5].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_with_all_labels_ignored_gradients_are_zero(reduction):
    x, w, b, target = problem()
    loss = linear_cross_entropy(x, w, torch.full_like(target, -100), linear_bias=b, reduction=reduction)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert not loss.any()
    loss.sum().backward()
    assert not any(t.grad.any() for t in (x, w, b))


@pytest.mark.parametrize(("bad", "position"), [(-1, 3), (CLASSES, 4), (-(2**40), 0)])
def test_a_label_out_of_range_is_named(bad, position):
    x, w, b, target = problem()
    target[position] = bad
    message = rf"linear_cross_entropy: target\[{position}\] is {bad}; expected a class in \[0, {CLASSES}\)"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, w, target, linear_bias=b)


def test_a_row_with_nan_spoils_its_own_loss_only():
    x, w, b, target = problem()
    with torch.no_grad():
        x[3] = math.nan
    losses = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none", tile_bytes=TILE_BYTES)
    assert losses.isnan().nonzero().flatten().tolist() == [3]


def test_masked_classes_and_a_common_offset():
    x, w, b, target = problem(torch.float64)
    with torch.no_grad():
        b[: LEAST_CLASSES + 9] = -math.inf  # a whole tile, and a part of one
        b[LEAST_CLASSES + 9 :] += 1e6
    target[target >= 0] = LEAST_CLASSES + 9 + target[target >= 0] % 700
    actual = results(linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=TILE_BYTES), x, w, b)
    # 1e6 leaves ten digits behind the point.
    for a, e in zip(actual, in_float64(x, w, b, target), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


# --- autograd, tracing, casts --------------------


def test_int32_labels_do_not_wrap_the_ignored_one():
    x, w, b, target = problem()
    target = target.clamp(min=0)
    loss = linear_cross_entropy(x, w, target.int(), linear_bias=b, ignore_index=2**32)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), target))


def test_a_mean_over_weights_of_zero_is_nan():
    x, w, _, _ = problem(rows=3, classes=7)
    weight = torch.tensor([0.0, 1, 1, 1, 1, 1, 1])
    for backend in (None, "reference"):
        loss = linear_cross_entropy(
            x, w, torch.zeros(3, dtype=torch.int64), weight=weight, label_smoothing=0.1, backend=backend
        )
        assert loss.isnan()


def test_backward_twice():
    x, w, b, target = problem()
    loss = linear_cross_entropy(x, w, target, linear_bias=b)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, w, b)]
    loss.backward()
    for t, once in zip((x, w, b), first, strict=True):
        torch.testing.assert_close(t.grad, 2 * once)


@pytest.mark.parametrize("num_items", [7, torch.tensor([2.5])])
def test_num_items_divides_the_sum(num_items):
    x, w, b, target = problem()
    loss = linear_cross_entropy(x, w, target, linear_bias=b, num_items=num_items)
    expected = F.cross_entropy(F.linear(x, w, b), target, reduction="sum") / float(num_items)
    torch.testing.assert_close(results(loss, x, w, b), results(expected, x, w, b))
    with pytest.raises(ValueError, match="linear_cross_entropy: num_items is 0"):
        linear_cross_entropy(x, w, target, num_items=0)


def test_gradcheck():
    x, w, b, target = problem(torch.float64, rows=5, classes=7)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *t, reduction=reduction: linear_cross_entropy(
                t[0], t[1], target, linear_bias=t[2], reduction=reduction, label_smoothing=0.1
            ),
            (x, w, b),
        )


def test_second_derivatives_by_eager_torch_with_a_warning():
    x, w, b, target = problem(torch.float64, rows=5, classes=7)
    with one_warning("a second derivative is asked for"):
        (g,) = torch.autograd.grad(linear_cross_entropy(x, w, target, linear_bias=b), x, create_graph=True)
    (ours,) = torch.autograd.grad(g.square().sum(), w)
    (g,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), w)
    torch.testing.assert_close(ours, expected)


def test_torch_func_by_eager_torch_with_a_warning():
    x, w, b, target = problem(rows=5, classes=7)
    with one_warning("torch.func and forward-mode AD have no kernel"):
        g = torch.func.grad(lambda w: linear_cross_entropy(x, w, target, linear_bias=b))(w)
    torch.testing.assert_close(g, torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), w)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction):
    x, w, b, target = problem()

    def loss(x, w, b):
        return linear_cross_entropy(2 * x, w, target, linear_bias=b, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled(x, w, b), x, w, b), results(loss(x, w, b), x, w, b))


@pytest.mark.parametrize("tile_bytes", [0, 1 << 20])
@pytest.mark.parametrize("skip_mass", [0.0, 0.1])
def test_opcheck(skip_mass, tile_bytes):
    x, w, b, target = problem(rows=5, classes=7)
    low_rank = (torch.randn(5, 2), torch.randn(7, 2), torch.randn(5, 2), torch.tensor([6, 1]))
    options = (-100, 0.0 if skip_mass else 0.1, 0.01, 5.0, 0.5, tile_bytes, skip_mass, "")
    arguments = (x, w, b, *low_rank, target, None, torch.ones(7), *options)
    forward = torch.ops.superfine.linear_cross_entropy.default
    for keep in (False, True):
        torch.library.opcheck(forward, (*arguments, 1, True, keep, None))
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    _, out, needed, kept = forward(*plain, 1, False, True, None)
    for into in (None, torch.zeros(7, FEATURES)):
        torch.library.opcheck(
            torch.ops.superfine.linear_cross_entropy_backward.default,
            (*plain, out[1:], torch.tensor(0.5), needed, kept, [True] * 6, into),
        )


def test_autocast_makes_products_in_its_dtype():
    x, w, b, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=TILE_BYTES)
    actual = results(loss, x, w, b)
    assert [g.dtype for g in actual] == [torch.float32] * 4
    rounded = [t.detach().bfloat16().requires_grad_() for t in (x, w, b)]
    assert_close(actual, in_float64(*rounded, target), TOLERANCE[torch.bfloat16])


# --- bad input --------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": 3}, TypeError, r"input is 3 \(int\); expected a torch.Tensor"),
        ({"input": torch.ones(37, 16, dtype=torch.int32)}, TypeError, "input is int32"),
        ({"input": torch.ones(())}, ValueError, r"input is float32 \(\) on cpu"),
        ({"target": torch.ones(37)}, ValueError, "target is float32"),
        ({"target": torch.ones(36, dtype=torch.int64)}, ValueError, r"target is int64 \(36,\)"),
        ({"target": torch.ones(37, dtype=torch.int64, device="meta")}, ValueError, "a tensor on cpu"),
        ({"linear_weight": torch.ones(50, 15)}, ValueError, r"linear_weight is float32 \(50, 15\)"),
        ({"linear_weight": torch.ones(0, 16)}, ValueError, r"linear_weight is float32 \(0, 16\)"),
        ({"linear_weight": torch.ones(50, 16).double()}, ValueError, "expected float32"),
        ({"linear_bias": torch.ones(49)}, ValueError, r"linear_bias is float32 \(49,\)"),
        ({"linear_bias": torch.ones(50).half()}, ValueError, "linear_bias is float16"),
        ({"weight": torch.ones(49)}, ValueError, r"weight is float32 \(49,\)"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"accumulate_into": torch.ones(50, 15)}, ValueError, "accumulate_into is float32"),
        ({"accumulate_into": torch.ones(50, 16)}, ValueError, "linear_weight is 'frozen'"),
        ({"tile_bytes": 37 * 4 - 1}, ValueError, "tile_bytes is 147 .* expected at least 148"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {
        "input": torch.ones(37, 16),
        "linear_weight": torch.ones(50, 16),
        "target": torch.zeros(37, dtype=torch.int64),
    }
    arguments |= change
    with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(arguments.pop("input"), arguments.pop("linear_weight"), **arguments)


def test_cost_counts_the_products_that_are_needed():
    assert cost(10, 20, 30).flops == 3 * 2 * 10 * 20 * 30
    assert cost(10, 20, 30, weight_grad=False).flops == 2 * 2 * 10 * 20 * 30
    assert cost(10, 20, 30, torch.bfloat16).bytes == 2 * 2 * (10 * 20 + 30 * 20)
