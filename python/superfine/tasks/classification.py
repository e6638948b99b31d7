"""Classification of texts, or pairs of texts: classes, or one yes/no.

============================  =======  ============================  =================================
loss                          outputs  prediction                    metrics
============================  =======  ============================  =================================
``cross_entropy``             classes  largest logit                 accuracy, macro F1, confusion
``binary_cross_entropy``      1        second class if logit > 0     accuracy, macro F1, confusion
============================  =======  ============================  =================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from superfine.labels import class_label
from superfine.tasks.base import Task

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification(Task):
    """A class for each text."""

    kind: ClassVar[str] = "classification"
    classes: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = (
        "id2label", "label2id", "problem_type", "pad_token_id", "superfine",
    )  # fmt: skip

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        return class_label(record, name)

    def configure(self, config: Any) -> None:
        """Outputs and class names, as Hugging Face's pipelines read them."""
        super().configure(config)
        binary = self.loss == "binary_cross_entropy"
        ours = self.labels[1:] if binary else self.labels
        config.id2label = dict(enumerate(ours))
        config.label2id = {name: index for index, name in enumerate(ours)}
        # One output is the second class's; pipelines apply a sigmoid for several labels.
        config.problem_type = "multi_label_classification" if binary else "single_label_classification"

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """int64 class indices, or float32 0 and 1; shape (n,).

        Raises ``ValueError`` for a class name that is not one of ``self.labels``.
        """
        index = {name: i for i, name in enumerate(self.labels)}
        unknown = next((name for name in labels if name not in index), None)
        if unknown is not None:
            raise ValueError(
                f"data: label is {unknown!r}; expected one of {', '.join(map(repr, self.labels))}"
            )
        dtype = torch.long if self.loss == "cross_entropy" else torch.float32
        return torch.tensor([index[name] for name in labels], dtype=dtype)

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from superfine.losses import bce_with_logits, cross_entropy

        logits = outputs.float()
        if self.loss == "cross_entropy":
            return cross_entropy(logits, targets, label_smoothing=label_smoothing)
        return bce_with_logits(logits.squeeze(-1), targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Of logits (n, outputs) and targets (n,)."""
        cross_entropy = self.loss == "cross_entropy"
        predicted = outputs.argmax(-1) if cross_entropy else (outputs.squeeze(-1) > 0).long()
        n = len(self.labels)
        confusion = torch.bincount(targets.long() * n + predicted, minlength=n * n).view(n, n)
        return {
            "accuracy": confusion.diagonal().sum().item() / len(targets),
            "f1_macro": _f1_macro(confusion),
            "labels": list(self.labels),
            "confusion": confusion.tolist(),  # row: true class, column: predicted class
        }


def _f1_macro(confusion: Tensor) -> float:
    """Mean F1 over the classes that occur as a label or as a prediction (scikit-learn's definition)."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * confusion.diagonal().double() / both.clamp(min=1)
    return f1[both > 0].mean().item()
