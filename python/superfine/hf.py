"""Hugging Face models and tokenizers: loading them for a task (``superfine.tasks``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from superfine.data import Rows
from superfine.encoded import Encoded, epoch_order
from superfine.fused_loss import FusedLoss, in_eval_mode, use_fused_loss
from superfine.tasks import Task

__all__ = [
    "Encoded",
    "FusedLoss",
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
    """The tokenizer of a model. Without a padding token (GPT-like) it pads with the end-of-text token.

    Raises ``ValueError`` where it has neither, or cannot be loaded.
    """
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


def load_model(
    name: str, task: Task, seed: int, pad_token_id: int | None = None
) -> tuple[nn.Module, set[str]]:
    """Load a model in fp32 with a head for ``task``; what is missing is drawn under ``seed``.

    Returns the model, in eval mode, and the names of the newly drawn parameters (a head of another size is
    replaced too). The same name, task and seed give the same bits. Raises ``ValueError`` where ``task`` needs
    another kind of model than the folder holds.
    """
    import transformers

    config = load_config(name)
    task.check_config(name, config)
    kind: Any = getattr(transformers, task.auto_model)
    task.configure(config)
    # Of a language model it would be the end token, whose embedding many models then leave without a gradient.
    if "pad_token_id" in task.settings and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    torch.manual_seed(seed)
    with quiet(), _readable("model", name):
        model, info = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # Mismatched entries carry shapes beside the name.
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    task.check_model(name, model.eval())
    return model.eval(), set(info["missing_keys"]) | mismatched


def encode(rows: Rows, tokenizer: Any, task: Task, model_config: Any = None) -> Encoded:
    """Tokenize ``rows`` as ``task.encode`` does.

    Raises ``ValueError`` when ``task.max_length`` is more than the model has positions for, or as the task does.
    """
    max_length = task.max_length
    # A tokenizer without a limit says 1e30. Some models state theirs in the config only.
    limit = min(tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None) or 1 << 30)
    if max_length > limit:
        raise ValueError(f"data: max_length is {max_length}; expected at most {limit}, the model's positions")
    return task.encode(rows, tokenizer)


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
