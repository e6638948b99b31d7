"""Extractive question answering: an answer is a span of its context, as in SQuAD.

A context longer than ``max_length`` tokens becomes several windows that overlap by ``stride`` tokens. The model
scores every token as the first and as the last of the answer (Devlin et al. 2019, section 4.2); the loss is the mean
of both cross-entropies, whose target is the first token ([CLS]) in windows without the answer. The prediction is the
span with the largest sum of both scores, over all windows of a question. Exact match and F1 are those of SQuAD's
evaluation script (Rajpurkar et al. 2016), as fractions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from superfine.data import Rows
from superfine.encoded import Encoded
from superfine.tasks.base import Task

__all__ = ["QuestionAnswering", "Windows", "best_span", "exact_match", "f1", "is_question_answering"]

Offsets = list["tuple[int, int] | None"]  # of each token in the context; None: of the question, or special


@dataclass
class Windows(Encoded):
    """Windows of contexts with their questions; targets are the first and the last token of the answer, (n, 2)."""

    rows: Rows
    row: list[int]  # of each window
    offsets: list[Offsets]
    none: list[int]  # the token that stands for "no answer"


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """A question, its context, and the answers that are right: ``((start in characters, text), ...)``."""

    text: tuple[str, ...] = ("question", "context")
    label: str = "answers"
    max_length: int = 384
    stride: int = 128  # tokens that two windows share
    n_best: int = 20  # first and last tokens of a window that are tried with each other
    max_answer_length: int = 30  # tokens
    impossible: bool = False  # questions without an answer are allowed

    kind: ClassVar[str] = "qa"
    auto_model: ClassVar[str] = "AutoModelForQuestionAnswering"

    def parse_label(self, record: dict[str, Any], name: str) -> tuple[Any, str]:
        """Answers: SQuAD's ``{"text": [...], "answer_start": [...]}``, a list of texts, or one text.

        The start of a text stands in ``answer_start``, of the answers or of the record, or is searched for.
        """
        value: Any = record.get(name)
        context = str(record.get(self.text[-1]))
        starts: Any = record.get("answer_start")
        if isinstance(value, dict):
            value, starts = value.get("text"), value.get("answer_start")
        texts = [value] if isinstance(value, str) else value
        texts = [text for text in texts if text != ""] if isinstance(texts, list) else texts
        if not texts or record.get("is_impossible") is True:
            wanted = "expected an answer, or qa.impossible = true for questions without one"
            return (), "" if self.impossible else f"{name} is empty; {wanted}"
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return (
                None,
                f"{name} is {value!r}; expected a text, a list of texts, or 'text' and 'answer_start'",
            )
        starts = [None] * len(texts) if starts is None or starts == "" else starts
        starts = starts if isinstance(starts, list) else [starts]
        if len(starts) != len(texts):
            return None, f"{name} has {len(texts)} texts and {len(starts)} starts; expected one each"
        answers = []
        for start, text in zip(starts, texts, strict=True):
            if start is None:
                start = context.find(text)
                if start < 0:
                    return None, f"{name} has {text!r}, which is not in the context; expected a part of it"
            elif not str(start).isdecimal() or not context.startswith(text, int(start)):
                return None, f"{name} has {text!r}, which the context has not at character {start!r}"
            answers.append((int(start), text))
        return tuple(answers), ""

    def group(self, texts: tuple[str, ...]) -> str | None:
        return texts[1]  # questions about a context that was trained on are easier

    def check_config(self, name: str, config: Any) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

        if config.model_type not in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES:
            raise ValueError(
                f"model: {name} is of the type {config.model_type!r}; expected one that transformers'"
                " AutoModelForQuestionAnswering knows, as BERT, with model.task = 'qa'"
            )

    def encode(self, rows: Rows, tokenizer: Any) -> Windows:
        """Windows of ``max_length`` tokens; a question longer than half of that is cut."""
        if not tokenizer.is_fast:
            raise ValueError(
                f"model: its tokenizer is a {type(tokenizer).__name__}, which knows no places in the text; expected a"
                " fast one (tokenizer.json) with model.task = 'qa'"
            )
        features: dict[str, list[list[int]]] = {}
        padding: dict[str, int] = {}
        targets: list[tuple[int, int]] = []
        row: list[int] = []
        offsets: list[Offsets] = []
        nones: list[int] = []
        special, longest = tokenizer.num_special_tokens_to_add(pair=True), self.max_length // 2
        for index, ((question, context), answers) in enumerate(zip(rows.texts, rows.labels, strict=True)):
            asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
            if len(asked) > longest:
                question = question[: asked[longest - 1][1]]
            room = self.max_length - min(len(asked), longest) - special
            tokens = tokenizer(
                [question],
                [context],
                truncation="only_second",
                max_length=self.max_length,
                stride=min(self.stride, room // 2),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            found, padding = self.features(tokens, tokenizer)
            for key, values in found.items():
                features.setdefault(key, []).extend(values)
            for window, ids in enumerate(tokens["input_ids"]):
                places = zip(tokens.sequence_ids(window), tokens["offset_mapping"][window], strict=True)
                offsets.append([tuple(place) if part == 1 else None for part, place in places])
                row.append(index)
                nones.append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)
                targets.append(_tokens_of(answers, offsets[-1], nones[-1]))
        side = tokenizer.padding_side
        return Windows(features, torch.tensor(targets), padding, side, 0, rows, row, offsets, nones)

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Scores of every token as the first and as the last: (n, 2, longest), lowest where padding is."""
        output: Any = model(**inputs)
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        # Else the loss of a sample would depend on what it is batched with.
        return logits.masked_fill(inputs["attention_mask"][:, None] == 0, torch.finfo(logits.dtype).min)

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from superfine.losses import cross_entropy

        return cross_entropy(outputs.float().flatten(0, 1), targets.flatten())

    def scores(self, loss: float, data: Any, order: Sequence[int], outputs: list[Tensor]) -> dict[str, Any]:
        predicted = self.predict(data, order, outputs)
        golden = [[text for _, text in answers] or [""] for answers in data.rows.labels]
        pairs = list(zip(predicted, golden, strict=True))
        return {
            "exact_match": sum(max(exact_match(text, one) for one in g) for text, g in pairs) / len(pairs),
            "f1": sum(max(f1(text, one) for one in g) for text, g in pairs) / len(pairs),
        }

    def predict(self, data: Windows, order: Sequence[int], outputs: list[Tensor]) -> list[str]:
        """The answer to each row, ``""`` for none: scores by batch of the windows in ``order``."""
        best: list[tuple[float, str]] = [(-float("inf"), "")] * len(data.rows)
        nothing = [float("inf")] * len(data.rows)  # the lowest score of "no answer" over the windows
        windows = iter(order)
        for batch in outputs:
            for start, end in batch:
                window = next(windows)
                offsets, row = data.offsets[window], data.row[window]
                length = len(offsets)
                if data.padding_side == "left":
                    start, end = start[-length:], end[-length:]
                start, end = start[:length], end[:length]
                none = data.none[window]
                nothing[row] = min(nothing[row], (start[none] + end[none]).item())
                inside = torch.tensor([place is not None for place in offsets])
                span = best_span(start, end, inside, self.n_best, self.max_answer_length)
                if span is not None and span[0] > best[row][0]:
                    (first, _), (_, last) = offsets[span[1]] or (0, 0), offsets[span[2]] or (0, 0)
                    best[row] = (span[0], data.rows.texts[row][1][first:last])
        return [
            "" if self.impossible and none > score else text
            for (score, text), none in zip(best, nothing, strict=True)
        ]


