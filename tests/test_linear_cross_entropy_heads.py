"""linear_cross_entropy with the loss's options, heads that train in part, and tiles that are left out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import ISAS
from test_cross_entropy_options import OPTIONS, by_formula
from test_linear_cross_entropy import (
    CLASSES,
    FEATURES,
    ROWS,
    TILE_BYTES,
    TOLERANCE,
    assert_close,
    problem,
    profiled,
)
from torch import Tensor

from superfine_kernels import linear_cross_entropy
from superfine_kernels._class_tiles import LEAST_CLASSES
from superfine_kernels._head import LoRA, TrainableRows

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]


def wide(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def targets(kind: str) -> tuple[Tensor, Tensor | None]:
    if kind == "dense":
        return torch.rand(ROWS, CLASSES).softmax(1), None
    target = torch.randint(0, CLASSES, (ROWS,) if kind == "labels" else (ROWS, 4))
    target[::5] = -100
    return target, None if kind == "labels" else torch.rand(ROWS, 4)


@pytest.mark.parametrize("backend", [None, "reference", f"cpu:{ISAS[0]}"])
@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_over_tiles_are_those_of_float64(dtype, kind, backend):
    x, w, b, _ = problem(dtype)
    target, p = targets(kind)
    weight = torch.rand(CLASSES) + 0.1
    for options, reduction in itertools.product(OPTIONS.values(), ("mean", "none")):
        options = {**options, "reduction": reduction, "probabilities": p}
        loss = linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight, tile_bytes=TILE_BYTES, backend=backend, **options
        )
        tensors = [wide(t) for t in (x, w, b)]
        expected = by_formula(F.linear(*tensors), target, weight, **options)
        loss_scale = (
            1024.0 if dtype == torch.float16 else 1.0
        )  # as in training: small gradients have few digits
        found, expected = gradients(loss * loss_scale, [x, w, b]), gradients(expected * loss_scale, tensors)
        assert_close(found, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_over_tiles(dtype, backend):
    x, w, b, target = problem(dtype)
    with torch.no_grad():
        target[1:30:3] = F.linear(x, w, b)[1:30:3].float().argmax(1)
        b[LEAST_CLASSES : 2 * LEAST_CLASSES] = -torch.inf  # a whole tile
        target[(target >= LEAST_CLASSES) & (target < 2 * LEAST_CLASSES)] = 3
    loss, stats = linear_cross_entropy(
        x, w, target, linear_bias=b, tile_bytes=TILE_BYTES, return_stats=True, backend=backend
    )
    logits = F.linear(x, w, b).detach()  # rounded to the dtype, as the tiles are
    log_p, counts = logits.double().log_softmax(1), target != -100
    logprob = torch.where(counts, log_p.gather(1, target.clamp(min=0)[:, None])[:, 0], 0)
    entropy = torch.where(counts, torch.special.entr(log_p.exp()).sum(1), 0)
    tolerance = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(stats.logprob.double(), logprob, **tolerance)
    torch.testing.assert_close(stats.entropy.double(), entropy, **tolerance)
    assert torch.equal(stats.correct, (logits.argmax(1) == target) & counts)
    torch.testing.assert_close(loss.double(), -logprob.sum() / counts.sum(), **tolerance)


def test_equal_logits_in_two_tiles_have_the_first_as_the_best():
    x, w = torch.ones(2, 1), torch.zeros(2 * LEAST_CLASSES, 1)
    w[[5, LEAST_CLASSES + 7]] = 1
    target = torch.tensor([5, LEAST_CLASSES + 7])
    stats = linear_cross_entropy(x, w, target, tile_bytes=8, return_stats=True)[1]
    assert stats.correct.tolist() == [True, False]


def test_a_causal_shift_scores_the_next_label():
    x, w = torch.randn(2, 7, FEATURES), torch.randn(40, FEATURES)
    target = torch.randint(0, 40, (2, 7))
    loss = linear_cross_entropy(x, w, target, shift=True)
    torch.testing.assert_close(
        loss, F.cross_entropy((x[:, :-1] @ w.t()).flatten(0, 1), target[:, 1:].flatten())
    )
    assert linear_cross_entropy(x, w, target, shift=True, reduction="none")[:, -1].tolist() == [0, 0]


# --- heads that train in part --------------------


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_head_trains_its_factors(dtype, reduction, backend):
    x, w, bias, target = problem(dtype)
    a = torch.randn(4, FEATURES, dtype=torch.float64).to(dtype).requires_grad_()
    b = (torch.randn(CLASSES, 4, dtype=torch.float64) / 4).to(dtype).requires_grad_()
    w.requires_grad_(False)
    options = {"softcap": 9.0, "reduction": reduction}
    loss = linear_cross_entropy(
        x,
        w,
        target,
        linear_bias=bias,
        lora=LoRA(a, b, 0.5),
        tile_bytes=TILE_BYTES,
        backend=backend,
        **options,
    )
    tensors = [wide(t) for t in (x, a, b, bias)]
    logits = F.linear(tensors[0], w.double() + 0.5 * tensors[2] @ tensors[1], tensors[3])
    expected = by_formula(logits, target, **options)
    found = gradients(loss, [x, a, b, bias])
    assert_close(found, gradients(expected, tensors), 4 * TOLERANCE[dtype])


def test_a_lora_head_needs_no_memory_of_the_weight_s_size():
    rows, classes = 64, 40 * LEAST_CLASSES
    x, w, _, target = problem(rows=rows, classes=classes)
    w.requires_grad_(False)
    lora = LoRA(torch.randn(2, FEATURES).requires_grad_(), torch.randn(classes, 2).requires_grad_())
    _, largest = profiled(
        lambda: linear_cross_entropy(x, w, target, lora=lora, tile_bytes=rows * 4).backward()
    )
    assert largest <= 4 * max(2 * classes, rows * LEAST_CLASSES)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_stand_in_for_those_of_the_weight(dtype, reduction, backend):
    x, w, bias, target = problem(dtype)
    w.requires_grad_(False)
    index = torch.tensor([LEAST_CLASSES + 3, 0, CLASSES - 1, LEAST_CLASSES, 17])
    target[1:6] = index
    rows = torch.randn(5, FEATURES, dtype=torch.float64).to(dtype).requires_grad_()
    with torch.no_grad():
        w[index] = torch.nan  # their values do not count ...
    if backend == "reference":
        w[index] = 7.0  # ... but eager torch multiplies NaN by zero
    head = {"linear_bias": bias, "rows": TrainableRows(index, rows)}
    loss = linear_cross_entropy(
        x, w.nan_to_num(7.0), target, tile_bytes=TILE_BYTES, reduction=reduction, backend=backend, **head
    )
    tensors = [wide(t) for t in (x, rows, bias)]
    full = w.double().index_copy(0, index, tensors[1])
    expected = by_formula(F.linear(tensors[0], full, tensors[2]), target, reduction=reduction)
    found = gradients(loss, [x, rows, bias])
    assert found[2].shape == (5, FEATURES)
    assert_close(found, gradients(expected, tensors), 2 * TOLERANCE[dtype])


def test_rows_alone_take_one_narrow_product_for_their_gradient():
    x, w, _, target = problem()
    w.requires_grad_(False)
    x.requires_grad_(False)
    rows = TrainableRows(torch.arange(6), torch.randn(6, FEATURES).requires_grad_())
    loss = []
    assert (
        profiled(lambda: loss.append(linear_cross_entropy(x, w, target, rows=rows, tile_bytes=TILE_BYTES)))[0]
        == 4
    )
    assert profiled(lambda: loss[0].backward())[0] == 3 + 1  # the logits again, and rows x few


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_ignored_rows_hold_reaches_no_part_that_trains(backend):
    x, w, _, target = problem()
    with torch.no_grad():
        x[::5] = torch.nan
    a, b = torch.randn(2, FEATURES, requires_grad=True), torch.randn(CLASSES, 2, requires_grad=True)
    rows = torch.randn(1, FEATURES, requires_grad=True)
    head = {"lora": (a, b, 1.0), "rows": (torch.tensor([0]), rows), "softcap": 5.0}
    loss = linear_cross_entropy(x, w, target, backend=backend, **head)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b, rows, w)))
    assert not torch.autograd.grad(linear_cross_entropy(x, w, target, backend=backend, **head), x)[0][
        ::5
    ].any()


def test_accumulation_is_noticed_by_autograd():
    x, w, _, target = problem()
    into = torch.zeros(CLASSES, FEATURES)
    version = into._version
    linear_cross_entropy(x, w, target, accumulate_into=into).backward()
    assert into._version > version
    with pytest.raises(ValueError, match="accumulate_into is 'memory of linear_weight'"):
        linear_cross_entropy(x, w, target, accumulate_into=w.detach())


def test_lora_and_rows_together_with_all_that_trains():
    x, w, bias, target = problem(torch.float64)
    a, b = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, FEATURES), (CLASSES, 3)))
    index = torch.tensor([2, CLASSES - 2])
    rows = torch.randn(2, FEATURES, dtype=torch.float64).requires_grad_()
    tensors = [x, w, bias, a, b, rows]
    loss = linear_cross_entropy(
        x, w, target, linear_bias=bias, lora=(a, b, 2.0), rows=(index, rows), tile_bytes=TILE_BYTES
    )
    full = (w + 2 * b @ a).index_copy(0, index, rows)
    assert_close(
        gradients(loss, tensors), gradients(F.cross_entropy(F.linear(x, full, bias), target), tensors), 1e-13
    )


def test_tied_embeddings_get_both_gradients():
    w = torch.randn(CLASSES, FEATURES, requires_grad=True)
    tokens = torch.randint(0, CLASSES, (3, 9))
    losses = [
        linear_cross_entropy(F.embedding(tokens, w).tanh(), w, tokens, shift=True, tile_bytes=27 * 4),
        F.cross_entropy(
            (F.embedding(tokens, w).tanh() @ w.t())[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ),
    ]
    torch.testing.assert_close(*(gradients(loss, [w]) for loss in losses))


def test_one_tile_is_not_multiplied_again():
    x, w, b, target = problem(classes=LEAST_CLASSES - 1)
    loss = []
    assert profiled(lambda: loss.append(linear_cross_entropy(x, w, target, linear_bias=b)))[0] == 1
    assert profiled(lambda: loss[0].backward(retain_graph=True))[0] == 2
    first = w.grad.clone()
    loss[0].backward()
    torch.testing.assert_close(w.grad, 2 * first)
    torch.testing.assert_close(first, torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), w)[0])


@pytest.mark.parametrize("which", ["lora", "rows"])
def test_gradcheck(which):
    x, w, b, target = problem(torch.float64, rows=5, classes=9)
    factors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, FEATURES), (9, 2))]
    index, weight = torch.tensor([4, 1]), torch.randn(2, FEATURES, dtype=torch.float64).requires_grad_()
    target[1] = 4

    def loss(x, *tensors):
        extra = {"lora": (*tensors, 0.5)} if which == "lora" else {"rows": (index, *tensors)}
        return linear_cross_entropy(x, w, target, linear_bias=b, z_loss=0.1, softcap=4.0, **extra)

    tensors = (x, *factors) if which == "lora" else (x, weight)
    assert torch.autograd.gradcheck(loss, tensors)
    with pytest.warns(UserWarning, match="a second derivative is asked for"):
        assert torch.autograd.gradgradcheck(loss, tensors)


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_compiles_into_one_graph():
    x, w, b, target = problem()
    a, low = torch.randn(2, FEATURES, requires_grad=True), torch.randn(CLASSES, 2, requires_grad=True)
    index, rows = torch.tensor([4, 1500]), torch.randn(2, FEATURES, requires_grad=True)

    def loss(x, w, a, low, rows):
        return linear_cross_entropy(
            2 * x,
            w,
            target,
            linear_bias=b,
            lora=(a, low, 0.5),
            rows=(index, rows),
            softcap=5.0,
            skip_mass=1e-9,
        )

    tensors = [x, w, a, low, rows]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(*tensors), tensors), gradients(loss(*tensors), tensors))


# --- tiles that are left out --------------------


def peaked(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Eight tiles; each row's probability lies mostly in one of them."""
    classes, rows = 8 * LEAST_CLASSES, 48
    x = (
        torch.eye(8, FEATURES, dtype=dtype).repeat(rows // 8, 1)
        * torch.linspace(2, 12, rows, dtype=dtype)[:, None]
    )
    w = torch.randn(classes, FEATURES, dtype=dtype) / 9
    for tile in range(8):
        w[tile * LEAST_CLASSES : (tile + 1) * LEAST_CLASSES, tile] += 1
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, classes, (rows,))


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "scale": 1.1, "z_loss": 1e-2}])
@pytest.mark.parametrize("skip_mass", [1e-3, 1e-2, 0.2])
def test_skipped_tiles_change_gradients_by_no_more_than_the_bound(skip_mass, options):
    x, w, target = peaked()
    upstream = torch.linspace(0.5, 2, len(x), dtype=torch.float64)

    def run(**more):
        losses = linear_cross_entropy(
            x, w, target, reduction="none", tile_bytes=len(x) * 8, **options, **more
        )
        return losses.detach(), *torch.autograd.grad(losses, (x, w), upstream)

    exact, skipped = run(), run(skip_mass=skip_mass)
    assert torch.equal(skipped[0], exact[0])
    y = options.get("scale", 1.0) * (x @ w.t())
    y = y if "softcap" not in options else options["softcap"] * torch.tanh(y / options["softcap"])
    lse = torch.logsumexp(y, 1).detach()
    bound = skip_mass * upstream * (1 + 2 * options.get("z_loss", 0.0) * lse) * options.get("scale", 1.0)
    error = (skipped[1] - exact[1]).norm(dim=1)
    assert (error <= bound * w.detach().norm(dim=1).max() + 1e-12).all()
    assert error.max() > 0  # something was left out
    # Every class's gradient sums over rows: each adds at most its own bound times its input.
    total = (bound * x.detach().norm(dim=1)).sum()
    assert (skipped[2] - exact[2]).norm(dim=1).sum() <= total


