"""bce_with_logits and mse as nodes of a graph: upstream gradients, in place, derivatives, tracing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import elementwise_in_float64, elementwise_inputs, elementwise_loss
from support import gradient_of, one_warning, same_bits
from torch import Tensor

from superfine_kernels import bce_with_logits, mse

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

LOSSES = ["bce_with_logits", "mse"]


# --- upstream gradients --------------------


@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0, 1024.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_upstream_gradient_counts(loss, inplace, reduction, factor):
    x, t = elementwise_inputs((5, 70), torch.float32)
    leaf = x.clone().requires_grad_()
    value = factor * elementwise_loss(loss, leaf * 1, t, reduction=reduction, inplace=inplace)
    upstream = torch.tensor(factor)
    expected = elementwise_in_float64(loss, x, t, reduction=reduction, upstream=upstream)[1].float()
    torch.testing.assert_close(gradient_of(value, leaf), expected, rtol=1e-5, atol=1e-6 * max(1, abs(factor)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_through_a_kept_graph(loss, inplace):
    x, t = elementwise_inputs((5, 70), torch.float32)
    leaf = x.clone().requires_grad_()
    value = elementwise_loss(loss, leaf * 1, t, inplace=inplace)
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(7)  # as gradient clipping does; the graph must keep a gradient of its own
    leaf.grad = None
    value.backward(retain_graph=True)
    assert same_bits(leaf.grad, first)
    value.backward()
    assert same_bits(leaf.grad, first + first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_gradients_element_by_element_of_any_strides(loss):
    x, t = elementwise_inputs((6, 70), torch.float32)
    for upstream in (torch.rand(6, 140)[:, ::2], torch.rand(6, 1).expand(6, 70), torch.zeros(6, 70)):
        leaf = x.clone().requires_grad_()
        value = elementwise_loss(loss, leaf, t, reduction="none")
        expected = elementwise_in_float64(loss, x, t, reduction="none", upstream=upstream)[1].float()
        actual = gradient_of(value, leaf, grad_outputs=upstream)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_frozen_input_has_no_graph_and_the_same_bits(loss):
    x, t = elementwise_inputs((30, 70), torch.float32)
    trained = elementwise_loss(loss, x.clone().requires_grad_(), t)
    frozen = elementwise_loss(loss, x, t)
    assert not frozen.requires_grad
    assert same_bits(frozen, trained.detach())
    with torch.no_grad():
        assert same_bits(elementwise_loss(loss, x.clone().requires_grad_(), t), frozen)


@pytest.mark.parametrize("loss", LOSSES)
def test_batched_upstream_gradients(loss):
    x, t = elementwise_inputs((5, 7), torch.float32)
    leaf = x.requires_grad_()
    value = elementwise_loss(loss, leaf, t)
    (batched,) = torch.autograd.grad(value, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batched[1], 2 * batched[0])


# --- in place --------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_in_place_gives_the_bits_of_out_of_place_in_the_inputs_memory(loss, dtype):
    # 1400: in strips of 512, of which the second is read after the first is written.
    x, t = elementwise_inputs((2, 700), dtype)
    weight = torch.rand(700).to(torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = x.clone().requires_grad_()
    expected_value = elementwise_loss(loss, leaf, t, weight=weight)
    expected = gradient_of(expected_value, leaf)
    leaf = x.clone().requires_grad_()
    output = leaf * 1
    memory = output.detach()
    value = elementwise_loss(loss, output, t, weight=weight, inplace=True)
    assert same_bits(value.detach(), expected_value.detach())
    assert same_bits(memory, expected)
    assert same_bits(gradient_of(value, leaf), expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_float16_gradients_are_rounded_after_the_loss_scale(loss, inplace):
    # A mean over 2^20: unscaled, most gradients are below float16's smallest number.
    x, t = elementwise_inputs((1 << 20,), torch.float16)
    leaf = x.clone().requires_grad_()
    value = elementwise_loss(loss, leaf * 1, t, inplace=inplace)
    gradient = gradient_of(value * 65536, leaf)
    expected = elementwise_in_float64(loss, x, t, upstream=torch.tensor(65536.0))[1]
    lost = (gradient == 0) & (expected.abs() > 6e-8)  # float16's smallest number
    assert not lost.any()
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_in_place_of_an_input_with_strides_leaves_it_alone(loss):
    wide, t = elementwise_inputs((4, 50), torch.float32)
    leaf = wide.clone().requires_grad_()
    output = leaf * 1
    memory = output.detach().clone()
    value = elementwise_loss(loss, output[:, 5:42], t[:, 5:42], inplace=True)
    assert same_bits(output.detach(), memory)
    expected = elementwise_in_float64(loss, wide[:, 5:42], t[:, 5:42])[1].float()
    gradient = gradient_of(value, leaf)
    torch.testing.assert_close(gradient[:, 5:42], expected, rtol=1e-5, atol=1e-6)
    assert not gradient[:, :5].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_autograd_notices_that_the_input_is_gone(loss):
    x, t = elementwise_inputs((4, 9), torch.float32)
    output = x.requires_grad_() * 1
    squares = (output * output).sum()  # keeps the outputs for its backward
    value = elementwise_loss(loss, output, t, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (value + squares).backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradient_in_place_leaves_the_input_alone(loss):
    x, t = elementwise_inputs((4, 9), torch.float32)
    before = x.clone()
    value = elementwise_loss(loss, x, t, inplace=True)
    assert same_bits(x, before)
    assert same_bits(value, elementwise_loss(loss, before, t))


# --- derivatives --------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    # 5 x 13: one vector and a tail, few enough for numerical derivatives.
    x, t = (torch.rand(5, 13, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    weight, pos_weight = (torch.rand(13, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: mse(x, t, reduction, weight), (x,))
    assert torch.autograd.gradcheck(lambda x: bce_with_logits(x, t, weight, reduction, pos_weight), (x,))


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_without_reduction_come_from_torch_with_one_warning(loss):
    # Fewer columns than a pattern's shortest run, and more.
    for shape in ((4, 9), (4, 90)):
        x, t = elementwise_inputs(shape, torch.float64)
        weight = torch.rand(4, 1, dtype=torch.float64)
        seconds = []
        with one_warning("a second derivative is asked for"):
            for options in ({}, {}, {"backend": "reference"}):
                leaf = x.clone().requires_grad_()
                values = elementwise_loss(loss, leaf, t, weight=weight, reduction="none", **options)
                first = gradient_of((values**2).sum(), leaf, create_graph=True)
                seconds.append(gradient_of((first**3).sum(), leaf))
        for second in seconds[:2]:
            torch.testing.assert_close(second, seconds[2], rtol=1e-10, atol=1e-12)
        from superfine_kernels._library import warn_once

        warn_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_a_two_phase_mean(loss, dtype):
    x, t = elementwise_inputs((4, 9), dtype)
    leaf = x.clone().requires_grad_()
    with one_warning("a second derivative is asked for"):
        first = gradient_of(elementwise_loss(loss, leaf, t), leaf, create_graph=True)
    wide = x.float().requires_grad_()
    by_torch = elementwise_loss(loss, wide, t.float(), backend="reference")
    expected = gradient_of(by_torch, wide, create_graph=True)
    actual, expected = gradient_of(first.float().sum(), leaf), gradient_of(expected.sum(), wide)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_a_reduced_loss_are_refused_with_what_to_do(loss, inplace):
    x, t = elementwise_inputs((4, 9), torch.float32)
    leaf = x.requires_grad_()
    first = gradient_of(elementwise_loss(loss, leaf * 1, t, inplace=inplace), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{loss}: .* expected backend='reference'"):
        first.square().sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_the_reference_backend(loss):
    x, t = elementwise_inputs((4, 5), torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: elementwise_loss(loss, x, t, backend="reference"), (x,))


@pytest.mark.parametrize(
    ("loss", "name"), [("bce_with_logits", "target"), ("mse", "target"), ("mse", "weight")]
)
def test_gradients_of_other_arguments_come_from_torch_with_one_warning(loss, name):
    x, t = elementwise_inputs((4, 9), torch.float64)
    arguments = {"target": t.clone(), "weight": torch.rand(9).double()}
    arguments[name].requires_grad_()
    with one_warning(f"{loss}: there is no kernel for the gradient of {name}"):
        value = elementwise_loss(loss, x, **arguments)
    (actual,) = torch.autograd.grad(value, arguments[name])
    step = 1e-6 * torch.eye(arguments[name].numel(), dtype=torch.float64)[3].reshape(arguments[name].shape)
    with torch.no_grad():
        up, down = (
            elementwise_loss(loss, x, **{**arguments, name: arguments[name] + s}) for s in (step, -step)
        )
    torch.testing.assert_close(actual.flatten()[3], (up - down) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_functional_transforms_take_the_reference(loss):
    x, t = elementwise_inputs((3, 5), torch.float64)
    with one_warning("torch.func and forward-mode AD have no kernel"):
        actual = torch.func.grad(lambda x: elementwise_loss(loss, x, t))(x)
    expected = elementwise_in_float64(loss, x, t)[1]
    torch.testing.assert_close(actual, expected)


# --- tracing --------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_passes_opcheck(loss, requires_grad, reduction, gradient):
    if gradient and reduction == 0:
        pytest.skip("elements with upstream gradients of their own take the other way")
    x, t = elementwise_inputs((3, 17), torch.float32)
    x.requires_grad_(requires_grad)
    weights = (torch.rand(17), 1, torch.rand(3), 17) if loss == "bce_with_logits" else (None, 1, None, 1)
    arguments = (loss, x, t, *weights, reduction, 5.0 if reduction == 1 else 1.0, gradient, "")
    torch.library.opcheck(torch.ops.superfine.elementwise_loss.default, arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_in_place_forward_passes_opcheck(loss):
    x, t = elementwise_inputs((3, 17), torch.float32)
    arguments = (loss, x, t, torch.rand(17), 1, None, 1, 5.0, "")
    torch.library.opcheck(torch.ops.superfine.elementwise_loss_.default, arguments)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(3, 17)])
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_passes_opcheck(loss, scale):
    x, t = elementwise_inputs((3, 17), torch.bfloat16)
    arguments = (loss, x, t, torch.rand(17), 1, None, 1, scale, 2.0, "")
    torch.library.opcheck(torch.ops.superfine.elementwise_loss_backward.default, arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_ops_take_what_a_compiler_has_laid_out_otherwise(loss):
    x, t = elementwise_inputs((5, 70), torch.float32)
    (xs, ts), w = (v.t().contiguous().t() for v in (x, t)), torch.rand(140)[::2]
    forward, backward = torch.ops.superfine.elementwise_loss, torch.ops.superfine.elementwise_loss_backward
    rest = (None, 1, 0, 1.0, False, "")
    expected = forward(loss, x, t, w.contiguous(), 1, *rest)[0]
    assert same_bits(forward(loss, xs, ts, w, 1, *rest)[0], expected)
    scale = torch.rand(70, 5).t()
    arguments = (None, 1, scale, 1.0, "")
    expected = backward(loss, x, t, w.contiguous(), 1, *arguments)
    assert same_bits(backward(loss, xs, ts, w, 1, *arguments), expected)
    with pytest.raises(ValueError, match=f"{loss}: input is .*strides .* expected a dense one"):
        torch.ops.superfine.elementwise_loss_(loss, xs, ts, w, 1, None, 1, 1.0, "")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_into_one_graph(loss, reduction):
    def model(hidden: Tensor, weight: Tensor, t: Tensor, w: Tensor) -> Tensor:
        outputs = hidden @ weight.t()
        return elementwise_loss(loss, outputs, t, weight=w, reduction=reduction).sum() * 2

    hidden, weight, t, w = torch.randn(6, 8), torch.randn(33, 8), torch.rand(6, 33), torch.rand(6, 33)
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        value = function(hidden, leaf, t, w)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
