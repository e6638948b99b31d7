"""Cases of the elementwise losses, `bce_with_logits` and `mse`: the loss and the gradient of the outputs.

The gradient is handed over by ``torch.autograd.grad``, as in cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import superfine_kernels
from superfine_kernels.elementwise_loss import cost

from .harness import Case, Provider
from .peers import compiled

Outcome = tuple[torch.Tensor, torch.Tensor]
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Of the loss, and of the largest gradient: fp32 rounding, and the 8 bits of a bf16 gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Inputs:
    """Outputs and targets, what the outputs are restored from, weights of positive labels, float64's results."""

    loss: str
    outputs: torch.Tensor
    pristine: torch.Tensor
    target: torch.Tensor
    pos_weight: torch.Tensor | None
    expected_grad: torch.Tensor
    expected_loss: float = 0.0


def _inputs(
    device: torch.device, *, loss: str, shape: tuple[int, ...], dtype: torch.dtype, weighted: bool
) -> Inputs:
    pristine = torch.empty(shape, device=device, dtype=dtype)
    # The output of an op, as a model's outputs are: a leaf could not be overwritten in place.
    outputs = pristine + torch.zeros((), device=device, dtype=dtype, requires_grad=True)
    pos_weight = torch.linspace(0.5, 20, shape[-1], device=device) if weighted else None
    target = torch.empty(shape, device=device, dtype=dtype)
    inputs = Inputs(loss, outputs, pristine, target, pos_weight, torch.empty(shape, device=device))
    _redraw(inputs, 0)
    _before(inputs)
    return inputs


def _redraw(inputs: Inputs, seed: int) -> None:
    """Draw outputs and targets into the same buffers, and compute what is expected of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = inputs.pristine.shape
    inputs.pristine.copy_(2 * torch.randn(shape, generator=generator))
    if inputs.loss == "mse":
        inputs.target.copy_(torch.randn(shape, generator=generator))
    else:
        inputs.target.copy_(torch.rand(shape, generator=generator) < 0.1)
    exact = inputs.pristine.double().requires_grad_()
    pos_weight = None if inputs.pos_weight is None else inputs.pos_weight.double()
    loss = _torch_loss(inputs.loss, pos_weight)(exact, inputs.target.double())
    inputs.expected_grad.copy_(torch.autograd.grad(loss, exact)[0])
    inputs.expected_loss = loss.item()


@torch.no_grad()
def _before(inputs: Inputs) -> None:
    inputs.outputs.copy_(inputs.pristine)


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    """Error of the loss and of the gradient, relative to the tolerance."""
    loss, grad = call()
    tolerance = TOLERANCE[inputs.outputs.dtype]
    if grad.shape != inputs.outputs.shape or grad.dtype != inputs.outputs.dtype:
        raise ValueError(f"gradient is {grad.dtype} {tuple(grad.shape)}; expected that of the outputs")
    if not bool(torch.isfinite(grad.sum(dtype=torch.float32))):
        return float("nan")
    loss_error = abs(loss.item() - inputs.expected_loss) / abs(inputs.expected_loss)
    grad_error = (grad.float() - inputs.expected_grad).abs().max() / inputs.expected_grad.abs().max()
    return max(loss_error, grad_error.item()) / tolerance


def _torch_loss(loss: str, pos_weight: torch.Tensor | None) -> LossOf:
    if loss == "mse":
        return F.mse_loss
    return lambda x, t: F.binary_cross_entropy_with_logits(x, t, pos_weight=pos_weight)


def _with_gradient(loss_of: LossOf, inputs: Inputs) -> Callable[[], Outcome]:
    def call() -> Outcome:
        loss = loss_of(inputs.outputs, inputs.target)
        (grad,) = torch.autograd.grad(loss, inputs.outputs)
        return loss.detach(), grad

    return call


def _eager(inputs: Inputs) -> Callable[[], Outcome]:
    return _with_gradient(_torch_loss(inputs.loss, inputs.pos_weight), inputs)


def _compiled(inputs: Inputs) -> Callable[[], Outcome]:
    torch.compiler.reset()
    loss_of = torch.compile(_torch_loss(inputs.loss, inputs.pos_weight), dynamic=False)
    return compiled(_with_gradient(loss_of, inputs))


def _superfine(inputs: Inputs, **options: object) -> Callable[[], Outcome]:
    if inputs.loss == "bce_with_logits":
        options["pos_weight"] = inputs.pos_weight
    return _with_gradient(partial(getattr(superfine_kernels, inputs.loss), **options), inputs)


PROVIDERS = (
    Provider("torch eager", _eager),
    Provider("torch.compile", _compiled, in_quick=False),  # compiling takes longer than measuring
    Provider("superfine", _superfine),
    Provider("superfine, in place", partial(_superfine, inplace=True)),
)


def _case(
    loss: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool = False,
    in_quick: bool = True,
) -> Case:
    elements = torch.Size(shape).numel()

    return Case(
        op=loss,
        name="x".join(map(str, shape)) + (", weighted classes" if weighted else ""),
        dtype=str(dtype).removeprefix("torch."),
        work="mean loss and the gradient of the outputs",
        cost=partial(cost, elements, dtype, loss=loss),
        traffic="copy",
        memory=elements * (4 * dtype.itemsize + 32),  # inputs, float64's results, eager's temporaries in fp32
        inputs=partial(_inputs, loss=loss, shape=shape, dtype=dtype, weighted=weighted),
        before=_before,
        check=_check,
        providers=PROVIDERS,
        resident=elements < 2**16,  # few elements: the cost of a call
        redraw=_redraw,
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: 1000 labels for each of 1024 texts, a two-class head of a batch, a large regression."""
    return [
        _case("bce_with_logits", (1024, 1000), torch.float32, weighted=True),
        _case("bce_with_logits", (1024, 1000), torch.bfloat16, weighted=True),
        _case("bce_with_logits", (1 << 22,), torch.float32, in_quick=False),
        _case("bce_with_logits", (32,), torch.float32, in_quick=False),
        _case("mse", (1 << 22,), torch.float32),
        _case("mse", (1 << 22,), torch.bfloat16, in_quick=False),
    ]