def test_nothing_is_skipped_by_default_and_most_products_where_allowed():
    x, w, target = peaked(torch.float32)
    with torch.no_grad():
        x *= 20  # all of a row's probability is in one tile
        target.copy_((x @ w.t()).argmax(1))
    some = target < LEAST_CLASSES
    x, target = x[some].detach().requires_grad_(), target[some]
    counts = []
    for skip_mass in (0.0, 1e-6):
        loss = linear_cross_entropy(x, w, target, tile_bytes=len(x) * 4, skip_mass=skip_mass)
        counts.append(profiled(loss.backward)[0])
    assert counts == [3 * 8, 3]


def test_skipping_with_parts_that_train():
    x, w, target = peaked()
    index = torch.tensor([3, 2 * LEAST_CLASSES + 1, 7 * LEAST_CLASSES])
    rows = w.detach()[index].requires_grad_()
    a = torch.randn(2, FEATURES, dtype=torch.float64).requires_grad_()
    b = (torch.randn(len(w), 2, dtype=torch.float64) / 9).requires_grad_()
    tensors, head = [x, w, a, b, rows], {"lora": (a, b, 0.5), "rows": (index, rows)}
    target[::5] = -100
    found = linear_cross_entropy(x, w, target, tile_bytes=len(x) * 8, skip_mass=1e-9, **head)
    full = (w + 0.5 * b @ a).index_copy(0, index, rows)
    expected = F.cross_entropy(x @ full.t(), target)
    assert_close(gradients(found, tensors), gradients(expected, tensors), 1e-7)


