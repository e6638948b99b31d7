"""Cross-entropy cases: the loss and the gradient of the logits, from logits that lie in memory.

``torch.autograd.grad`` rather than ``backward()``: the gradient is handed over as it is, so that no
provider pays for, or profits from, accumulating into ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import superfine_kernels
from superfine_kernels.cross_entropy import cost

from .harness import Case, Provider
from .peers import CROSS_ENTROPY, Peer, compiled

Outcome = tuple[torch.Tensor, torch.Tensor]

# Of the loss, and of the largest gradient: fp32 rounding, and the 8 bits of a bf16 gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Inputs:
    """Logits ``(rows, vocabulary)``, what they are restored from, targets, and the reference's results."""

    logits: torch.Tensor
    pristine: torch.Tensor
    target: torch.Tensor
    expected_loss: float
    expected_grad_rows: torch.Tensor  # fp64, for the rows in ``rows``
    rows: torch.Tensor


def _inputs(device: torch.device, *, n: int, v: int, dtype: torch.dtype) -> Inputs:
    pristine = torch.empty(n, v, device=device, dtype=dtype)
    # The output of an op, as logits are: a leaf could not be overwritten in place.
    logits = pristine + torch.zeros((), device=device, dtype=dtype, requires_grad=True)
    rows = torch.linspace(0, n - 1, min(n, 64), device=device).long()
    grad = torch.empty(len(rows), v, device=device, dtype=torch.float64)
    target = torch.empty(n, device=device, dtype=torch.int64)
    inputs = Inputs(logits, pristine, target, 0.0, grad, rows)
    _redraw(inputs, 0)
    _before(inputs)
    return inputs


def _redraw(inputs: Inputs, seed: int) -> None:
    """Draw logits and targets into the same buffers, and compute what is expected of them."""
    generator = torch.Generator().manual_seed(seed)
    pristine, target, rows = inputs.pristine, inputs.target, inputs.rows
    n, v = pristine.shape
    # One random row, rotated and scaled differently for each row: quick to make, and no two rows are alike.
    row = torch.randn(v + n, generator=generator)
    for i in range(n):
        pristine[i].copy_(row[i : i + v] * (1 + i / n))
    target.copy_(torch.randint(v, (n,), generator=generator))
    target[:: max(2, n // 16)] = -100  # padding, which every provider must leave out

    losses = []
    for block in range(0, n, 64):  # in blocks: fp64 of all logits need not fit
        part = slice(block, block + 64)
        losses.append(F.cross_entropy(pristine[part].double(), target[part], reduction="sum"))
    kept = int((target != -100).sum())
    inputs.expected_loss = torch.stack(losses).sum().item() / kept
    sample = pristine[rows].double().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(sample, target[rows], reduction="sum") / kept, sample)
    inputs.expected_grad_rows.copy_(grad)


@torch.no_grad()
def _before(inputs: Inputs) -> None:
    inputs.logits.copy_(inputs.pristine)


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    """Error of the loss and of the gradients of sampled rows, relative to the tolerance."""
    loss, grad = call()
    tolerance = TOLERANCE[inputs.logits.dtype]
    loss_error = abs(loss.item() - inputs.expected_loss) / (abs(inputs.expected_loss) * tolerance)
    if grad.shape != inputs.logits.shape or grad.dtype != inputs.logits.dtype:
        raise ValueError(f"gradient is {grad.dtype} {tuple(grad.shape)}; expected that of the logits")
    difference = (grad[inputs.rows].double() - inputs.expected_grad_rows).abs().max()
    grad_error = (difference / inputs.expected_grad_rows.abs().max() / tolerance).item()
    if not bool(torch.isfinite(grad.sum(dtype=torch.float32))):
        return float("nan")
    return max(loss_error, grad_error)


def _with_gradient(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], inputs: Inputs
) -> Callable[[], Outcome]:
    def call() -> Outcome:
        loss = loss_of(inputs.logits, inputs.target)
        (grad,) = torch.autograd.grad(loss, inputs.logits)
        return loss.detach(), grad

    return call


def _eager(inputs: Inputs) -> Callable[[], Outcome]:
    return _with_gradient(F.cross_entropy, inputs)


def _compiled(inputs: Inputs) -> Callable[[], Outcome]:
    torch.compiler.reset()
    return compiled(_with_gradient(torch.compile(lambda x, t: F.cross_entropy(x, t), dynamic=False), inputs))


def _peer(inputs: Inputs, *, peer: Peer) -> Callable[[], Outcome]:
    return _with_gradient(peer.load(inputs.logits.device), inputs)


def _superfine(inputs: Inputs, **options: Any) -> Callable[[], Outcome]:
    return _with_gradient(partial(superfine_kernels.cross_entropy, **options), inputs)


PROVIDERS = (
    Provider("torch eager", _eager),
    Provider("torch.compile", _compiled, in_quick=False),  # compiling takes longer than measuring
    Provider("superfine", _superfine),
    Provider("superfine, in place", partial(_superfine, inplace=True)),
    *(Provider(peer.name, partial(_peer, peer=peer), peer.in_quick) for peer in CROSS_ENTROPY),
)


def _case(n: int, v: int, dtype: torch.dtype, in_quick: bool = True) -> Case:
    return Case(
        op="cross_entropy",
        name=f"{n}x{v}",
        dtype=str(dtype).removeprefix("torch."),
        work="mean loss and the gradient of the logits",
        cost=partial(cost, n, v, dtype, backward=True),
        traffic="copy",
        memory=n * v * (2 * dtype.itemsize + 16),  # logits twice; eager's log-softmax and gradient in fp32
        inputs=partial(_inputs, n=n, v=v, dtype=dtype),
        before=_before,
        check=_check,
        providers=PROVIDERS,
        resident=n * v < 2**16,  # few logits: the cost of a call
        redraw=_redraw,
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: BERT's and Llama 3's vocabularies, and a classifier of three classes."""
    return [
        _case(1024, 30522, torch.float32),
        _case(512, 128256, torch.float32, in_quick=False),
        _case(512, 128256, torch.bfloat16),
        _case(32, 3, torch.float32),
    ]
