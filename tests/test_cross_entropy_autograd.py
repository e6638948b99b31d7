"""cross_entropy as a node of a graph: upstream gradients, repeated backward, in place, derivatives, tracing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import class_weights, labels, logits
from support import gradient_of, one_warning, same_bits
from torch import Tensor

from superfine_kernels import cross_entropy

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def torch_gradient(x: Tensor, t: Tensor, factor: float = 1.0, **options) -> Tensor:
    leaf = x.detach().double().requires_grad_()
    return gradient_of(factor * torch.nn.functional.cross_entropy(leaf, t, **options), leaf).to(x.dtype)


# --- upstream gradients --------------------


@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0, 1024.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_upstream_gradient_counts(inplace, reduction, factor):
    x, t = logits(5, 70, torch.float32), labels(5, 70)
    leaf = x.clone().requires_grad_()
    loss = factor * cross_entropy(leaf * 1, t, reduction=reduction, inplace=inplace)
    expected = torch_gradient(x, t, factor, reduction=reduction)
    torch.testing.assert_close(gradient_of(loss, leaf), expected, rtol=1e-5, atol=1e-6 * max(1, abs(factor)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("on_leaf", [False, True])
def test_backward_twice_through_a_kept_graph(on_leaf, inplace):
    if on_leaf and inplace:
        pytest.skip("a leaf is refused")
    x, t = logits(5, 70, torch.float32), labels(5, 70)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf if on_leaf else leaf * 1, t, inplace=inplace)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(7)  # as gradient clipping does; the graph must keep a gradient of its own
    leaf.grad = None
    loss.backward(retain_graph=True)
    assert same_bits(leaf.grad, first)
    loss.backward()
    assert same_bits(leaf.grad, first + first)


def test_backward_after_the_graph_is_freed_is_torchs_error():
    leaf = logits(5, 7, torch.float32).requires_grad_()
    loss = cross_entropy(leaf, labels(5, 7))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_upstream_gradients_row_by_row_of_any_strides():
    x, t = logits(6, 70, torch.float32), labels(6, 70)
    upstreams = (torch.rand(12)[::2], torch.rand(1).expand(6), torch.rand(6).flip(0), torch.zeros(6))
    for upstream in upstreams:
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, t, reduction="none")
        wide = x.double().requires_grad_()
        torch.nn.functional.cross_entropy(wide, t, reduction="none").backward(upstream.double())
        expected = wide.grad.float()
        torch.testing.assert_close(
            gradient_of(loss, leaf, grad_outputs=upstream), expected, rtol=1e-5, atol=1e-6
        )


def test_an_ignored_row_stays_zero_under_an_infinite_upstream_gradient():
    leaf = logits(3, 7, torch.float32).requires_grad_()
    loss = cross_entropy(leaf, torch.tensor([1, -100, 2]), reduction="none")
    upstream = torch.tensor([1.0, torch.inf, 1.0])
    assert not gradient_of(loss, leaf, grad_outputs=upstream)[1].any()


def test_the_loss_of_a_frozen_input_has_no_graph():
    assert not cross_entropy(logits(3, 7, torch.float32), labels(3, 7)).requires_grad


def test_gradients_reach_the_model_through_a_view_of_the_logits():
    hidden, head = torch.randn(2, 4, 8), torch.randn(20, 8)
    t = torch.randint(0, 20, (2, 3))
    results = []
    for function in (cross_entropy, torch.nn.functional.cross_entropy):
        weight = head.clone().requires_grad_()
        shifted = (hidden @ weight.t())[:, :-1]  # the shift of a language model: rows are not contiguous
        function(shifted.reshape(-1, 20), t.reshape(-1)).backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# --- in place --------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_bits_of_out_of_place_in_the_logits_memory(dtype, label_smoothing):
    # 600 classes: gradients are staged 512 at a time, so the second part is read after the first is written.
    x, t, weight = logits(5, 600, dtype), labels(5, 600), class_weights(600, dtype)
    t[1] = -100
    leaf = x.clone().requires_grad_()
    expected_loss = cross_entropy(leaf, t, weight, label_smoothing=label_smoothing)
    expected = gradient_of(expected_loss, leaf)
    leaf = x.clone().requires_grad_()
    output = leaf * 1
    memory = output.detach()
    loss = cross_entropy(output, t, weight, label_smoothing=label_smoothing, inplace=True)
    assert same_bits(loss.detach(), expected_loss.detach())
    assert same_bits(memory, expected)
    assert same_bits(gradient_of(loss, leaf), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_float16_gradients_are_rounded_after_the_loss_scale(inplace):
    # 2048 x 1000: unscaled, most gradients are below float16's smallest number.
    x, t = logits(2048, 1000, torch.float16), labels(2048, 1000)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, t, inplace=inplace)
    (grad,) = torch.autograd.grad(loss * 65536, leaf)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(exact, t) * 65536, exact)
    lost = (grad == 0) & (expected.abs() > 6e-8)  # float16's smallest number
    assert not lost.any()
    torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=1e-7)


def test_the_first_gradient_may_be_changed_while_the_graph_is_kept():
    leaf = logits(5, 7, torch.float32).requires_grad_()
    hidden = leaf * 1
    loss = cross_entropy(hidden, labels(5, 7))
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    expected = first.clone()
    first.data.mul_(2)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(second, expected)


def test_batched_upstream_gradients():
    leaf = logits(5, 7, torch.float32).requires_grad_()
    loss = cross_entropy(leaf, labels(5, 7))
    (batched,) = torch.autograd.grad(loss, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batched[1], 2 * batched[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own forward-mode rules
def test_forward_mode_takes_the_reference():
    x, dx, t = logits(5, 7, torch.float64), logits(5, 7, torch.float64), labels(5, 7)
    with torch.autograd.forward_ad.dual_level():
        with pytest.warns(UserWarning, match="forward-mode"):
            ours = cross_entropy(torch.autograd.forward_ad.make_dual(x, dx), t)
        theirs = torch.nn.functional.cross_entropy(torch.autograd.forward_ad.make_dual(x, dx), t)
        expected = torch.autograd.forward_ad.unpack_dual(theirs).tangent
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours).tangent, expected)


def test_in_place_touches_nothing_beside_strided_rows():
    wide = logits(4, 50, torch.float32)
    leaf = wide.clone().requires_grad_()
    output = leaf * 1
    memory = output.detach()
    loss = cross_entropy(output[:, 5:42], labels(4, 37), inplace=True)
    assert same_bits(memory[:, :5], wide[:, :5])
    assert same_bits(memory[:, 42:], wide[:, 42:])
    gradient = gradient_of(loss, leaf)
    expected = torch_gradient(wide[:, 5:42], labels(4, 37))
    torch.testing.assert_close(gradient[:, 5:42], expected, rtol=1e-5, atol=1e-6)
    assert not gradient[:, :5].any()
    assert not gradient[:, 42:].any()


def test_autograd_notices_that_the_logits_are_gone():
    leaf = logits(4, 9, torch.float32).requires_grad_()
    output = leaf * 1
    squares = (output * output).sum()  # keeps the logits for its backward
    loss = cross_entropy(output, labels(4, 9), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()


def test_autograd_notices_a_change_of_the_gradient_that_lies_in_the_logits():
    leaf = logits(4, 9, torch.float32).requires_grad_()
    output = leaf * 1
    loss = cross_entropy(output, labels(4, 9), inplace=True)
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradient_in_place_leaves_the_logits_alone():
    x = logits(4, 9, torch.float32)
    before = x.clone()
    loss = cross_entropy(x, labels(4, 9), inplace=True)
    assert same_bits(x, before)
    assert same_bits(loss, cross_entropy(before, labels(4, 9)))


# --- derivatives --------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, label_smoothing):
    # 5 x 17: one vector and a tail, few enough for numerical derivatives.
    x, t = torch.randn(5, 17, dtype=torch.float64, requires_grad=True), torch.tensor([0, 16, -100, 3, 3])
    weight = torch.rand(17, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x, t, weight, reduction=reduction, label_smoothing=label_smoothing)

    assert torch.autograd.gradcheck(loss, (x,))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_second_derivatives_without_reduction_come_from_torch_with_one_warning(label_smoothing):
    x, t = logits(4, 9, torch.float64), torch.tensor([0, 3, -100, 8])
    seconds = []
    with one_warning("a second derivative is asked for"):
        for function in (cross_entropy, cross_entropy, torch.nn.functional.cross_entropy):
            leaf = x.clone().requires_grad_()
            loss = (function(leaf, t, reduction="none", label_smoothing=label_smoothing) ** 2).sum()
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            seconds.append(gradient_of((first**3).sum(), leaf))
    for second in seconds[:2]:
        torch.testing.assert_close(second, seconds[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives_of_a_reduced_loss_are_refused_with_what_to_do(inplace, power):
    # With power 1 the upstream gradient is the constant 1, yet the gradient depends on the logits: taken for a
    # constant, the penalty below would silently count for nothing.
    x, t = logits(4, 9, torch.float32), labels(4, 9)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, t, inplace=inplace) ** power
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    by_torch = torch.nn.functional.cross_entropy(wide := x.double().requires_grad_(), t) ** power
    torch.testing.assert_close(first.detach(), gradient_of(by_torch, wide).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="expected backend='reference'"):
        first.square().sum().backward()


def test_second_derivatives_of_the_reference_backend():
    x, t = logits(4, 9, torch.float64).requires_grad_(), labels(4, 9)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, t, backend="reference"), (x,))


# --- tracing --------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_passes_opcheck(requires_grad, reduction, gradient):
    if gradient and reduction == 0:
        pytest.skip("rows with upstream gradients of their own take the other way")
    x = logits(3, 17, torch.float32).requires_grad_(requires_grad)
    targets = (labels(3, 17), None, class_weights(17, torch.float32))
    arguments = (x, *targets, -100, 0.1, 0.01, 5.0, 0.5, reduction, 0.0, True, gradient, "")
    torch.library.opcheck(torch.ops.superfine.cross_entropy.default, arguments)


def test_in_place_forward_passes_opcheck():
    targets = (torch.randint(0, 17, (3, 2)), torch.rand(3, 2), None)
    arguments = (logits(3, 17, torch.float32), *targets, -100, 0.1, 0.0, 0.0, 1.0, 1, 5.0, False, "")
    torch.library.opcheck(torch.ops.superfine.cross_entropy_.default, arguments)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(3)])
def test_backward_passes_opcheck(scale):
    x, t = logits(3, 17, torch.bfloat16), labels(3, 17).int()
    arguments = (x, t, None, None, -100, 0.0, 0.0, 0.0, 1.0)
    _, out, _ = torch.ops.superfine.cross_entropy(*arguments, 0, 0.0, False, False, "")
    torch.library.opcheck(
        torch.ops.superfine.cross_entropy_backward.default, (*arguments, out[1:], scale, "")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction):
    def model(hidden: Tensor, weight: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(hidden @ weight.t(), t, reduction=reduction, label_smoothing=0.1).sum() * 2

    hidden, weight, t = torch.randn(6, 8), torch.randn(33, 8), torch.randint(0, 33, (6,))
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        loss = function(hidden, leaf, t)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_int32_labels_do_not_wrap_the_ignored_one_in_backward():
    x = logits(3, 17, torch.float16).requires_grad_()
    target = torch.tensor([0, 0, 5])
    gradients = []
    for t in (target, target.int()):
        (g,) = torch.autograd.grad(cross_entropy(x, t, ignore_index=2**32), x)
        gradients.append(g)
    assert torch.equal(*gradients)
