"""Inputs and references shared by the tests of the GPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

import superfine_kernels

#: (parameter and gradient, moments): every combination that the kernels take.
ADAMW_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]

LOGIT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

#: Largest error of a loss of about 10, and of a gradient below 1, against float64 on the same logits.
LOSS_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-11}
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


@dataclass
class AdamWCase:
    """The lists that `adamw_` takes; each tensor of a list has its own values and its own count of steps."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def random(
        cls,
        sizes: Sequence[int],
        param: torch.dtype = torch.float32,
        state: torch.dtype = torch.float32,
        amsgrad: bool = False,
        device: str = "cpu",
    ) -> Self:
        generator = torch.Generator().manual_seed(len(sizes) + sum(sizes))

        def values(dtype: torch.dtype) -> list[Tensor]:
            if dtype == torch.uint8:
                codes = [torch.randint(0, 256, (n,), generator=generator, dtype=dtype) for n in sizes]
                return [c.to(device) for c in codes]
            return [
                torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to(device) for n in sizes
            ]

        def squares() -> list[Tensor]:
            return values(state) if state == torch.uint8 else [v.square_() for v in values(state)]

        steps = [torch.tensor(float(i % 5), device=device) for i in range(len(sizes))]
        return cls(
            values(param), values(param), values(state), squares(), squares() if amsgrad else [], steps
        )

    def lists(self) -> tuple[list[Tensor], ...]:
        return (
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps
        )  # fmt: skip

    def all_lists(self) -> tuple[list[Tensor], ...]:
        """All that the op takes, in its order: `superfine_kernels._moments.LISTS`."""
        return (
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, [], [], [], self.steps
        )  # fmt: skip

    def to(self, device: str) -> Self:
        """A copy on `device`."""
        return type(self)(
            **{name: [t.detach().clone().to(device) for t in tensors] for name, tensors in vars(self).items()}
        )


class LambCase(AdamWCase):
    """The lists that `lamb_` takes: those of `adamw_` without `max_exp_avg_sqs`."""

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps


def assert_same_bits(actual: AdamWCase, expected: AdamWCase) -> None:
    for name, ours in vars(actual).items():
        for i, (a, b) in enumerate(zip(ours, vars(expected)[name], strict=True)):
            assert torch.equal(a.cpu(), b.cpu()), f"{name}[{i}] of {a.numel()} elements differs"


def logits(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocab)
    return (4 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(device)


def labels(rows: int, vocab: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(rows + vocab)
    return torch.randint(0, vocab, (rows,), generator=generator).to(device)


def class_weights(vocab: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.rand(vocab, generator=generator, dtype=torch.float64).to(opmath).to(device)


def cross_entropy_in_float64(
    input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, lse, and `scale` times dloss/dinput, by eager torch in float64 on the CPU."""
    x = input.detach().cpu().double().requires_grad_()
    w = None if weight is None else weight.cpu().double()
    losses = torch.nn.functional.cross_entropy(
        x, target.cpu().long(), w, reduction="none", label_smoothing=label_smoothing
    )
    (gradient,) = torch.autograd.grad((losses * scale.cpu().double()).sum(), x)
    return losses.detach(), x.detach().logsumexp(1), gradient


def elementwise_inputs(
    shape: Sequence[int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Outputs around zero, and targets: labels, and probabilities between them."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 4 * torch.randn(tuple(shape), generator=generator)
    t = (2 * torch.rand(tuple(shape), generator=generator) - 0.5).clamp(0, 1)
    return x.to(dtype).to(device), t.to(dtype).to(device)


def elementwise_loss(
    loss: str, input: Tensor, target: Tensor, *, pos_weight: Tensor | None = None, **options
) -> Tensor:
    """`bce_with_logits` or `mse`, which has no pos_weight."""
    if loss == "mse":
        return superfine_kernels.mse(input, target, **options)
    return superfine_kernels.bce_with_logits(input, target, pos_weight=pos_weight, **options)


def elementwise_in_float64(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the input by eager torch, in float64 on the CPU."""
    x, t = input.detach().cpu().double().requires_grad_(), target.cpu().double()
    w, p = (None if v is None else v.cpu().double() for v in (weight, pos_weight))
    functional = torch.nn.functional
    if loss == "mse":
        w = None if w is None else w.expand(x.shape)
        value = functional.mse_loss(x, t, reduction=reduction, weight=w)
    else:
        value = functional.binary_cross_entropy_with_logits(x, t, w, pos_weight=p, reduction=reduction)
    value.backward(torch.ones_like(value) if upstream is None else upstream.cpu().double())
    return value.detach(), x.grad
