"""What a task is: which rows it reads, what the model takes and returns, its loss and its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from superfine.data import Rows, read_rows
from superfine.encoded import Encoded

__all__ = ["Run", "Task"]


@dataclass(frozen=True)
class Run:
    """How a model is run over a split."""

    batch_size: int = 32
    device: torch.device | str = "cpu"
    precision: str = "fp32"
    between_batches: Callable[[], None] = lambda: None  # may raise to stop early


@dataclass(frozen=True)
class Task:
    """Columns and limits of the data. What is here suits models with one row of outputs for each text."""

    loss: str = "cross_entropy"
    labels: tuple[str, ...] = ()  # class names in the order of the outputs
    text: tuple[str, ...] = ("text",)  # one column, or two for pairs
    label: str = "label"
    max_length: int = 128  # tokens

    kind: ClassVar[str]  # its name in ``model.task``
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    settings: ClassVar[tuple[str, ...]] = ("superfine",)  # entries of the model's config that a merge needs
    classes: ClassVar[bool] = False  # labels are class names, and every split has its part of each
    plain_text: ClassVar[bool] = False  # .txt files are data, too
    keeps_outputs: ClassVar[bool] = True  # the scores need the outputs of a whole split

    # --- description, as files keep it ---

    def describe(self) -> dict[str, Any]:
        """JSON-able; ``superfine.tasks.of_dict`` is the inverse."""
        return {"kind": self.kind, **asdict(self)}

    def configure(self, config: Any) -> None:
        """Write what the model is for into a Hugging Face config."""
        config.superfine = self.describe()

    # --- data ---

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        """The label of a record, and what is wrong with it (``superfine.labels``)."""
        raise NotImplementedError

    def read(self, path: str | Path, *, on_bad_line: str = "error", encoding: str = "utf-8") -> Rows:
        """The rows of a file; raises as ``superfine.data.read_rows``."""
        return read_rows(
            path, self.text, self.label, parse=self.parse_label, on_bad_line=on_bad_line, encoding=encoding
        )

    def with_columns(self, text: Sequence[str] | None, label: str | None) -> Self:
        """The same task on a file whose columns have other names."""
        text = tuple(text or self.text)
        if len(text) != len(self.text):
            raise ValueError(
                f"data: text is {', '.join(text)}; expected {len(self.text)} column"
                f"{'s' if len(self.text) > 1 else ''}, as the model was tuned on"
            )
        return replace(self, text=text, label=label or self.label)

    def group(self, texts: tuple[str, ...]) -> str | None:
        """What rows share that must not be both in train and in test; None: nothing."""
        return None

    # --- model ---

    def check_config(self, name: str, config: Any) -> None:
        """Raise ``ValueError`` where a configuration is that of a model for something else."""

    def check_model(self, name: str, model: Any) -> None:
        """Raise ``ValueError`` where the loaded model cannot do this task."""

    def fuse(self, model: nn.Module, wanted: bool) -> str:
        """Let the model compute its loss without logits, if it has one of its own; a line to tell, or ``""``."""
        return ""

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        """Token ids and targets; longer texts are cut at ``max_length`` tokens."""
        columns = [list(column) for column in zip(*rows.texts, strict=True)]
        tokens = tokenizer(*columns, truncation=True, max_length=self.max_length, verbose=False)
        features, padding = self.features(tokens, tokenizer)
        cut = sum(len(ids) >= self.max_length for ids in features["input_ids"])
        return Encoded(features, self.targets(rows.labels), padding, tokenizer.padding_side, cut)

    @staticmethod
    def features(tokens: Any, tokenizer: Any) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
        """The model's inputs among what a tokenizer returned, and what each is padded with."""
        if "attention_mask" not in tokens:
            tokens["attention_mask"] = [[1] * len(ids) for ids in tokens["input_ids"]]
        names = dict.fromkeys((*tokenizer.model_input_names, "attention_mask"))
        found = {key: tokens[key] for key in names if key in tokens}
        padding = dict.fromkeys(found, 0) | {"input_ids": tokenizer.pad_token_id}
        if "token_type_ids" in found:
            padding["token_type_ids"] = tokenizer.pad_token_type_id
        return found, padding

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """Labels as the loss wants them."""
        raise NotImplementedError

    # --- loss and scores ---

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """What loss and scores are made of: logits (n, outputs), or of a model with a loss of its own that, ()."""
        logits: Tensor = model(**inputs).logits
        return logits

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch as a 0-dim fp32 tensor: what ``outputs`` returned, and its targets."""
        raise NotImplementedError

    def scores(self, loss: float, data: Any, order: Sequence[int], outputs: list[Tensor]) -> dict[str, Any]:
        """Metrics of a split: outputs by batch, on the CPU, of the samples in ``order``."""
        return self.metrics(torch.cat(outputs), data.targets[torch.tensor(order)])

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Metrics of the outputs and targets of a whole split."""
        raise NotImplementedError

    def generated_scores(self, model: Any, data: Any, run: Run, *, final: bool) -> dict[str, Any]:
        """Metrics of what the model writes; ``final``: on the test split, or by ``superfine eval``."""
        return {}
