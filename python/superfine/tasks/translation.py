"""Translation by an encoder-decoder (T5, Marian): any text to text. Loss and perplexity of the target's tokens;
chrF and BLEU, by sacrebleu, of what the model writes greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from superfine.data import Rows
from superfine.encoded import Encoded, padded
from superfine.fused_loss import in_eval_mode, use_fused_loss
from superfine.labels import text_label
from superfine.tasks.base import Run
from superfine.tasks.causal_lm import TokenTask

__all__ = ["Sequences", "Translation", "is_encoder_decoder"]


@dataclass
class Sequences(Encoded):
    """Texts, and texts to write: targets are token ids, -100 where there is none."""

    references: list[str]
    decode: Callable[[Any], list[str]]

    def vocabulary(self) -> set[int]:
        return super().vocabulary().union(*self.targets)

    def tokens(self) -> int:
        return sum(map(len, self.targets))

    def terms(self, indices: Sequence[int]) -> int:
        return sum(len(self.targets[i]) for i in indices)

    def targets_of(self, indices: Sequence[int], inputs: dict[str, Tensor]) -> Tensor:
        return padded([self.targets[i] for i in indices], -100)


@dataclass(frozen=True)
class Translation(TokenTask):
    """From a source text to a target text."""

    text: tuple[str, ...] = ("source",)
    label: str = "target"
    prefix: str = ""  # before every source, as T5 wants: "translate English to German: "
    max_target_length: int = 128  # tokens, of targets and of what is written
    generate: str = "test"  # when text is written and scored: never, test, or validation too

    kind: ClassVar[str] = "translation"
    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        return text_label(record, name)

    def check_config(self, name: str, config: Any) -> None:
        if not is_encoder_decoder(config):
            saved = (config.architectures or [type(config).__name__])[0]
            raise ValueError(
                f"model: {name} is a {saved}; expected an encoder-decoder with a head, as"
                " T5ForConditionalGeneration, with model.task = 'translation'"
            )
        if self.generate != "never":
            _sacrebleu()  # now, not after the training

    def fuse(self, model: nn.Module, wanted: bool) -> str:
        if not wanted:
            return ""
        try:
            use_fused_loss(model, logits=False)
        except ValueError as error:  # its own loss is right, only larger
            return f"the loss is the model's own, with logits: {error}"
        return ""

    def encode(self, rows: Rows, tokenizer: Any) -> Sequences:
        sources = [self.prefix + text for (text,) in rows.texts]
        tokens = tokenizer(sources, truncation=True, max_length=self.max_length, verbose=False)
        features, padding = self.features(tokens, tokenizer)
        targets = tokenizer(
            text_target=list(rows.labels), truncation=True, max_length=self.max_target_length, verbose=False
        )["input_ids"]
        cut = sum(
            len(ids) >= self.max_length or len(target) >= self.max_target_length
            for ids, target in zip(features["input_ids"], targets, strict=True)
        )

        def decode(ids: Any) -> list[str]:
            texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
            return texts

        return Sequences(features, targets, padding, tokenizer.padding_side, cut, list(rows.labels), decode)

    def predict(self, model: Any, data: Sequences, run: Run) -> list[str]:
        """What the model writes for each source: greedily, at most ``max_target_length`` tokens."""
        from superfine.evaluate import autocast
        from superfine.hf import quiet

        lengths, device = data.lengths(), torch.device(run.device)
        order = sorted(range(len(data)), key=lengths.__getitem__)
        written = [""] * len(data)
        with in_eval_mode(model), torch.no_grad(), quiet():
            for start in range(0, len(order), run.batch_size):
                run.between_batches()
                indices = order[start : start + run.batch_size]
                with autocast(device, run.precision):
                    ids = model.generate(
                        **data.inputs(indices, device),
                        max_new_tokens=self.max_target_length,
                        num_beams=1,
                        do_sample=False,
                    )
                for i, text in zip(indices, data.decode(ids.cpu()), strict=True):
                    written[i] = text
        return written

    def generated_scores(self, model: Any, data: Any, run: Run, *, final: bool) -> dict[str, Any]:
        """Corpus chrF and BLEU, from 0 to 100."""
        if self.generate != "validation" and not (final and self.generate == "test"):
            return {}
        sacrebleu, written = _sacrebleu(), self.predict(model, data, run)
        return {
            "chrf": sacrebleu.corpus_chrf(written, [data.references]).score,
            "bleu": sacrebleu.corpus_bleu(written, [data.references]).score,
        }


def is_encoder_decoder(config: Any) -> bool:
    """Whether a Hugging Face configuration is that of an encoder-decoder with a language model's head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return (
        bool(config.architectures)
        and config.architectures[0] in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise ImportError(
            "translation: chrF and BLEU need the package 'sacrebleu'; pip install 'superfine[translation]', or set"
            " translation.generate = 'never'"
        ) from None
    return sacrebleu
