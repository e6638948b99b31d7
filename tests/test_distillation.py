"""topk_kl_div and linear_topk_kl_div against torch's kl_div of the dense distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import GRADIENT_TOLERANCE, LOGIT_DTYPES, LOSS_TOLERANCE

from superfine_kernels import linear_topk_kl_div, topk_kl_div

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

ROWS, CLASSES, COUNT = 7, 300, 5


def teacher(rows: int = ROWS, classes: int = CLASSES, count: int = COUNT):
    """The largest probabilities of a teacher, by class; one row of them is left out."""
    q = (3 * torch.randn(rows, classes)).softmax(1)
    probabilities, target = q.topk(count, 1)
    target[2] = -100
    return target, probabilities


def in_float64(x, target, probabilities, temperature, renormalize, reduction):
    """Over the dense distribution, by torch."""
    counts = (target >= 0).any(1)
    q = probabilities.double()
    q = q / q.sum(1, keepdim=True) if renormalize else q
    dense = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    dense[counts] = dense[counts].scatter(1, target[counts], q[counts])
    losses = F.kl_div((x / temperature).log_softmax(1), dense, reduction="none").sum(1) * temperature**2
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counts.sum()}[reduction]


def gradients(loss, *tensors):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, tensors, upstream)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_agrees_with_torch_over_the_dense_distribution(dtype, reduction, temperature, renormalize):
    target, q = teacher()
    x = (2 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    options = {"temperature": temperature, "renormalize": renormalize, "reduction": reduction}
    found = gradients(topk_kl_div(x, target, q, **options), x)
    expected = gradients(in_float64(wide, target, q, **options), wide)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for f, e, tolerance in zip(
        found, expected, (LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]), strict=True
    ):
        tolerance = max(tolerance, 1e-6)  # the teacher is float32
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_behind_a_linear_layer(reduction):
    target, q = teacher()
    x, w = torch.randn(ROWS, 8, requires_grad=True), torch.randn(CLASSES, 8, requires_grad=True)
    options = {"temperature": 2.0, "reduction": reduction}
    found = gradients(linear_topk_kl_div(x, w, target, q, **options), x, w)
    torch.testing.assert_close(found, gradients(topk_kl_div(x @ w.t(), target, q, **options), x, w))


def test_of_itself_it_is_zero_with_all_classes_and_with_few_renormalised():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.arange(6).expand(3, 6)
    loss, gradient = gradients(topk_kl_div(x, target, x.detach().softmax(1), reduction="sum"), x)
    assert abs(loss) < 1e-14
    assert gradient.abs().max() < 1e-14
    masked = torch.full((3, 6), -math.inf, dtype=torch.float64)
    masked[:, :2] = torch.randn(3, 2, dtype=torch.float64)
    few = masked.softmax(1)[:, :2] / 3
    assert topk_kl_div(masked, target[:, :2], few, renormalize=True, reduction="none").abs().max() < 1e-14


def test_num_items_and_in_place_and_more_dimensions():
    x = torch.randn(2, 9, 4, requires_grad=True)
    target, q = torch.randint(0, 9, (2, 4, 3)), torch.rand(2, 4, 3)
    losses = topk_kl_div(x, target, q, reduction="none")
    assert losses.shape == (2, 4)
    torch.testing.assert_close(topk_kl_div(x, target, q, num_items=5), losses.sum() / 5)
    matrix = x.movedim(1, -1).reshape(-1, 9)
    loss = topk_kl_div(matrix * 1, target.view(-1, 3), q.view(-1, 3), inplace=True)
    torch.testing.assert_close(gradients(loss, x), gradients(losses.mean(), x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shift": True}, TypeError, ".*'shift'"),
        ({"label_smoothing": 0.1}, TypeError, ".*'label_smoothing'"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0 .* expected a finite number above 0"),
        (
            {"probabilities": torch.rand(3, 4)},
            ValueError,
            r"probabilities is float32 \(3, 4\) .* expected as many",
        ),
        ({"probabilities": torch.rand(3, 2).requires_grad_()}, ValueError, ".* expected a constant teacher"),
        ({"target": [1]}, TypeError, "target is .* expected a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("function", [topk_kl_div, linear_topk_kl_div])
def test_bad_input_is_refused(function, change, error, message):
    arguments = {"target": torch.zeros(3, 2).long(), "probabilities": torch.rand(3, 2)} | change
    first = (torch.ones(3, 9),) if function is topk_kl_div else (torch.ones(3, 2), torch.ones(9, 2))
    with pytest.raises(error, match=rf"{function.__name__}(: |\(\)){message}"):
        function(*first, **arguments)
