"""Losses with torch's names and arguments, computed by Superfine's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from superfine_kernels import (
    bce_with_logits,
    cross_entropy,
    linear_cross_entropy,
    linear_topk_kl_div,
    mse,
    topk_kl_div,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "TopKKLDivLoss",
    "bce_with_logits",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_topk_kl_div",
    "mse",
    "topk_kl_div",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with the gradient computed in the forward pass.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in torch.
        options: z_loss, softcap, scale, shift, inplace, return_stats, check, backend: see
            `superfine_kernels.cross_entropy`.

    Shapes: input (C), (N, C) or (N, C, d1, ...); target (), (N) or (N, d1, ...), or probabilities of the shape of
    input. The loss is float32 (float64 for float64 logits).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.options = _known(options, "CrossEntropyLoss", *_OPTIONS, "inplace")

    def forward(self, input: Tensor, target: Tensor, **rest: Any) -> Any:
        """The loss; `probabilities` and `num_items` of this call as in `superfine_kernels.cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            **self.options,
            **rest,
        )


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and its loss without logits, as `torch.nn.LinearCrossEntropyLoss`, whose state it has.

    Args:
        in_features, num_classes, bias, device, dtype: of the layer, `self.linear`; alone it gives logits.
        weight, ignore_index, reduction, label_smoothing: of the loss, as in `CrossEntropyLoss`.
        options: z_loss, softcap, scale, shift, tile_bytes, skip_mass, return_stats, check, backend: see
            `superfine_kernels.linear_cross_entropy`.

    Shapes: input (in_features) or (..., in_features); target (...). The loss is float32 (float64 for float64 inputs).
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = _known(options, "LinearCrossEntropyLoss", *_OPTIONS, "tile_bytes", "skip_mass")

    def forward(self, input: Tensor, target: Tensor, **rest: Any) -> Any:
        """The loss; `probabilities`, `num_items`, `lora` and `rows` of this call as in `linear_cross_entropy`."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
            **rest,
        )


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` with the gradient computed in the forward pass.

    Args:
        weight, reduction, pos_weight: as in torch.
        inplace: let the gradient overwrite the logits; see `superfine_kernels.bce_with_logits`.

    Shapes: input and target alike, of any number of dimensions; weights broadcast to them. The loss is float32
    (float64 for float64 logits).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, reduction=reduction, pos_weight=pos_weight)
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return bce_with_logits(
            input, target, self.weight, self.reduction, self.pos_weight, inplace=self.inplace
        )


class MSELoss(nn.MSELoss):
    """`torch.nn.MSELoss` with the gradient computed in the forward pass.

    Args:
        reduction: as in torch.
        inplace: let the gradient overwrite the outputs; see `superfine_kernels.mse`.

    Shapes: input and target alike, of any number of dimensions. The loss is float32 (float64 for float64 outputs).
    """

    def __init__(self, reduction: str = "mean", *, inplace: bool = False) -> None:
        super().__init__(reduction=reduction)
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse(input, target, self.reduction, inplace=self.inplace)


class TopKKLDivLoss(nn.Module):
    """Distillation from a teacher's largest probabilities: `superfine_kernels.topk_kl_div` as a module.

    Args:
        temperature, renormalize, ignore_index, reduction: see there.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        renormalize: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.renormalize = renormalize
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, probabilities: Tensor) -> Tensor:
        return topk_kl_div(
            input,
            target,
            probabilities,
            temperature=self.temperature,
            renormalize=self.renormalize,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


_OPTIONS = ("z_loss", "softcap", "scale", "shift", "return_stats", "check", "backend")


def _known(options: dict[str, Any], name: str, *known: str) -> dict[str, Any]:
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"{name}: argument is {unknown[0]!r}; expected one of {', '.join(known)}")
    return options
