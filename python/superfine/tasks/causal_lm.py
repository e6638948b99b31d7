"""Causal language models: the loss of the next token, and its exponential, the perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from superfine.data import Rows
from superfine.encoded import Encoded
from superfine.fused_loss import use_fused_loss
from superfine.tasks.base import Task
from superfine.text import blocks, read_text

__all__ = ["CausalLM", "NextToken", "TokenTask", "is_causal_lm", "perplexity"]


@dataclass
class NextToken(Encoded):
    """Texts whose tokens themselves are the targets, -100 where there is none."""

    def tokens(self) -> int:
        return sum(self.lengths())

    def terms(self, indices: Sequence[int]) -> int:
        """Tokens that have one before them."""
        return sum(len(self.features["input_ids"][i]) - 1 for i in indices)

    def targets_of(self, indices: Sequence[int], inputs: dict[str, Tensor]) -> Tensor:
        return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@dataclass(frozen=True)
class TokenTask(Task):
    """Of models that compute the mean loss of a text's tokens themselves."""

    keeps_outputs: ClassVar[bool] = False

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        # Keys and values of all layers would be kept for tokens to come, also of frozen ones.
        loss: Tensor = model(**inputs, labels=targets, use_cache=False).loss
        return loss

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return outputs.float()

    def scores(self, loss: float, data: Any, order: Sequence[int], outputs: list[Tensor]) -> dict[str, Any]:
        return {"perplexity": perplexity(loss)}


@dataclass(frozen=True)
class CausalLM(TokenTask):
    """Text without labels."""

    pack: bool = True  # texts follow each other in blocks of max_length

    kind: ClassVar[str] = "causal-lm"
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    plain_text: ClassVar[bool] = True

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        return None, ""

    def read(self, path: str | Path, *, on_bad_line: str = "error", encoding: str = "utf-8") -> Rows:
        return read_text(path, self.text[0], on_bad_line=on_bad_line, encoding=encoding)

    def with_columns(self, text: Sequence[str] | None, label: str | None) -> Self:
        if label is not None or len(text or self.text) != 1:
            raise ValueError(
                "eval: label or two text columns are given; expected neither with a language model"
            )
        return super().with_columns(text, None)

    def check_config(self, name: str, config: Any) -> None:
        if not is_causal_lm(config):
            saved = (config.architectures or [type(config).__name__])[0]
            raise ValueError(
                f"model: {name} is a {saved}; expected a causal language model with model.task = 'causal-lm'"
            )

    @torch.no_grad()
    def check_model(self, name: str, model: Any) -> None:
        """That its own loss is of the next token: nothing then predicts the first, whose loss alone is NaN."""
        tokens = torch.arange(4)[None] % model.config.get_text_config().vocab_size
        labels = tokens.masked_fill(torch.arange(4) > 0, -100)
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
        if loss is None or (loss.isfinite() and loss > 0):
            what = "has no loss" if loss is None else "compares logits with the current token"
            raise ValueError(
                f"model: {name} is a {type(model).__name__}, which {what}; expected a causal language model that"
                " shifts its labels, as GPT-2 and Llama do"
            )

    def fuse(self, model: nn.Module, wanted: bool) -> str:
        if wanted:
            try:
                use_fused_loss(model, logits=False)
            except ValueError as error:
                raise ValueError(f"{error}, or train.fused_loss = false") from error
        return ""

    def encode(self, rows: Rows, tokenizer: Any) -> NextToken:
        """Samples of ``superfine.text.blocks``. Raises ``ValueError`` where no text has two tokens."""
        documents = tokenizer([text for (text,) in rows.texts], verbose=False)["input_ids"]
        ids = blocks(documents, tokenizer.eos_token_id, self.max_length, pack=self.pack)
        if not ids:
            raise ValueError(
                "data: a split has no text of two tokens; expected more text, or other fractions"
            )
        cut = 0 if self.pack else sum(len(document) > self.max_length for document in documents)
        features = {"input_ids": ids, "attention_mask": [[1] * len(block) for block in ids]}
        padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        return NextToken(features, [None] * len(ids), padding, "right", cut)


def perplexity(loss: float) -> float | None:
    """exp(loss), or None where that is beyond a float."""
    return math.exp(loss) if loss < 700 else None


def is_causal_lm(config: Any) -> bool:
    """Whether a Hugging Face configuration is that of a causal language model, by the class it was saved from."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return (
        bool(config.architectures) and config.architectures[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
