"""Linear layer and cross-entropy: the loss and the gradients of hidden states and weight, at GPT-2's size.

The gradients are handed over by ``torch.autograd.grad``, as in cross_entropy.py, and compared with float64 in a
sample of rows and of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import superfine_kernels
from superfine_kernels.linear_cross_entropy import cost

from .harness import Case, Provider, UnavailableError

Outcome = tuple[torch.Tensor, ...]
SAMPLE = 64

# Of the loss, and of the largest gradient: logits in bf16 have 8 bits, whoever computes them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Inputs:
    """Hidden states ``(rows, features)``, weight ``(classes, features)``, targets, and float64's results."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    kept: float  # share of the labels that count
    rows: torch.Tensor
    classes: torch.Tensor
    expected_rows: torch.Tensor  # of the hidden states' gradient
    expected_classes: torch.Tensor  # of the weight's
    expected_loss: float = 0.0
    few: torch.Tensor | None = None  # the rows of `classes`, where only they train of the weight


def _inputs(
    device: torch.device, *, n: int, h: int, v: int, dtype: torch.dtype, kept: float, trains: str
) -> Inputs:
    inputs = Inputs(
        torch.empty(n, h, device=device, dtype=dtype, requires_grad="hidden" in trains),
        torch.empty(v, h, device=device, dtype=dtype, requires_grad=trains != "hidden"),
        torch.empty(n, device=device, dtype=torch.int64),
        kept,
        torch.linspace(0, n - 1, SAMPLE, device=device).long(),
        torch.linspace(0, v - 1, SAMPLE, device=device).long(),
        torch.empty(SAMPLE, h, device=device, dtype=torch.float64),
        torch.empty(SAMPLE, h, device=device, dtype=torch.float64),
    )
    if "rows" in trains:
        inputs.few = torch.empty(SAMPLE, h, device=device, dtype=dtype, requires_grad=True)
    _redraw(inputs, 0)
    return inputs


