"""``superfine tune``: from a pretrained model and text, labelled or not, to a tuned model, in six steps.

    config = superfine.config.load_config("tweets.toml")
    result = superfine.tune.tune(config)

A run directory holds config.toml (every value, defaults too), metrics.jsonl, curves.png, report.html,
delta.safetensors (the trained tensors) and checkpoint/ (what a resumed run continues from).
"""

from __future__ import annotations

import json
import random
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superfine import checkpoint, hf, tasks
from superfine._files import atomic_write
from superfine._memory import PeakMemory
from superfine._tune_cache import FilledCache
from superfine._tune_parts import choose, consolidate
from superfine.config import Config, differing_keys, load_config, to_toml
from superfine.data import Splits, load_splits
from superfine.delta import base_hash, load_delta, save_delta
from superfine.env import environment
from superfine.evaluate import evaluate, resolve_device
from superfine.prepare import prepare
from superfine.replay import Mixture, load_others
from superfine.select import Plan
from superfine.tasks import Task
from superfine.trainer import Interrupted, Listener, Trainer

__all__ = ["Interrupted", "Listener", "RunResult", "resolve", "tune"]


@dataclass(frozen=True)
class RunResult:
    """A finished run: test scores of the untouched base and of the tuned model, and the summary; where
    ``[original]`` names held-back data, those of both on it, as ``{"base": ..., "tuned": ...}``."""

    directory: Path
    baseline: dict[str, Any]
    test: dict[str, Any]
    summary: dict[str, Any]
    original: dict[str, dict[str, Any]] | None = None


def tune(config: Config, *, resume: bool = False, listener: Listener | None = None) -> RunResult:
    """Run the six steps, writing to ``config.output.directory``; ``resume`` continues the run found there.

    On the CPU a resumed run ends in the same bits as an unbroken one. Raises ``ValueError`` or an ``OSError``
    for bad input, ``FileExistsError`` for a directory in use, ``Interrupted`` after Ctrl-C or SIGTERM.
    """
    listener = listener or Listener()
    config = resolve(config)
    directory = Path(config.output.directory)
    state = _open_run(directory, config, resume)

    listener.stage(1, "prepare data")
    task = tasks.of_settings(config)
    splits = load_splits(config.data, task)
    _describe(splits, listener)

    listener.stage(2, "load pretrained model")
    seed_everything(config.train.seed)
    device = torch.device(config.train.device)
    base_config = hf.load_config(config.model.name)
    task = replace(task, labels=_label_order(splits.labels, base_config))
    task.check_config(config.model.name, base_config)
    others = load_others(config, task, splits)
    for note in others.notes:
        listener.note(note)
    tokenizer = hf.load_tokenizer(config.model.name)
    rows = {"train": splits.train, "validation": splits.validation, "test": splits.test} | others.named()
    encoded = {name: hf.encode(part, tokenizer, task, base_config) for name, part in rows.items()}
    counts = _counts(splits, encoded)
    _describe_tokens(encoded, counts, task, listener)
    model, new, fused = _load_base(config, task, tokenizer)
    listener.note(f"{type(model).__name__} from {config.model.name}, on {config.train.device}")
    if fused:
        listener.note(fused)
    if new:
        listener.note(f"new, drawn under seed {config.train.seed}: {', '.join(sorted(new))}")

    listener.stage(3, "choose parameters")
    plan = choose(config, model, encoded)
    frozen_new = sorted(new - set(plan.names))
    if frozen_new:
        raise ValueError(
            f"select: {frozen_new[0]} is new, untrained and not selected; expected 'head' among the selectors"
        )
    listener.note(str(plan))
    if config.train.prepare:
        listener.note(str(prepare(model, plan, checkpointing=config.train.checkpointing)))
    hashes = {"data": splits.fingerprint(), "model": base_hash(model, plan.names)} | others.fingerprints()
    for what, value in hashes.items():
        if state is not None and state["fingerprint"].get(what) != value:
            raise ValueError(f"resume: the {what} is not what the run began with; expected the same files")

    listener.stage(4, "set optimizer")
    optimizer = plan.optimizer(config.optimizer.name, **config.optimizer.arguments())
    listener.note(_describe_optimizer(config))
    # Of the base, before a checkpoint is loaded: a resumed run pulls toward the same values.
    ewc = None
    if config.ewc is not None:
        old = encoded["ewc" if config.ewc.path is not None else "original"]
        ewc = consolidate(config.ewc, plan, task, old, seed=config.data.seed, new=new, listener=listener)
    # Filled before the run counts as begun: stopped here, there is nothing to resume.
    cache = _fill_cache(config, plan, encoded, listener)

    listener.stage(5, "train with validation")
    if not resume:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / "config.toml") as temporary:
            temporary.write_text(to_toml(config), encoding="utf-8")
    log = checkpoint.MetricsLog(directory / "metrics.jsonl", state["metrics_bytes"] if state else 0)
    train, mixture = encoded["train"], Mixture(len(encoded["train"]))
    if config.replay is not None:
        mixture = Mixture(len(train), len(encoded["replay"]), config.replay.fraction)
        train = train.followed_by(encoded["replay"])
        listener.note(f"{mixture.drawn:,} samples of the original task in each epoch of {len(mixture):,}")
    trainer = Trainer(
        config,
        plan,
        optimizer,
        task,
        train,
        encoded["validation"],
        directory=directory,
        log=log,
        fingerprint=hashes,
        listener=listener,
        mixture=mixture,
        ewc=ewc,
    )
    if state is None:
        _log(log, listener, "start", environment=environment(), data=counts)
    else:
        trainer.restore(state)
        listener.note(f"continuing after step {trainer.progress.step} of {trainer.total}")
    with PeakMemory(device) as memory, cache or nullcontext():
        trainer.run()
    delta = directory / "delta.safetensors"
    save_delta(model, plan, delta, extra=_delta_notes(config, task, model))
    summary = _summarise(trainer, plan, log, delta, memory)
    if cache is not None:
        summary |= cache.summary(summary["seconds"], summary["epochs"])
    if memory.peak is not None and memory.before is not None:
        listener.note(
            f"memory: {memory.before / 1e6:,.0f} MB before, {memory.peak / 1e6:,.0f} MB at the peak of training"
        )
    del trainer, optimizer, model, plan, cache, ewc

    # The tuned model is what anyone gets who puts the saved delta on the base: so that is what is tested.
    listener.stage(6, "evaluate on the test split")
    model, _, _ = _load_base(config, task, tokenizer)
    base = _scores(config, task, model, encoded)
    load_delta(model, delta)
    tuned = _scores(config, task, model, encoded)
    _log(log, listener, "baseline", **base["test"])
    _log(log, listener, "test", **tuned["test"])
    original = {"base": base["original"], "tuned": tuned["original"]} if "original" in base else None
    if original is not None:
        _log(log, listener, "original", **original)
    _log(log, listener, "summary", **summary)
    _write_report(directory, listener)
    return RunResult(directory, base["test"], tuned["test"], summary, original)


