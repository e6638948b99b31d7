"""Losses with torch's names and arguments, computed by Superfine's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from superfine_kernels import cross_entropy

__all__ = ["CrossEntropyLoss", "cross_entropy"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with the gradient computed in the forward pass.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in torch.
        inplace: let the gradient overwrite the logits; see `superfine_kernels.cross_entropy`.

    Shapes: input (C), (N, C) or (N, C, d1, ...); target (), (N) or (N, d1, ...). The loss is float32 (float64 for
    float64 logits).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            inplace=self.inplace,
        )
