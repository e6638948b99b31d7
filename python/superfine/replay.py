"""Against forgetting: samples of the task that a model knows already, in its training and for a score of their own.

``[replay]`` mixes some into every epoch (experience replay, Rolnick et al. 2019); ``[ewc]`` measures on some what
must not move; ``[original]`` names held-back ones, which the untouched base and the tuned model are scored on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from superfine.config import Config
from superfine.data import Rows, Splits, fingerprint, remove_duplicates
from superfine.encoded import epoch_order
from superfine.tasks import Task

__all__ = ["Mixture", "Others", "load_others"]


@dataclass(frozen=True)
class Others:
    """Rows to replay, rows for the Fisher information, and rows held back; empty where no file is named."""

    replay: Rows = field(default_factory=Rows)
    ewc: Rows = field(default_factory=Rows)
    original: Rows = field(default_factory=Rows)
    notes: list[str] = field(default_factory=list)

    def named(self) -> dict[str, Rows]:
        """Those that are not empty."""
        parts = {"replay": self.replay, "ewc": self.ewc, "original": self.original}
        return {name: rows for name, rows in parts.items() if rows}

    def fingerprints(self) -> dict[str, str]:
        """By what to call them in an error; first those on which the others depend."""
        what = {"original": "original data", "replay": "data to replay", "ewc": "data of [ewc]"}
        named = self.named()
        return {called: fingerprint([named[name]]) for name, called in what.items() if name in named}


def load_others(config: Config, task: Task, splits: Splits) -> Others:
    """Read the files. What is held back, there or in ``splits``, is in no other.

    Raises ``ValueError`` or ``FileNotFoundError`` as ``task.read``, and for labels that the task has not.
    """
    found: dict[str, Rows] = {"original": Rows(), "replay": Rows(), "ewc": Rows()}
    notes = []
    for name in found:
        section: Any = getattr(config, name)
        if section is None or section.path is None:
            continue
        try:
            reader = task.with_columns(section.text_columns, section.label)
            rows = reader.read(
                section.path, on_bad_line=config.data.on_bad_line, encoding=config.data.encoding
            )
            found[name] = remove_duplicates([rows])[0][0] if config.data.dedupe else rows
            if task.classes:
                task.targets(found[name].labels)  # labels that the head has not
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"[{name}] {section.path}: {error}") from error
    held_back = {text for rows in (splits.validation, splits.test, found["original"]) for text in rows.texts}
    for name, purpose in (("replay", "to replay"), ("ewc", "for the Fisher information")):
        rows = found[name]
        if not rows:
            continue
        kept = rows.take([i for i, text in enumerate(rows.texts) if text not in held_back])
        if len(kept) < len(rows):
            notes.append(
                f"{len(rows) - len(kept):,} of {len(rows):,} rows {purpose} are held back, so left out"
            )
        if not kept:
            raise ValueError(
                f"[{name}]: every row is in the validation, test or original data; expected others"
            )
        found[name] = kept
    if found["replay"]:
        notes.append(f"{len(found['replay']):,} rows of the original task to replay from")
    if found["original"]:
        notes.append(f"{len(found['original']):,} rows of the original task, held back, for its score")
    if config.ewc is not None and config.ewc.path is None:
        notes.append("the Fisher information is of the same rows: ewc.path keeps it apart from the score")
    return Others(**found, notes=notes)


@dataclass(frozen=True)
class Mixture:
    """What an epoch consists of: every one of ``own`` samples, and of ``replayed`` ones, which follow them in number,
    as many as make ``fraction`` of the whole. They take turns, so that all are seen once before one is seen twice."""

    own: int
    replayed: int = 0
    fraction: float = 0.0

    @property
    def drawn(self) -> int:
        """Replayed samples in an epoch."""
        return max(1, round(self.own * self.fraction / (1 - self.fraction))) if self.replayed else 0

    def __len__(self) -> int:
        return self.own + self.drawn

    def order(self, seed: int, epoch: int) -> list[int]:
        """The samples of an epoch, from (seed, epoch) alone: a resumed run finds its place."""
        order = list(range(self.own))
        turns: dict[int, list[int]] = {}
        for position in range(epoch * self.drawn, (epoch + 1) * self.drawn):
            turn, place = divmod(position, self.replayed)
            if turn not in turns:
                turns[turn] = list(range(self.own, self.own + self.replayed))
                random.Random(f"replay {seed} {turn}").shuffle(turns[turn])
            order.append(turns[turn][place])
        return [order[i] for i in epoch_order(len(order), seed, epoch)]
