"""Hugging Face models and tokenizers: loading them for a task, and turning text into padded batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from superfine.data import Rows
from superfine.fused_loss import FusedLoss, in_eval_mode, use_fused_loss
from superfine.task import Task, is_causal_lm
from superfine.text import blocks

__all__ = [
    "Encoded",
    "FusedLoss",
    "check_kind",
    "check_model_name",
    "encode",
    "epoch_order",
    "in_eval_mode",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "quiet",
    "use_fused_loss",
]


def check_model_name(name: str) -> str:
    """Return a local folder as an absolute path and a hub name as it is; raise where ``name`` is neither.

    Raises ``FileNotFoundError`` for a path that does not exist, ``ValueError`` for a folder without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {name} has no config.json; expected a Hugging Face model folder")
        return str(path.resolve())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip()
    if looks_like_path or path.exists():
        raise FileNotFoundError(
            f"model: {name!r} is not a folder; expected a Hugging Face model folder or a hub name"
        )
    return name


def local_folder(name: str) -> Path:
    """The folder of a model: the one named, or the hub's files in the local cache, downloaded as needed."""
    name = check_model_name(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _readable("model", name):
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # no pickles, no other frameworks
        return Path(snapshot_download(name, allow_patterns=wanted))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model. Without a padding token (GPT-like) it pads with the end-of-text token."""
    from transformers import AutoTokenizer

    with quiet(), _readable("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model: the tokenizer of {name} has neither a padding nor an end token; expected one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> Any:
    """The model's configuration, read from a folder or the hub."""
    from transformers import AutoConfig

    with quiet(), _readable("model", name):
        return AutoConfig.from_pretrained(name)


def check_kind(name: str, config: Any, task: Task) -> None:
    """Raise ``ValueError`` where ``task`` needs a causal language model and a configuration is another's."""
    if task.is_language_model and not is_causal_lm(config):
        saved = (config.architectures or [type(config).__name__])[0]
        raise ValueError(
            f"model: {name} is a {saved}; expected a causal language model with model.task = 'causal-lm'"
        )


def load_model(
    name: str, task: Task, seed: int, pad_token_id: int | None = None
) -> tuple[nn.Module, set[str]]:
    """Load a model in fp32 with a head for ``task``; what is missing is drawn under ``seed``.

    Returns the model, in eval mode, and the names of the newly drawn parameters (a head of another size is
    replaced too). The same name, task and seed give the same bits. Raises ``ValueError`` where ``task`` needs a
    causal language model and the folder holds another, or one whose own loss is that of the current token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = load_config(name)
    check_kind(name, config, task)
    kind: Any = AutoModelForCausalLM if task.is_language_model else AutoModelForSequenceClassification
    task.configure(config)
    # Of a language model it would be the end token, whose embedding many models then leave without a gradient.
    if not task.is_language_model and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    torch.manual_seed(seed)
    with quiet(), _readable("model", name):
        model, info = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # Mismatched entries carry shapes beside the name.
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    if task.is_language_model:
        _check_next_token(name, model.eval())
    return model.eval(), set(info["missing_keys"]) | mismatched


@torch.no_grad()
def _check_next_token(name: str, model: Any) -> None:
    """That the model's own loss is of the next token: nothing then predicts the first, whose loss alone is NaN."""
    tokens = torch.arange(4)[None] % model.config.get_text_config().vocab_size
    labels = tokens.masked_fill(torch.arange(4) > 0, -100)
    loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
    if loss is None or (loss.isfinite() and loss > 0):
        what = "has no loss" if loss is None else "compares logits with the current token"
        raise ValueError(
            f"model: {name} is a {type(model).__name__}, which {what}; expected a causal language model that shifts "
            "its labels, as GPT-2 and Llama do"
        )


@dataclass
class Encoded:
    """A split as token ids, not yet padded, and its targets."""

    features: dict[str, list[list[int]]]
    targets: Tensor
    padding: dict[str, int]
    padding_side: str
    truncated: int  # samples cut at max_length
    next_token: bool = False  # of a language model: the tokens themselves are the targets

    def __len__(self) -> int:
        return len(self.features["input_ids"])

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.features["input_ids"]]

    def terms(self, indices: Sequence[int]) -> int:
        """How many terms the mean loss of these samples has: samples, or tokens that have one before them."""
        if not self.next_token:
            return len(indices)
        return sum(len(self.features["input_ids"][i]) - 1 for i in indices)

    def batch(self, indices: Sequence[int], device: torch.device | str) -> tuple[dict[str, Tensor], Tensor]:
        """Samples ``indices`` padded to the longest of them: int64 (n, longest), and targets (n,), or of a language
        model (n, longest), -100 where there is no token."""
        longest = max(len(self.features["input_ids"][i]) for i in indices)
        inputs = {}
        for key, values in self.features.items():
            rows = []
            for i in indices:
                pad = [self.padding[key]] * (longest - len(values[i]))
                rows.append(pad + values[i] if self.padding_side == "left" else values[i] + pad)
            inputs[key] = torch.tensor(rows).to(device, non_blocking=True)
        if self.next_token:
            return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs, self.targets[torch.tensor(indices)].to(device, non_blocking=True)


def encode(rows: Rows, tokenizer: Any, task: Task, model_config: Any = None) -> Encoded:
    """Tokenize ``rows``, cutting at ``task.max_length`` tokens; for a language model see ``superfine.text.blocks``.

    Raises ``ValueError`` when that is more than the model has positions for, or no text has two tokens.
    """
    max_length = task.max_length
    # A tokenizer without a limit says 1e30. Some models state theirs in the config only.
    limit = min(tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None) or 1 << 30)
    if max_length > limit:
        raise ValueError(f"data: max_length is {max_length}; expected at most {limit}, the model's positions")
    columns = [list(column) for column in zip(*rows.texts, strict=True)]
    if task.is_language_model:
        documents = tokenizer(columns[0], verbose=False)["input_ids"]
        ids = blocks(documents, tokenizer.eos_token_id, max_length, pack=task.pack)
        if not ids:
            raise ValueError(
                "data: a split has no text of two tokens; expected more text, or other fractions"
            )
        cut = 0 if task.pack else sum(len(document) > max_length for document in documents)
        features = {"input_ids": ids, "attention_mask": [[1] * len(block) for block in ids]}
        padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        return Encoded(features, torch.empty(0), padding, "right", cut, next_token=True)
    tokens = tokenizer(*columns, truncation=True, max_length=max_length, verbose=False)
    if "attention_mask" not in tokens:
        tokens["attention_mask"] = [[1] * len(ids) for ids in tokens["input_ids"]]
    features = {key: tokens[key] for key in (*tokenizer.model_input_names, "attention_mask") if key in tokens}
    padding = dict.fromkeys(features, 0) | {"input_ids": tokenizer.pad_token_id}
    if "token_type_ids" in features:
        padding["token_type_ids"] = tokenizer.pad_token_type_id
    cut = sum(len(ids) >= max_length for ids in features["input_ids"])
    return Encoded(features, task.targets(rows.labels), padding, tokenizer.padding_side, cut)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` samples in an epoch, from (seed, epoch) alone: a resumed run finds its place."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)  # a string seeds the same on every machine and version
    return order


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and load reports: the missing head is expected, and said in our words."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _readable(part: str, name: str) -> Iterator[None]:
    """Turn transformers' pages of advice into one line; the full text stays the cause."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model: the {part} of {name} cannot be loaded: {first}") from error
