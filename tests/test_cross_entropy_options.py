"""Targets by index and probability, z-loss, softcap, scale, shift, statistics: against float64, alone and jointly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import GRADIENT_TOLERANCE, LOGIT_DTYPES, LOSS_TOLERANCE, class_weights
from support import ISAS, pairwise, same_bits, threads
from torch import Tensor

from superfine_kernels import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

ROWS, VOCABS = 6, [1, 65, 513, 4200]
OPTIONS = {
    "z_loss": {"z_loss": 0.3},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"z_loss": 0.1, "softcap": 2.0, "scale": 1.7, "label_smoothing": 0.3},
}


def dense_of(target: Tensor, probabilities: Tensor | None, classes: int, ignore_index: int) -> Tensor:
    """What is wanted of every class, (rows, classes), in float64."""
    if target.is_floating_point():
        return target.double()
    if probabilities is None:
        target, probabilities = target[:, None], torch.ones(len(target), 1)
    dense = torch.zeros(len(target), classes, dtype=torch.float64)
    counts = target != ignore_index
    return dense.scatter_add_(1, torch.where(counts, target, 0).long(), probabilities.double() * counts)


def by_formula(
    x: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, *, probabilities=None, z_loss=0.0, softcap=None, scale=1.0, num_items=None,
) -> Tensor:  # fmt: skip
    """The formula of csrc/math/cross_entropy.h, literally, in float64."""
    classes = x.shape[1]
    y = scale * x.double()
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    q = dense_of(target, probabilities, classes, ignore_index)
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    v = w * ((1 - label_smoothing) * q + label_smoothing / classes)
    lse = torch.logsumexp(y, 1)
    losses = torch.where(v > 0, v * (lse[:, None] - y), 0.0).sum(1) + z_loss * lse**2
    if target.is_floating_point():
        counts = torch.ones(len(x), dtype=torch.bool)
    else:
        counts = target != ignore_index
        counts = counts if target.dim() == 1 else counts.any(1)
    losses = torch.where(counts, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = counts.sum()
    if not target.is_floating_point() and probabilities is None:
        divisor = w[target[counts].long()].sum()
    return losses.sum() / (num_items or divisor)


def loss_and_gradient(function, x: Tensor, *arguments, **options) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    inplace = {"inplace": True} if options.pop("inplace", False) else {}
    loss = function(leaf * 1 if inplace else leaf, *arguments, **options, **inplace)
    upstream = torch.linspace(-0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), gradient


def assert_agrees(x: Tensor, *arguments, **options) -> None:
    loss, gradient = loss_and_gradient(cross_entropy, x, *arguments, **options)
    rest = {k: v for k, v in options.items() if k not in ("inplace", "backend")}
    expected_loss, expected = loss_and_gradient(by_formula, x.double(), *arguments, **rest)
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == x.dtype
    tolerance = LOSS_TOLERANCE[x.dtype]
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=tolerance)
    tolerance = GRADIENT_TOLERANCE[x.dtype]
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def targets(kind: str, classes: int, count: int = 5) -> tuple[Tensor, Tensor | None]:
    """Labels, classes by index with probabilities, or probabilities of all classes; some of them ignored."""
    if kind == "dense":
        return torch.rand(ROWS, classes).softmax(1), None
    if kind == "labels":
        target = torch.randint(0, classes, (ROWS,))
        target[2] = -100
        return target, None
    target = torch.randint(0, classes, (ROWS, count))
    target[1, 0] = target[3, -1] = -100  # one place does not count
    target[4] = -100  # none does
    return target, torch.rand(ROWS, count)


@pytest.mark.parametrize(
    ("dtype", "reduction", "kind", "options"),
    pairwise(LOGIT_DTYPES, ["mean", "sum", "none"], ["labels", "few", "dense"], list(OPTIONS)),
)
def test_agrees_with_the_formula_in_float64(dtype, reduction, kind, options):
    for number, vocab in enumerate(VOCABS):
        x = (3 * torch.randn(ROWS, vocab, dtype=torch.float64)).to(dtype)
        target, probabilities = targets(kind, vocab)
        weight = class_weights(vocab, dtype) + 0.1 if number % 2 else None
        for inplace in (False, True) if reduction != "none" else (False,):
            assert_agrees(
                x,
                target,
                weight,
                reduction=reduction,
                probabilities=probabilities,
                inplace=inplace,
                **OPTIONS[options],
            )


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(isa):
    for kind, dtype in itertools.product(("labels", "few", "dense"), LOGIT_DTYPES):
        x = torch.randn(ROWS, 4200, dtype=torch.float64).to(dtype)
        target, probabilities = targets(kind, 4200)
        options = {"probabilities": probabilities, **OPTIONS["all"]}
        for reduction in ("mean", "none"):
            one = loss_and_gradient(cross_entropy, x, target, reduction=reduction, **options)
            with threads(1):
                rest = {"reduction": reduction, "backend": f"cpu:{isa}", **options}
                other = loss_and_gradient(cross_entropy, x, target, **rest)
            assert same_bits(one[0], other[0])
            assert same_bits(one[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_the_gradient_agree(dtype):
    x = 3 * torch.randn(ROWS, 700).to(dtype)
    for kind in ("labels", "few", "dense"):
        target, probabilities = targets(kind, 700)
        options = {"probabilities": probabilities, **OPTIONS["all"]}
        leaf = x.clone().requires_grad_()
        cross_entropy(leaf, target, reduction="sum", **options).backward()
        fused, leaf.grad = leaf.grad, None
        cross_entropy(leaf, target, reduction="none", **options).sum().backward()
        torch.testing.assert_close(leaf.grad, fused, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    classes=st.integers(1, 600),
    count=st.integers(1, 70),
    softcap=st.one_of(st.none(), st.floats(0.5, 50)),
    scale=st.floats(0.01, 10),
    z_loss=st.floats(0, 0.5),
    smoothing=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_classes_by_index(rows, classes, count, softcap, scale, z_loss, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (rows, count), generator=generator).int()
    target[torch.rand(rows, count, generator=generator) < 0.3] = -100
    probabilities = torch.rand(rows, count, generator=generator)
    options = {
        "probabilities": probabilities, "softcap": softcap, "scale": scale, "z_loss": z_loss,
        "label_smoothing": smoothing, "reduction": "none",
    }  # fmt: skip
    assert_agrees(x, target, **options)


def test_labels_are_classes_with_the_probability_of_one():
    x, (target, _) = torch.randn(ROWS, 50), targets("labels", 50)
    by_label = loss_and_gradient(cross_entropy, x, target, **OPTIONS["all"])
    one = torch.ones(ROWS, 1)
    by_index = loss_and_gradient(cross_entropy, x, target[:, None], probabilities=one, **OPTIONS["all"])
    dense = F.one_hot(target.clamp(min=0), 50).float()[target >= 0]
    all_of_them = loss_and_gradient(cross_entropy, x[target >= 0], dense, **OPTIONS["all"])
    torch.testing.assert_close(by_index, by_label)
    torch.testing.assert_close(all_of_them[0], by_label[0])
    torch.testing.assert_close(all_of_them[1], by_label[1][target >= 0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 9, 3, 2)])
def test_probabilities_of_all_classes_have_torch_s_shapes(shape, reduction):
    x, q, weight = torch.randn(shape), torch.rand(shape), torch.rand(9)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    actual = loss_and_gradient(cross_entropy, x, q, **options)
    torch.testing.assert_close(actual, loss_and_gradient(F.cross_entropy, x, q, **options))
    few = torch.randint(0, 9, (*shape[:1], *shape[2:], 3) if len(shape) > 1 else (3,))
    p = torch.rand(few.shape)
    dense = torch.zeros(shape).movedim(min(1, len(shape) - 1), -1).scatter_add(-1, few, p)
    options["target"] = dense.movedim(-1, min(1, len(shape) - 1))
    expected = loss_and_gradient(F.cross_entropy, x, **options)
    options["target"] = few
    torch.testing.assert_close(loss_and_gradient(cross_entropy, x, probabilities=p, **options), expected)


def test_a_causal_shift_scores_the_next_label():
    x, target = torch.randn(2, 11, 7), torch.randint(0, 11, (2, 7))
    losses, gradient = loss_and_gradient(cross_entropy, x, target, shift=True, reduction="none")
    expected = F.cross_entropy(x[..., :-1], target[:, 1:], reduction="none")
    torch.testing.assert_close(losses[:, :-1], expected)
    assert not losses[:, -1].any()
    assert not gradient[..., -1].any()
    torch.testing.assert_close(cross_entropy(x, target, shift=True), expected.mean())
    few, p = torch.randint(0, 11, (2, 7, 3)), torch.rand(2, 7, 3)
    shifted = cross_entropy(x, few, shift=True, probabilities=p, reduction="none")
    unshifted = cross_entropy(x[..., :-1], few[:, 1:], probabilities=p[:, 1:], reduction="none")
    torch.testing.assert_close(shifted[:, :-1], unshifted)
    assert not shifted[:, -1].any()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_statistics_of_labels(dtype, backend):
    for vocab, options in itertools.product(VOCABS, ({}, OPTIONS["all"])):
        x = (2 * torch.randn(ROWS, vocab, dtype=torch.float64)).to(dtype)
        target, _ = targets("labels", vocab)
        target[0] = x[0].argmax()
        leaf = x.clone().requires_grad_()
        loss, stats = cross_entropy(leaf, target, return_stats=True, backend=backend, **options)
        assert same_bits(loss, cross_entropy(leaf, target, backend=backend, **options))
        y = options.get("scale", 1.0) * x.double()
        y = y if "softcap" not in options else options["softcap"] * torch.tanh(y / options["softcap"])
        log_p, counts = y.log_softmax(1), target != -100
        entropy = -(log_p.exp() * log_p).sum(1)
        logprob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        tolerance = {"rtol": LOSS_TOLERANCE[dtype], "atol": LOSS_TOLERANCE[dtype]}
        torch.testing.assert_close(stats.logprob.double(), torch.where(counts, logprob, 0), **tolerance)
        torch.testing.assert_close(stats.entropy.double(), torch.where(counts, entropy, 0), **tolerance)
        assert stats.correct.dtype == torch.bool
        assert stats.correct[0]
        assert torch.equal(stats.correct, (y.argmax(1) == target) & counts)
        loss.backward()
        assert leaf.grad.isfinite().all()


def test_of_equal_logits_the_first_is_the_best():
    x = torch.zeros(3, 5000)
    x[:, [700, 4500]] = 1
    stats = cross_entropy(x, torch.tensor([700, 4500, 0]), return_stats=True)[1]
    assert stats.correct.tolist() == [True, False, False]


def test_statistics_have_the_shape_of_the_labels_and_masked_classes_no_entropy():
    x = torch.randn(2, 11, 3)
    x[:, 4:] = -math.inf
    target = torch.randint(0, 4, (2, 3))
    loss, stats = cross_entropy(x, target, return_stats=True, reduction="none", inplace=False)
    p = x[:, :4].softmax(1)
    assert loss.shape == stats.correct.shape == (2, 3)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1))
    torch.testing.assert_close(stats.logprob, -loss)


@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
def test_a_row_of_nan_spoils_its_own_loss_only(kind):
    x, (target, probabilities) = torch.randn(ROWS, 33), targets(kind, 33)
    x[3] = math.nan
    if kind != "dense":
        target[5] = -100
        x[5] = math.nan
    options = {"probabilities": probabilities, **OPTIONS["all"]}
    losses, gradient = loss_and_gradient(cross_entropy, x, target, reduction="none", **options)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_masked_classes_follow_torch():
    x = torch.randn(4, 4100)
    x[:, :4097] = -math.inf  # a whole block, and more
    few = torch.tensor([[4098, 4099], [4097, 4098], [4099, 4099], [4098, 0]])
    p = torch.tensor([0.5, 0.25]).expand(4, 2)
    losses, gradient = loss_and_gradient(cross_entropy, x, few, probabilities=p, reduction="none")
    kept = x[:3, 4097:].double()
    expected = by_formula(kept, few[:3] - 4097, probabilities=p[:3], reduction="none")
    torch.testing.assert_close(losses[:3].double(), expected)
    assert losses[3] == math.inf
    assert not gradient[:3, :4097].any()
    q = torch.rand(4, 4100)
    assert torch.equal(F.cross_entropy(x, q, reduction="none"), cross_entropy(x, q, reduction="none"))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset):
    x = torch.randint(-40, 40, (ROWS, 300)).float() / 8
    for kind in ("labels", "few", "dense"):
        target, probabilities = targets(kind, 300)
        if kind == "dense":
            target = target.double().softmax(1).float()
        options = {"probabilities": probabilities, "label_smoothing": 0.1, "reduction": "none"}
        plain, moved = (cross_entropy(x + o, target, **options) for o in (0, offset))
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


def test_large_logits_are_capped_without_losing_the_slope():
    x = torch.tensor([[18.0, 1e-3, -17.0, 0.4]], dtype=torch.float64)
    wide = loss_and_gradient(by_formula, x, torch.tensor([1]), softcap=2.5)
    for dtype in (torch.float32, torch.float64):
        found = loss_and_gradient(cross_entropy, x.to(dtype), torch.tensor([1]), softcap=2.5)
        for f, w in zip(found, wide, strict=True):
            torch.testing.assert_close(f.double(), w, rtol=2e-6 if dtype == torch.float32 else 1e-9, atol=0)


def test_ignored_rows_of_nan_under_a_softcap_by_eager_torch():
    x = torch.randn(3, 5, dtype=torch.float64)
    x[1] = math.nan
    target = torch.tensor([0, -100, 2])
    loss, gradient = loss_and_gradient(cross_entropy, x, target, softcap=5.0, backend="reference")
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[1].any()


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_ignored_row_has_no_gradient_whatever_the_upstream_one(upstream):
    x = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([0, -100, 2]), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, torch.tensor(upstream))
    assert not gradient[1].any()
    assert not gradient[[0, 2]].isfinite().any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_row_of_nan_is_not_correct(backend):
    x = torch.tensor([[math.nan, 1.0, 2.0]])
    assert not cross_entropy(x, torch.tensor([2]), return_stats=True, backend=backend)[1].correct.any()
    w = torch.eye(3)
    assert not linear_cross_entropy(x, w, torch.tensor([2]), return_stats=True, backend=backend)[
        1
    ].correct.any()


def test_a_shift_of_nothing_and_with_an_ignore_index_that_no_double_holds():
    assert cross_entropy(torch.randn(2, 5, 0), torch.zeros(2, 0).long(), shift=True, reduction="sum") == 0
    x, target = torch.randn(2, 5, 3), torch.randint(0, 5, (2, 3))
    ignored = 2**53 + 1
    found = cross_entropy(x, target, shift=True, ignore_index=ignored)
    torch.testing.assert_close(found, cross_entropy(x, target, shift=True))


def test_lazily_negated_logits_are_read_as_they_are():
    x, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    lazy = torch._neg_view(x).detach().requires_grad_()
    torch.testing.assert_close(cross_entropy(lazy, target), F.cross_entropy(-x, target))


def test_a_view_of_a_leaf_is_not_overwritten():
    p = torch.nn.Parameter(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="input is 'a leaf that requires grad, or a view of one'"):
        cross_entropy(p.view(-1, 5), torch.zeros(6).long(), inplace=True)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_num_items_of_one_element_gives_a_scalar(backend):
    x, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    for items in (torch.tensor([2]), torch.tensor(2.0), 2):
        loss = cross_entropy(x, target, num_items=items, backend=backend)
        assert loss.shape == ()
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction="sum") / 2)


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_num_items_of_a_tensor_compiles():
    x, w, target = torch.randn(3, 5), torch.randn(5, 5), torch.tensor([0, 4, 2])

    def loss(x, items):
        return cross_entropy(x, target, num_items=items) + linear_cross_entropy(x, w, target, num_items=items)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, torch.tensor(4)), loss(x, 4))


def test_gradients_of_probabilities_by_eager_torch_with_a_warning():
    x, q = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    with pytest.warns(UserWarning, match="probabilities that require grad have no kernel"):
        loss = cross_entropy(x, q)
    gradients = torch.autograd.grad(loss, (x, q))
    torch.testing.assert_close(gradients, torch.autograd.grad(F.cross_entropy(x, q), (x, q)))


@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
def test_gradcheck(kind):
    x, (target, p) = torch.randn(ROWS, 9, dtype=torch.float64).requires_grad_(), targets(kind, 9)
    p = None if p is None else p.double()
    weight = torch.rand(9, dtype=torch.float64) + 0.1

    def loss(x, reduction="none"):
        return cross_entropy(x, target, weight, reduction=reduction, probabilities=p, **OPTIONS["all"])

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradcheck(lambda x: loss(x, "mean"), (x,))
    with pytest.warns(UserWarning, match="a second derivative is asked for"):
        assert torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
@pytest.mark.parametrize("kind", ["labels", "few", "dense"])
def test_compiles_into_one_graph(kind):
    x, (target, p) = torch.randn(ROWS, 33, requires_grad=True), targets(kind, 33)

    def loss(x):
        found = cross_entropy(
            2 * x,
            target,
            probabilities=p,
            return_stats=kind == "labels",
            shift=kind == "labels",
            **OPTIONS["all"],
        )
        return found[0] + found[1].entropy.sum() if kind == "labels" else found

    found, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0 .* expected a finite number, 0 or above"),
        ({"z_loss": math.inf}, ValueError, "z_loss is inf"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0 .* expected None or a number above 0"),
        ({"softcap": -2.0}, ValueError, "softcap is -2.0"),
        ({"softcap": math.nan}, ValueError, "softcap is nan"),
        ({"softcap": 1e-50}, ValueError, "softcap is 1e-50"),
        ({"scale": 1e39}, ValueError, "scale is 1e[+]39"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index is 1.0"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index is 9223372036854775808 .* expected 64 bits"),
        (
            {"target": torch.zeros(3, 0).long(), "probabilities": torch.rand(3, 0)},
            ValueError,
            "target is .* expected at least one class a row",
        ),
        ({"scale": 0.0}, ValueError, "scale is 0.0 .* expected a number above 0"),
        (
            {"weight": torch.tensor([1.0, -1, 1, 1, 1])},
            ValueError,
            "weight is .* -1.* expected weights of 0 or above",
        ),
        (
            {"probabilities": torch.rand(3)},
            ValueError,
            r"target is int64 \(3,\) on cpu; expected .* \(3, 'K'\)",
        ),
        (
            {"target": torch.zeros(3, 2).long(), "probabilities": torch.rand(3, 3)},
            ValueError,
            r"probabilities is float32 \(3, 3\) on cpu; expected as many as classes",
        ),
        (
            {"target": torch.zeros(3, 2).long(), "probabilities": [1.0]},
            TypeError,
            "probabilities is .* expected a torch",
        ),
        (
            {"target": torch.zeros(3, 2).long(), "probabilities": torch.rand(3, 2), "return_stats": True},
            ValueError,
            "return_stats is True",
        ),
        ({"target": torch.rand(3, 5), "shift": True}, ValueError, "shift is True"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, r"target\[1\] is 5; expected a class in \[0, 5\)"),
        (
            {"target": torch.tensor([[0, 1], [0, 1], [2, -7]]), "probabilities": torch.rand(3, 2)},
            ValueError,
            r"target\[2, 1\] is -7; expected a class in \[0, 5\) or ignore_index \(-100\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("linear", [False, True])
def test_bad_input_is_refused(change, error, message, backend, linear):
    arguments = {"target": torch.zeros(3).long()} | change
    target = arguments.pop("target")
    name, first = ("linear_cross_entropy", (torch.ones(3, 4), torch.ones(5, 4))) if linear else (
        "cross_entropy", (torch.ones(3, 5),)
    )  # fmt: skip
    function = linear_cross_entropy if linear else cross_entropy
    with pytest.raises(error, match=f"^{name}: {message}"):
        function(*first, target, **arguments, backend=backend)