def test_a_row_of_nan_is_not_skipped():
    x, w, target = peaked(torch.float32)
    with torch.no_grad():
        x[5] = torch.nan
    loss = linear_cross_entropy(x, w, target, tile_bytes=len(x) * 4, skip_mass=0.2)
    assert torch.autograd.grad(loss, w)[0].isnan().any(1).all()


def test_a_tile_far_below_the_others_has_no_entropy():
    x, w, b, target = problem(classes=2 * LEAST_CLASSES)
    with torch.no_grad():
        b[LEAST_CLASSES:] = torch.finfo(torch.float32).min
    target = target.clamp(max=LEAST_CLASSES - 1)
    stats = linear_cross_entropy(x, w, target, linear_bias=b, tile_bytes=TILE_BYTES, return_stats=True)[1]
    p = F.linear(x, w, b).detach()[:, :LEAST_CLASSES].double().softmax(1)
    expected = torch.where(target >= 0, torch.special.entr(p).sum(1), 0.0)
    torch.testing.assert_close(stats.entropy.double(), expected, rtol=1e-5, atol=1e-5)


def test_skipping_with_ignored_rows_and_classes_by_index():
    x, w, _ = peaked()
    target = torch.randint(0, w.shape[0], (len(x), 3))
    target[::3] = -100
    target[1, 2] = -100  # one place of a row that counts
    options = {"probabilities": torch.rand(target.shape), "tile_bytes": len(x) * 8}
    exact = gradients(linear_cross_entropy(x, w, target, **options), [x, w])
    skipped = gradients(linear_cross_entropy(x, w, target, skip_mass=1e-4, **options), [x, w])
    assert_close(skipped, exact, 1e-3)
    assert not skipped[1][::3].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"skip_mass": 1.0}, ValueError, r"skip_mass is 1.0 .* expected a number in \[0, 1\)"),
        (
            {"skip_mass": 0.1, "label_smoothing": 0.1},
            ValueError,
            "skip_mass is 0.1 .* expected 0 where every class",
        ),
        ({"lora": (torch.ones(2, 16), torch.ones(49, 2), 1.0)}, ValueError, r"lora.b is float32 \(49, 2\)"),
        ({"lora": (torch.ones(2, 15), torch.ones(50, 2), 1.0)}, ValueError, r"lora.a is float32 \(2, 15\)"),
        ({"lora": (torch.ones(2, 16), None, 1.0)}, TypeError, r"lora.b is None"),
        ({"rows": (torch.tensor([1, 50]), torch.ones(2, 16))}, ValueError, "rows.indices is 'from 1 to 50'"),
        ({"rows": (torch.tensor([1, 1]), torch.ones(2, 16))}, ValueError, "rows.indices is 'not unique'"),
        (
            {"rows": (torch.tensor([1, 2]), torch.ones(3, 16))},
            ValueError,
            r"rows.weight is float32 \(3, 16\)",
        ),
        ({"rows": (torch.tensor([1, 2]),)}, TypeError, r"rows is .* expected None or a tuple of 2"),
        (
            {"lora": (torch.ones(2, 16), torch.ones(50, 2))},
            TypeError,
            r"lora is .* expected None or a tuple of 3",
        ),
        ({"lora": (torch.ones(2, 16), torch.ones(50, 2), float("nan"))}, ValueError, "lora.scale is nan"),
        ({"accumulate_into": torch.zeros(1, 16).expand(50, 16)}, ValueError, "accumulate_into is .* strides"),
        ({"rows": (torch.tensor([1.0, 2]), torch.ones(2, 16))}, TypeError, "rows.indices is float32"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    x, w, target = torch.ones(37, 16), torch.ones(50, 16), torch.zeros(37, dtype=torch.int64)
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(x, w, target, **change)
