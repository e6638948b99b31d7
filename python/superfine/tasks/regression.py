"""Regression: a number for each text, or pair of texts; mean squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from superfine.labels import number_label
from superfine.tasks.base import Task

__all__ = ["Regression"]


@dataclass(frozen=True)
class Regression(Task):
    """A number for each text, in the unit of the labels."""

    loss: str = "mse"

    kind: ClassVar[str] = "regression"
    settings: ClassVar[tuple[str, ...]] = (
        "id2label", "label2id", "problem_type", "pad_token_id", "superfine",
    )  # fmt: skip

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        return number_label(record, name)

    def configure(self, config: Any) -> None:
        """One output, which Hugging Face's pipelines leave as it is."""
        super().configure(config)
        config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
        config.problem_type = "regression"

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """float32 (n,)."""
        return torch.tensor(labels, dtype=torch.float32)

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from superfine.losses import mse

        return mse(outputs.float().squeeze(-1), targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Of outputs (n, 1) and targets (n,); correlations of a constant are undefined, None."""
        x, y = outputs.squeeze(-1).double(), targets.double()
        return {
            "mse": (x - y).square().mean().item(),
            "mae": (x - y).abs().mean().item(),
            "pearson": _pearson(x, y),
            "spearman": _pearson(_ranks(x), _ranks(y)),
        }


def _pearson(x: Tensor, y: Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    spread = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / spread if spread > 0 else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1; equal values have the mean of theirs (scipy.stats.rankdata)."""
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]
