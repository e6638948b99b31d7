"""Short runs of superfine tune for tests: their configuration, what they recorded, and how to stop them.

The model has 20,000 parameters and texts have about 8 tokens, so that a run takes about a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from superfine.config import Config, load_config
from superfine.tune import Listener

TIMINGS = (
    "ms_forward",
    "ms_backward",
    "ms_optimizer",
    "seconds",
    "environment",
    "memory_before_training_bytes",
    "peak_memory_bytes",
)


def settings(base: Path, data: Path, out: Path, **values: Any) -> Config:
    """A short run; keyword arguments such as train__epochs=2 go over it."""
    overrides = {
        "data.path": str(data),
        "data.max_length": 32,
        "model.name": str(base),
        "select.parameters": ["last:1", "head"],
        "optimizer.lr": 3e-3,
        "train.epochs": 2,
        "train.batch_size": 8,
        "train.checkpoint_every": 3,
        "train.log_every": 1,
        "train.device": "cpu",
        "output.directory": str(out),
    }
    return load_config(overrides=overrides | {key.replace("__", "."): value for key, value in values.items()})


def events(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["event"] == kind]


def assert_same_run(a: Path, b: Path) -> None:
    left, right = load_file(a / "delta.safetensors"), load_file(b / "delta.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert events(a) == events(b)


class At(Listener):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step(self, step: int, total: int) -> None:
        if step == self.step:
            self.action()


class CrashError(Exception):
    pass


def crash() -> None:
    raise CrashError


class Recorder(Listener):
    def __init__(self):
        self.stages, self.notes, self.steps = [], [], []

    def stage(self, number, text):
        self.stages.append(number)

    def note(self, text):
        self.notes.append(text)

    def on_step(self, step, total):
        self.steps.append((step, total))
