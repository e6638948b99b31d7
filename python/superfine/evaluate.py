"""Scores of a model on a labelled split, and ``superfine eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from superfine import hf
from superfine.config import load_config
from superfine.tasks import Run, Task, of_config, of_dict

__all__ = [
    "autocast",
    "delta_notes",
    "delta_of_run",
    "evaluate",
    "evaluate_saved",
    "load_run",
    "resolve_device",
    "task_of_delta",
]


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where it works; ``cuda`` where it does not is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; expected 'cpu' or 'auto', because torch finds no CUDA device")
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected 'auto', 'cpu' or 'cuda'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def evaluate(
    model: nn.Module,
    data: hf.Encoded,
    task: Task,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    between_batches: Callable[[], None] = lambda: None,
    final: bool = True,
) -> dict[str, Any]:
    """Mean loss and metrics over a split, without label smoothing; leaves the mode of every module as it was.

    Samples are batched by length, so that little is padding. ``between_batches`` may raise to stop early. ``final``
    is false for the validations of a training, for which a translation, say, is not written unless asked for.
    """
    device = torch.device(device)
    lengths = data.lengths()
    order = sorted(range(len(data)), key=lengths.__getitem__)
    total, outputs = 0.0, []
    with hf.in_eval_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            between_batches()
            indices = order[start : start + batch_size]
            inputs, targets = data.batch(indices, device)
            with autocast(device, precision):
                output = task.outputs(model, inputs, targets)
            total += task.loss_of(output, targets).item() * data.terms(indices)
            if task.keeps_outputs:
                outputs.append(output.float().cpu())
    loss = total / data.terms(order)
    run = Run(batch_size, device, precision, between_batches)
    return {
        "loss": loss,
        **task.scores(loss, data, order, outputs),
        **task.generated_scores(model, data, run, final=final),
    }


def evaluate_saved(
    saved: str | Path,
    data: str | Path,
    *,
    text: tuple[str, ...] | None = None,
    label: str | None = None,
    base: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    on_bad_line: str = "error",
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Score a run directory, or a Hugging Face folder of a model with a head for one of the tasks, on a file.

    ``text`` and ``label`` name columns where they differ from those the model was tuned on; ``base`` is the
    base model's folder where it has moved since the run. Returns loss and metrics as in ``metrics.jsonl``,
    and ``rows`` and ``skipped``. Raises ``ValueError`` or ``FileNotFoundError`` for what cannot be read.
    """
    saved, where = Path(saved), resolve_device(device)
    if (saved / "config.toml").is_file():
        model, task, name = load_run(saved, base)
    elif base is not None:
        raise ValueError(f"eval: base is {base}; expected none, because {saved} is no run directory")
    else:
        name = hf.check_model_name(str(saved))
        task = of_config(hf.load_config(name))
        model, missing = hf.load_model(name, task, seed=0)
        if missing:
            raise ValueError(f"eval: {saved} has no {min(missing)}; expected a model tuned for {task.kind}")
        with suppress(ValueError):  # one whose loss is another is scored by its own
            task.fuse(model, True)
    task = task.with_columns(text, label)
    rows = task.read(data, on_bad_line=on_bad_line, encoding=encoding)
    encoded = hf.encode(rows, hf.load_tokenizer(name), task, model.config)
    scores = evaluate(model.to(where), encoded, task, batch_size=batch_size, device=where)
    return scores | {"rows": len(rows), "skipped": rows.skipped}


def load_run(run: Path, base: str | None = None) -> tuple[nn.Module, Task, str]:
    """The tuned model of a run directory, which is its base and its delta; its task; its base's name."""
    from superfine.delta import load_delta

    config, delta = load_config(run / "config.toml"), delta_of_run(run)
    task = task_of_delta(delta)
    name = hf.check_model_name(base or config.model.name)
    model, _ = hf.load_model(name, task, config.train.seed, hf.load_tokenizer(name).pad_token_id)
    load_delta(model, delta)
    task.fuse(model, config.train.fused_loss)
    return model, task, name


def delta_of_run(run: Path) -> Path:
    """The delta file of a finished run. Raises ``FileNotFoundError`` where there is none."""
    delta = run / "delta.safetensors"
    if not delta.is_file():
        hint = "expected a run directory"
        if (run / "config.toml").is_file():
            hint = f"finish it with superfine tune --resume --output {run}"
        raise FileNotFoundError(f"{run} has no delta.safetensors; {hint}")
    return delta


def delta_notes(delta: Path) -> dict[str, str]:
    """The metadata of a delta file, without reading its tensors.

    Raises ``FileNotFoundError``, or ``ValueError`` for a file of another kind.
    """
    if not delta.is_file():
        raise FileNotFoundError(f"{delta} is not a file; expected a delta file or a run directory")
    try:
        with safe_open(delta, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{delta} is truncated or no safetensors file ({error}); expected a delta file"
        ) from error


def task_of_delta(delta: Path) -> Task:
    """The task that ``superfine tune`` noted in a delta file. Raises ``ValueError`` where it names none."""
    notes = delta_notes(delta)
    if "task" not in notes:
        raise ValueError(f"{delta} names no task; expected a delta written by superfine tune")
    return of_dict(json.loads(notes["task"]))
