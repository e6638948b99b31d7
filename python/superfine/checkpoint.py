"""The resumable state of a run: one file that is replaced whole, so that a kill leaves the one before.

    checkpoint/state.pt            where the run stands; what resuming continues from, to the same bits
    checkpoint/best.safetensors    the trained tensors with the lowest validation loss so far

``state.pt`` holds only tensors, numbers, strings and containers of them, and is read with
``torch.load(weights_only=True)``. ``best.safetensors`` is written before the state that mentions it: a kill
between the two leaves an older state, which writes the same best again when it gets there.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from superfine._files import atomic_write
from superfine.select import Plan

__all__ = [
    "MetricsLog",
    "Progress",
    "load_best",
    "load_state",
    "load_trained",
    "restore_rng",
    "rng_state",
    "save_best",
    "save_state",
    "trained_tensors",
]

FORMAT = "superfine-checkpoint-1"


@dataclass
class Progress:
    """Where a run stands; everything else about the loop follows from the configuration."""

    step: int = 0  # optimizer steps done
    validated_step: int = 0  # last step after which validation was done
    best_loss: float = math.inf
    best_step: int = 0
    bad_validations: int = 0  # since the best
    stopped_early: bool = False
    seconds: float = 0.0  # spent training and validating, over all sessions


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line. Opening it cuts off what lies after ``valid_bytes``."""

    def __init__(self, path: Path, valid_bytes: int = 0) -> None:
        self.path = path
        path.touch()
        size = path.stat().st_size
        if size < valid_bytes:
            raise ValueError(
                f"resume: {path} has {size} bytes; the checkpoint expected {valid_bytes} or more"
            )
        os.truncate(path, valid_bytes)

    def append(self, event: dict[str, Any]) -> None:
        """Write one line."""
        line = json.dumps(event, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, in order."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def synced_bytes(self) -> int:
        """Size after everything is on disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size


def trained_tensors(plan: Plan) -> dict[str, Tensor]:
    """CPU copies of the trained parameters, those of slices too, and the persistent buffers, by name."""
    parameters = {name for name, _ in plan.model.named_parameters(remove_duplicate=False)}
    kept = dict(plan.named_parameters()) | {
        name: value
        for name, value in plan.model.state_dict().items()
        if name not in parameters and isinstance(value, Tensor)
    }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in kept.items()}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy what ``trained_tensors`` returned back into the model.

    Raises ``ValueError`` for a tensor that the model does not have.
    """
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"resume: the checkpoint holds {unexpected[0]!r}; expected tensors of this model")


def save_state(
    folder: Path,
    progress: Progress,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    *,
    metrics_bytes: int,
    fingerprint: dict[str, str],
) -> None:
    """Write ``state.pt`` atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "trained": trained_tensors(plan),
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(),
        "metrics_bytes": metrics_bytes,
        "fingerprint": fingerprint,
    }
    with atomic_write(folder / "state.pt") as temporary:
        torch.save(state, temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The last state written, or None where there is none; ``ValueError`` for a file that is no state."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"resume: {path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"resume: {path} is no checkpoint of this version; expected format {FORMAT!r}")
    return state


def save_best(folder: Path, plan: Plan) -> None:
    """Write ``best.safetensors`` atomically from what the model holds now."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "best.safetensors") as temporary:
        save_file(trained_tensors(plan), temporary)


def load_best(folder: Path, plan: Plan) -> None:
    """Put the best trained tensors back into the model. Raises ``ValueError`` where they cannot be read."""
    path = folder / "best.safetensors"
    try:
        load_trained(plan.model, load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error


def rng_state() -> dict[str, Any]:
    """The states of every generator that a training step may draw from, the long ones as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put the states of ``rng_state`` back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