def resolve(config: Config) -> Config:
    """Replace ``auto`` and relative paths by what they mean here; check that the files exist."""
    files: dict[str, dict[str, str]] = {"data": {}, "replay": {}, "ewc": {}, "original": {}}
    for name, found in files.items():
        section = getattr(config, name)
        if section is None or (name in ("data", "ewc") and section.path is None):
            continue
        for key in ("path", "validation", "test"):
            value = getattr(section, key, None)
            if isinstance(value, str):
                path = Path(value).expanduser().resolve()
                text = tasks.of_settings(config).plain_text
                if not (path.is_file() or (text and path.is_dir())):
                    more = ", a .txt file or a folder of these" if text else ""
                    raise FileNotFoundError(
                        f"{name}: {key} is {value}; expected a .csv, .tsv or .jsonl file{more}"
                    )
                found[key] = str(path)
    return config.model_copy(
        update={
            **{name: getattr(config, name).model_copy(update=f) for name, f in files.items() if f},
            "model": config.model.model_copy(update={"name": hf.check_model_name(config.model.name)}),
            "train": config.train.model_copy(update={"device": resolve_device(config.train.device).type}),
        }
    )


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _open_run(directory: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """The state to continue from, or None for a start from the beginning."""
    if not resume:
        if directory.is_dir() and not any(directory.iterdir()):
            return None
        if directory.exists():
            what = "holds a run" if (directory / "config.toml").is_file() else "exists and is not empty"
            raise FileExistsError(
                f"tune: {directory} {what}; continue it with --resume, or choose another --output directory"
            )
        return None
    if not (directory / "config.toml").is_file():
        raise FileNotFoundError(f"resume: {directory} has no config.toml; expected a run directory")
    saved = load_config(directory / "config.toml")
    differing = differing_keys(saved, config)
    if differing:
        values = []
        for key in differing:
            section, name = key.split(".")
            was, now = (getattr(getattr(c, section), name, None) for c in (saved, config))
            values.append(f"{key} (was {was!r}, now {now!r})")
        raise ValueError(
            f"resume: the configuration differs in {', '.join(values)}; expected that of"
            f" {directory / 'config.toml'}, or another --output directory without --resume"
        )
    return checkpoint.load_state(directory / "checkpoint")


def _label_order(labels: tuple[str, ...], base_config: Any) -> tuple[str, ...]:
    """The base model's own order where it already classifies into these classes: its head stays useful."""
    theirs = tuple(base_config.id2label.get(index, "") for index in range(base_config.num_labels))
    return theirs if set(theirs) == set(labels) and len(theirs) == len(labels) else labels


def _load_base(config: Config, task: Task, tokenizer: Any) -> tuple[Any, set[str], str]:
    """The pretrained model on its device, the names of what is new in it, and a line on its loss, or ""."""
    model, new = hf.load_model(config.model.name, task, config.train.seed, tokenizer.pad_token_id)
    fused = task.fuse(model, config.train.fused_loss)
    return model.to(config.train.device), new, fused


def _scores(
    config: Config, task: Task, model: Any, encoded: dict[str, hf.Encoded]
) -> dict[str, dict[str, Any]]:
    """On the test split and, where it is asked for, on data of the model's original task."""
    options: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "device": torch.device(config.train.device),
        "precision": config.train.precision,
    }
    asked = [name for name in ("test", "original") if name in encoded]
    return {name: evaluate(model, encoded[name], task, **options) for name in asked}


