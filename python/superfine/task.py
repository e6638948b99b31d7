"""What the head predicts and how it is scored: classes, one yes/no, a number, or the next token.

============================  =======  ============================  =================================
loss                          outputs  prediction                    metrics
============================  =======  ============================  =================================
``cross_entropy``             classes  largest logit                 accuracy, macro F1, confusion
``binary_cross_entropy``      1        second class if logit > 0     accuracy, macro F1, confusion
``mse``                       1        the output                    mse, mae, Pearson's r
============================  =======  ============================  =================================

A causal language model (``kind``) has cross-entropy, of its own, and perplexity as its metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Task", "is_causal_lm", "perplexity"]


@dataclass(frozen=True)
class Task:
    """A loss, for classification its class names in the order of the outputs, and what the model reads."""

    loss: str
    labels: tuple[str, ...] = ()
    text: tuple[str, ...] = ("text",)  # one column, or two for sentence pairs
    label: str = "label"
    max_length: int = 128  # tokens
    kind: str = "classification"  # or "causal-lm"
    pack: bool = True  # language models: texts follow each other in blocks of max_length

    @property
    def is_language_model(self) -> bool:
        return self.kind == "causal-lm"

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.loss == "cross_entropy" else 1

    def configure(self, config: Any) -> None:
        """Write outputs and class names into a Hugging Face model config, as its pipelines read them."""
        config.superfine = asdict(self)
        if self.is_language_model:
            return
        names = {"cross_entropy": list(self.labels), "binary_cross_entropy": list(self.labels[1:])}
        ours = names.get(self.loss, ["LABEL_0"])
        config.id2label = dict(enumerate(ours))
        config.label2id = {name: index for index, name in enumerate(ours)}
        config.problem_type = {
            "cross_entropy": "single_label_classification",
            # One output, which is the second class's; pipelines apply a sigmoid for this type.
            "binary_cross_entropy": "multi_label_classification",
            "mse": "regression",
        }[self.loss]

    @staticmethod
    def of_config(config: Any) -> Task:
        """The task a model was tuned for; from elsewhere, by its class, its outputs and its names for them."""
        ours = getattr(config, "superfine", None)
        if ours is not None:
            return Task.of_dict(ours)
        limit = min(512, getattr(config, "max_position_embeddings", None) or 512)
        if is_causal_lm(config):
            return Task("cross_entropy", max_length=limit, kind="causal-lm")
        if config.num_labels == 1:
            return Task("mse", max_length=limit)
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        return Task("cross_entropy", names, max_length=limit)

    @staticmethod
    def of_dict(values: Any) -> Task:
        """The inverse of ``dataclasses.asdict``, also after a round trip through JSON."""
        known = {entry.name for entry in fields(Task)}
        if not isinstance(values, dict) or not {"loss", "labels"} <= set(values) <= known:
            raise ValueError(f"task: description is {values!r}; expected the keys {', '.join(sorted(known))}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Task(**arguments)

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """Labels as the loss wants them: int64 class indices, or float32; shape (n,).

        Raises ``ValueError`` for a class name that is not one of ``self.labels``.
        """
        if self.loss == "mse":
            return torch.tensor(labels, dtype=torch.float32)
        index = {name: i for i, name in enumerate(self.labels)}
        unknown = next((name for name in labels if name not in index), None)
        if unknown is not None:
            raise ValueError(
                f"data: label is {unknown!r}; expected one of {', '.join(map(repr, self.labels))}"
            )
        dtype = torch.long if self.loss == "cross_entropy" else torch.float32
        return torch.tensor([index[name] for name in labels], dtype=dtype)

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Logits (n, num_outputs); of a language model, which need not have any, its mean loss over tokens, ()."""
        if self.is_language_model:
            # Keys and values of all layers would be kept for tokens to come, also of frozen ones.
            loss: Tensor = model(**inputs, labels=targets, use_cache=False).loss
            return loss
        logits: Tensor = model(**inputs).logits
        return logits

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch as a 0-dim fp32 tensor: what ``outputs`` returned, and targets (n,)."""
        from superfine.losses import bce_with_logits, cross_entropy, mse

        logits = outputs.float()
        if self.is_language_model:
            return logits
        if self.loss == "cross_entropy":
            return cross_entropy(logits, targets, label_smoothing=label_smoothing)
        if self.loss == "binary_cross_entropy":
            return bce_with_logits(logits.squeeze(-1), targets)
        return mse(logits.squeeze(-1), targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Any]:
        """Scores over a whole split: logits (n, num_outputs) and targets (n,), on the CPU."""
        if self.loss == "mse":
            return _regression_metrics(logits.squeeze(-1).double(), targets.double())
        predicted = logits.argmax(-1) if self.loss == "cross_entropy" else (logits.squeeze(-1) > 0).long()
        n = len(self.labels)
        confusion = torch.bincount(targets.long() * n + predicted, minlength=n * n).view(n, n)
        return {
            "accuracy": confusion.diagonal().sum().item() / len(targets),
            "f1_macro": _f1_macro(confusion),
            "labels": list(self.labels),
            "confusion": confusion.tolist(),  # row: true class, column: predicted class
        }


def perplexity(loss: float) -> float | None:
    """exp(loss), or None where that is beyond a float."""
    return math.exp(loss) if loss < 700 else None


def is_causal_lm(config: Any) -> bool:
    """Whether a Hugging Face configuration is that of a causal language model, by the class it was saved from."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return (
        bool(config.architectures) and config.architectures[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _f1_macro(confusion: Tensor) -> float:
    """Mean F1 over the classes that occur as a label or as a prediction (scikit-learn's definition)."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * confusion.diagonal().double() / both.clamp(min=1)
    return f1[both > 0].mean().item()


def _regression_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    error = outputs - targets
    x, y = outputs - outputs.mean(), targets - targets.mean()
    spread = (x.square().sum() * y.square().sum()).sqrt().item()
    return {
        "mse": error.square().mean().item(),
        "mae": error.abs().mean().item(),
        "pearson": (x * y).sum().item() / spread if spread > 0 else None,  # undefined for a constant
    }