@torch.no_grad()
def _redraw(inputs: Inputs, seed: int) -> None:
    """Draw values into the same buffers, and compute what is expected of them in blocks of rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target
    (n, h), v = hidden.shape, len(weight)
    hidden.copy_(torch.randn(n, h, generator=generator))
    weight.copy_(torch.randn(v, h, generator=generator) * h**-0.5)
    if inputs.few is not None:
        inputs.few.copy_(weight[inputs.classes])
    target.copy_(torch.randint(v, (n,), generator=generator))
    target[torch.rand(n, generator=generator).to(target.device) >= inputs.kept] = -100
    count = int((target != -100).sum())
    wide, losses, of_classes, of_rows = weight.double(), [], [], []
    for block in range(0, n, 64):
        logits = hidden[block : block + 64].double() @ wide.t()
        labels = target[block : block + 64]
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        p = (
            logits.softmax(1).scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(logits[:, :1]))
            * (labels >= 0)[:, None]
        )
        of_classes.append(p[:, inputs.classes])
        sampled = inputs.rows[(inputs.rows >= block) & (inputs.rows < block + 64)] - block
        of_rows.append(p[sampled] @ wide)
    inputs.expected_loss = torch.stack(losses).sum().item() / count
    inputs.expected_rows = torch.cat(of_rows) / count
    inputs.expected_classes = torch.cat(of_classes).t() @ hidden.double() / count


def _trained(inputs: Inputs) -> list[torch.Tensor]:
    of_weight = inputs.weight if inputs.few is None else inputs.few
    return [t for t in (inputs.hidden, of_weight) if t.requires_grad]


def _check(inputs: Inputs, call: Callable[[], Outcome]) -> float:
    """Error of the loss and of sampled gradients, relative to the tolerance."""
    loss, *gradients = call()
    tolerance = TOLERANCE[inputs.hidden.dtype]
    errors = [abs(loss.item() - inputs.expected_loss) / (abs(inputs.expected_loss) * tolerance)]
    for of, grad in zip(_trained(inputs), gradients, strict=True):
        if grad.shape != of.shape or grad.dtype != of.dtype:
            raise ValueError(
                f"gradient is {grad.dtype} {tuple(grad.shape)}; expected {of.dtype} {tuple(of.shape)}"
            )
        is_hidden = of is inputs.hidden
        expected = inputs.expected_rows if is_hidden else inputs.expected_classes
        sample = (grad if of is inputs.few else grad[inputs.rows if is_hidden else inputs.classes]).double()
        errors.append(((sample - expected).abs().max() / expected.abs().max() / tolerance).item())
        if not bool(torch.isfinite(grad.sum(dtype=torch.float32))):
            return float("nan")
    return max(errors)


def _call(
    loss_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], inputs: Inputs
) -> Callable[[], Outcome]:
    def call() -> Outcome:
        loss = loss_of(inputs.hidden, inputs.weight, inputs.target)
        if inputs.few is None:
            return loss.detach(), *torch.autograd.grad(loss, _trained(inputs))
        of_hidden, of_weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
        return loss.detach(), of_hidden, of_weight[inputs.classes]

    return call


def _eager(inputs: Inputs) -> Callable[[], Outcome]:
    return _call(lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t), inputs)


def _eager_in_its_dtype(inputs: Inputs) -> Callable[[], Outcome]:
    return _call(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), inputs)


def _torch(inputs: Inputs) -> Callable[[], Outcome]:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError("this torch has no linear_cross_entropy")
    return _call(F.linear_cross_entropy, inputs)


def _superfine(inputs: Inputs) -> Callable[[], Outcome]:
    return _call(superfine_kernels.linear_cross_entropy, inputs)


def _superfine_rows(inputs: Inputs) -> Callable[[], Outcome]:
    weight, trained = inputs.weight.detach(), _trained(inputs)
    places = inputs.classes.cpu()

    def call() -> Outcome:
        rows = (places, trained[-1])
        loss = superfine_kernels.linear_cross_entropy(inputs.hidden, weight, inputs.target, rows=rows)
        return loss.detach(), *torch.autograd.grad(loss, trained)

    return call


PROVIDERS = (
    Provider("torch eager", _eager_in_its_dtype),
    Provider("torch eager, float32 loss", _eager, in_quick=False),
    Provider("torch linear_cross_entropy", _torch, in_quick=False),  # on a CPU as fast as eager
    Provider("superfine", _superfine),
)
ROW_PROVIDERS = (
    Provider("torch eager", _eager_in_its_dtype),
    Provider("superfine, whole gradient", _superfine),
    Provider("superfine, rows", _superfine_rows),
)


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (1024, 768, 50257),
    *,
    kept: float = 1.0,
    trains: str = "hidden and weight",
    in_quick: bool = True,
) -> Case:
    n, h, v = shape
    # Few rows of the weight take next to no time.
    trained = {"input_grad": "hidden" in trains, "weight_grad": "weight" in trains}
    what = "" if trains == "hidden and weight" else f", {trains} trained"
    what += "" if kept == 1 else f", {kept:.0%} of the labels"
    return Case(
        op="linear_cross_entropy",
        name=f"{n}x{h}x{v}{what}",
        dtype=str(dtype).removeprefix("torch."),
        work=f"mean loss and the gradients of {trains}",
        cost=partial(cost, round(n * kept), h, v, dtype, **trained),
        traffic="",
        memory=n * v * (3 * dtype.itemsize + 8) + 3 * v * h * dtype.itemsize,
        inputs=partial(_inputs, n=n, h=h, v=v, dtype=dtype, kept=kept, trains=trains),
        before=lambda inputs: None,
        check=_check,
        providers=ROW_PROVIDERS if "rows" in trains else PROVIDERS,
        redraw=_redraw,
        gemm=str(dtype).removeprefix("torch."),
        in_quick=in_quick,
    )


def cases() -> list[Case]:
    """Return the cases: all trained, in both precisions; and what padding or a frozen part saves."""
    return [
        _case(torch.bfloat16),
        _case(torch.bfloat16, trains="hidden"),
        _case(torch.bfloat16, trains="weight", in_quick=False),
        _case(torch.bfloat16, kept=0.3),
        _case(torch.bfloat16, trains=f"hidden and {SAMPLE} rows", in_quick=False),
        _case(torch.float32),
    ]