def _fill_cache(
    config: Config, plan: Plan, encoded: dict[str, hf.Encoded], listener: Listener
) -> FilledCache | None:
    if config.train.cache is None:
        return None
    seen = [encoded[name] for name in ("train", "replay", "validation") if name in encoded]
    return FilledCache(config.train.cache, plan, config, seen, listener)


def _counts(splits: Splits, encoded: dict[str, hf.Encoded]) -> dict[str, Any]:
    tokens = {name: part.tokens() for name, part in encoded.items() if part.tokens() is not None}
    return ({"tokens": tokens} if tokens else {}) | {
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "labels": list(splits.labels),
        "skipped": splits.skipped,
        "duplicates": splits.duplicates,
        "conflicts": splits.conflicts,
    }


def _describe(splits: Splits, listener: Listener) -> None:
    what = "text" if splits.train.labels[0] is None else "sample"
    what += "s" if len(splits.train) != 1 else ""
    listener.note(
        f"{len(splits.train):,} {what} to train on, {len(splits.validation):,} for validation,"
        f" {len(splits.test):,} for the test"
    )
    if splits.labels:
        listener.note(f"classes: {', '.join(splits.labels)}")
    if splits.skipped:
        listener.note(f"{splits.skipped:,} unreadable lines skipped")
    if splits.duplicates:
        listener.note(
            f"{splits.duplicates:,} duplicate texts removed before splitting,"
            f" {splits.conflicts:,} of them with another label than the one kept"
        )
    for note in splits.notes:
        listener.note(note)


def _describe_tokens(
    encoded: dict[str, hf.Encoded], counts: dict[str, Any], task: Task, listener: Listener
) -> None:
    cut = sum(part.truncated for part in encoded.values())
    if cut:
        listener.note(f"{cut:,} texts reach data.max_length = {task.max_length} tokens and may be cut")
    for name, tokens in counts.get("tokens", {}).items():
        listener.note(
            f"{name}: {tokens:,} tokens in {len(encoded[name]):,} samples of up to {task.max_length}"
        )


def _describe_optimizer(config: Config) -> str:
    options = ", ".join(f"{key} {value}" for key, value in config.optimizer.arguments().items())
    limit = config.optimizer.max_grad_norm
    clip = f", gradients clipped at norm {limit}" if limit else ""
    return f"{config.optimizer.name}: {options}, {config.train.schedule} schedule{clip}"


def _delta_notes(config: Config, task: Task, model: Any) -> dict[str, str]:
    """What ``superfine eval`` and ``superfine merge`` need beside the tensors."""
    return {
        "task": json.dumps(task.describe()),
        "base": config.model.name,
        "model_class": type(model).__name__,
        "config": json.dumps({key: getattr(model.config, key, None) for key in task.settings}),
    }


def _summarise(
    trainer: Trainer, plan: Plan, log: checkpoint.MetricsLog, delta: Path, memory: PeakMemory
) -> dict[str, Any]:
    progress, timed = trainer.progress, log.events("train")[1:]  # the first step warms up
    parts = ("ms_forward", "ms_backward", "ms_optimizer")
    return {
        "steps": progress.step,
        "epochs": round(progress.step / trainer.steps_per_epoch, 4),
        "best_step": progress.best_step,
        "best_validation_loss": progress.best_loss,
        "stopped_early": progress.stopped_early,
        "num_trainable": plan.num_trainable,
        "num_total": plan.num_total,
        "delta_bytes": delta.stat().st_size,
        "seconds": round(progress.seconds, 3),
        "memory_before_training_bytes": memory.before,
        "peak_memory_bytes": memory.peak,  # while training and validating, in this session
        **{part: round(statistics.median(event[part] for event in timed), 3) for part in parts if timed},
    }


def _log(log: checkpoint.MetricsLog, listener: Listener, kind: str, **values: Any) -> None:
    event = {"event": kind, **values}
    log.append(event)
    listener.on_event(event)


def _write_report(directory: Path, listener: Listener) -> None:
    try:
        from superfine.report import write_report

        write_report(directory)
    except ImportError as error:  # the run is complete without it
        listener.note(f"no curves.png and report.html: {error}")