def best_span(
    start: Tensor, end: Tensor, inside: Tensor, n_best: int, max_answer_length: int
) -> tuple[float, int, int] | None:
    """The largest sum of scores, and its first and last token, both ``inside``; None where no pair is a span.

    Scores are (tokens,), of which the ``n_best`` largest are tried.
    """
    k = min(n_best, int(inside.sum()))
    if not k:
        return None
    lowest = -float("inf")
    first = start.masked_fill(~inside, lowest).topk(k).indices
    last = end.masked_fill(~inside, lowest).topk(k).indices
    length = last[None] - first[:, None] + 1
    sums = start[first][:, None] + end[last][None]
    sums = sums.masked_fill((length < 1) | (length > max_answer_length), lowest)
    at = int(sums.argmax())
    score = sums.flatten()[at].item()
    return None if score == lowest else (score, int(first[at // k]), int(last[at % k]))


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(_normalised(prediction) == _normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words after normalisation."""
    ours, theirs = _normalised(prediction).split(), _normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def is_question_answering(config: Any) -> bool:
    """Whether a Hugging Face configuration is that of an extractive question answerer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

    return (
        bool(config.architectures)
        and config.architectures[0] in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values()
    )


def _normalised(text: str) -> str:
    """SQuAD's ``normalize_answer``: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _tokens_of(answers: Sequence[tuple[int, str]], offsets: Offsets, none: int) -> tuple[int, int]:
    """First and last token of the first answer where the window holds all of it, else ``none`` twice."""
    if not answers:
        return none, none
    begin, text = answers[0]
    begin += len(text) - len(text.lstrip())  # no token holds the spaces around it
    end = begin + len(text.strip())
    places = [(index, place) for index, place in enumerate(offsets) if place is not None]
    covered = [index for index, (first, last) in places if first < end and last > begin]
    if not covered or places[0][1][0] > begin or places[-1][1][1] < end:
        return none, none
    return covered[0], covered[-1]
