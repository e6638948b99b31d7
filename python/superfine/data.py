"""Text, mostly labelled, from a file or a ``datasets`` name to three clean splits.

Order matters and is fixed: read, check every row, remove duplicates, draw ``limit``, split. Duplicates go
before the split, because a text in both train and test makes the test score a memory test.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superfine.config import DataConfig
from superfine.labels import LabelParser, class_label, text_problem
from superfine.records import Records, csv_records, decode, jsonl_records

if TYPE_CHECKING:
    from superfine.tasks.base import Task

__all__ = [
    "Rows",
    "Splits",
    "decode",
    "fingerprint",
    "load_splits",
    "read_rows",
    "remove_duplicates",
    "stratified_split",
]


@dataclass
class Rows:
    """Samples: one text (or a pair) and one label each, as its task reads it, or None."""

    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    skipped: int = 0  # unreadable lines left out

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Rows:
        return Rows([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass
class Splits:
    """Train, validation and test rows, the class names in order, and what was done on the way."""

    train: Rows
    validation: Rows
    test: Rows
    labels: tuple[str, ...]  # empty but for classification
    skipped: int
    duplicates: int
    conflicts: int
    notes: list[str]

    def fingerprint(self) -> str:
        """Equal exactly when the data is."""
        return fingerprint([self.train, self.validation, self.test])


def fingerprint(parts: Sequence[Rows]) -> str:
    """sha256 over every text and label, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(json.dumps([rows.texts, rows.labels]).encode())
    return digest.hexdigest()


def load_splits(config: DataConfig, task: Task) -> Splits:
    """Read, clean and split the data that ``config`` names, for a task (``superfine.tasks``), which reads it.

    Rows that share what ``task.group`` says are in the same split.

    Raises ``ValueError`` or ``FileNotFoundError`` naming file, line or column: missing columns, unreadable
    lines (unless ``on_bad_line = "skip"``), empty texts, too few classes, too few rows.
    """
    from superfine.text import cut, is_plain_text  # which imports this module

    plain = config.path is not None and is_plain_text(config.path)
    if plain and not task.plain_text:
        raise ValueError(
            f"data: {config.path} is plain text; expected .csv, .tsv or .jsonl, or model.task = 'causal-lm'"
            " (--task causal-lm)"
        )
    if plain and config.limit is not None and not Path(config.path or "").is_dir():
        raise ValueError(
            f"data: limit is {config.limit}; expected none with a plain text file, which is one long text"
        )

    def read(name: str, split: str) -> Rows:
        if config.path is not None:
            return task.read(name, on_bad_line=config.on_bad_line, encoding=config.encoding)
        return _read_dataset(config, split, task)

    parts = {"train": read(config.path or "", "train")}
    for name, value in (("validation", config.validation), ("test", config.test)):
        if isinstance(value, str):
            parts[name] = read(value, value)
    skipped = sum(rows.skipped for rows in parts.values())

    duplicates = conflicts = 0
    if config.dedupe:
        # Held-out rows first: where a text is in two files, the training copy is the one that goes.
        order = [name for name in ("test", "validation", "train") if name in parts]
        cleaned, duplicates, conflicts = remove_duplicates([parts[name] for name in order])
        parts = dict(zip(order, cleaned, strict=True))
    if config.limit is not None and config.limit < len(parts["train"]):
        drawn = random.Random(f"limit {config.seed}").sample(range(len(parts["train"])), config.limit)
        parts["train"] = parts["train"].take(sorted(drawn))

    fractions = [0.0 if isinstance(value, str) else value for value in (config.validation, config.test)]
    whole = parts["train"]
    classes = whole.labels if task.classes else [""] * len(whole)
    if plain:
        drawn_parts = cut(whole, fractions[0], fractions[1], config.seed)
    else:
        indices = _split_groups(whole, task, classes, fractions, config.seed)
        drawn_parts = (whole.take(indices[0]), whole.take(indices[1]), whole.take(indices[2]))
    for name, rows in zip(("train", "validation", "test"), drawn_parts, strict=True):
        if name == "train" or name not in parts:
            parts[name] = rows

    notes = [
        f"class {name!r} has {count} row{'s' if count > 1 else ''}: too few to split, all in train"
        for name, count in sorted(Counter(classes).items())
        if count < 3 and any(fractions) and task.classes
    ]
    labels = _class_names(parts, config.label, task.loss) if task.classes else ()
    for name, rows in parts.items():
        if not rows:
            more = "text" if plain else "rows"
            raise ValueError(f"data: the {name} split is empty; expected more {more}, or other fractions")
    return Splits(
        **parts, labels=labels, skipped=skipped, duplicates=duplicates, conflicts=conflicts, notes=notes
    )


def read_rows(
    path: str | Path,
    text: Sequence[str],
    label: str | None,
    *,
    parse: LabelParser = class_label,
    on_bad_line: str = "error",
    encoding: str = "utf-8",
) -> Rows:
    """Read a ``.csv``, ``.tsv`` or ``.jsonl`` file with a text column (or two) and a label column, or none.

    ``parse`` makes the label of a record (``superfine.labels``).

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file and the column or the first bad line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file; expected a .csv, .tsv or .jsonl file")
    readers: dict[str, Callable[[str], tuple[list[str], Records]]] = {
        ".csv": lambda content: csv_records(content, ","),
        ".tsv": lambda content: csv_records(content, "\t"),
        ".jsonl": jsonl_records,
        ".ndjson": jsonl_records,
    }
    if path.suffix.lower() not in readers:
        from superfine.text import PLAIN

        known = ".csv, .tsv or .jsonl" if label is not None else f"{', '.join(PLAIN)}, .csv, .tsv or .jsonl"
        raise ValueError(f"data: {path} has the suffix {path.suffix!r}; expected {known}")
    content = decode(path, encoding)
    if not content.strip():
        wanted = " and ".join(filter(None, (", ".join(text), label)))
        raise ValueError(f"data: {path} is empty; expected rows with {wanted}")
    columns, records = readers[path.suffix.lower()](content)
    return _check_rows(str(path), columns, records, text, label, parse, on_bad_line)


def remove_duplicates(parts: Sequence[Rows]) -> tuple[list[Rows], int, int]:
    """Keep the first of each text, over all ``parts`` in order.

    Returns the cleaned parts, the number of rows removed, and how many of those had another label than the
    row that stayed.
    """
    first_label: dict[tuple[str, ...], Any] = {}
    duplicates = conflicts = 0
    cleaned = []
    for rows in parts:
        kept = []
        for index, (text, label) in enumerate(zip(rows.texts, rows.labels, strict=True)):
            if text not in first_label:
                first_label[text] = label
                kept.append(index)
            else:
                duplicates += 1
                conflicts += first_label[text] != label
        cleaned.append(rows.take(kept))
    return cleaned, duplicates, conflicts


def stratified_split(
    labels: Sequence[str], validation: float, test: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Indices of train, validation and test, every class in proportion, the same for the same ``seed``.

    A class with at least 3 rows is in each split that has a fraction above 0; a smaller one is in train only.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(labels):
        members.setdefault(name, []).append(index)
    train: list[int] = []
    held_out: tuple[list[int], list[int]] = ([], [])
    for name, indices in members.items():
        # Seeded by a string, which Python hashes with SHA-512: the same on every machine and version.
        random.Random(f"{seed} {name}").shuffle(indices)
        n = len(indices)
        counts = [max(1, round(n * part)) if part and n >= 3 else 0 for part in (validation, test)]
        while sum(counts) >= n and max(counts) > 1:  # leave at least one to train on
            counts[counts.index(max(counts))] -= 1
        held_out[0].extend(indices[: counts[0]])
        held_out[1].extend(indices[counts[0] : sum(counts)])
        train.extend(indices[sum(counts) :])
    return sorted(train), sorted(held_out[0]), sorted(held_out[1])


def _split_groups(
    rows: Rows, task: Task, classes: Sequence[str], fractions: Sequence[float], seed: int
) -> tuple[list[int], list[int], list[int]]:
    """``stratified_split`` of the rows, or of what they are grouped by, all rows of a group together."""
    groups = [task.group(texts) for texts in rows.texts]
    distinct = dict.fromkeys(groups)
    if None in distinct or len(distinct) == len(rows):
        return stratified_split(classes, fractions[0], fractions[1], seed)
    drawn = stratified_split([""] * len(distinct), fractions[0], fractions[1], seed)
    of_group = dict(zip(distinct, range(len(distinct)), strict=True))
    parts = [set(part) for part in drawn]
    first, second, third = ([i for i, g in enumerate(groups) if of_group[g] in part] for part in parts)
    return first, second, third


def _read_dataset(config: DataConfig, split: str, task: Task) -> Rows:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ImportError(
            f"data: dataset is {config.dataset!r}, which needs the package 'datasets'; pip install datasets,"
            " or use data.path with a .csv or .jsonl file"
        ) from None
    table = datasets.load_dataset(config.dataset, config.dataset_config, split=split)
    label = None if task.plain_text else task.label
    names = getattr(table.features.get(label), "names", None)  # a ClassLabel stores indices

    def records() -> Records:
        for number, record in enumerate(table, start=1):
            record = dict(record)
            if names is not None and isinstance(record.get(label), int):
                # -1 marks the unlabelled rows of public benchmarks.
                index = record[label]
                record[label] = names[index] if 0 <= index < len(names) else None
            yield number, record, ""

    return _check_rows(
        f"{config.dataset} ({split})",
        list(table.column_names),
        records(),
        task.text,
        label,
        task.parse_label,
        config.on_bad_line,
    )


def _check_rows(
    where: str,
    columns: list[str],
    records: Records,
    text: Sequence[str],
    label: str | None,
    parse: LabelParser,
    on_bad_line: str,
) -> Rows:
    wanted = (*text, label) if label is not None else tuple(text)
    for name in wanted:
        if name not in columns:
            near = get_close_matches(name, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(map(repr, columns))
            raise ValueError(f"data: {where} has no column {name!r}; expected one of {known}{hint}")
    repeated = [name for name in wanted if columns.count(name) > 1]
    if repeated:
        raise ValueError(f"data: {where} has several columns {repeated[0]!r}; expected one")
    rows = Rows()
    first_problem = ""
    for line, record, problem in records:
        value: Any = None
        if record is not None:
            problem = next((p for p in (text_problem(record, name) for name in text) if p), "")
            if not problem and label is not None:
                value, problem = parse(record, label)
        if problem:
            rows.skipped += 1
            first_problem = first_problem or f"line {line} ({problem})"
        else:
            rows.texts.append(tuple(record[name] for name in text))  # type: ignore[index]
            rows.labels.append(value)
    if rows.skipped and on_bad_line == "error":
        raise ValueError(
            f"data: {where} has {rows.skipped} unreadable line{'s' if rows.skipped > 1 else ''}, the first is"
            f' {first_problem}; correct the file, or set data.on_bad_line = "skip"'
        )
    if not rows:
        raise ValueError(f"data: {where} has no usable row; expected at least one")
    return rows


def _class_names(parts: dict[str, Rows], column: str, loss: str) -> tuple[str, ...]:
    """Class names of the training rows, by number where all are integers, else by alphabet."""
    names = set(parts["train"].labels)
    if len(names) < 2:
        found = f"only one class ({next(iter(names))!r})" if names else "no rows"
        raise ValueError(f"data: column {column!r} has {found} to train on; expected at least two classes")
    if loss == "binary_cross_entropy" and len(names) != 2:
        raise ValueError(f"data: column {column!r} has {len(names)} classes; expected two for {loss}")
    try:
        ordered = sorted(names, key=int)
    except ValueError:
        ordered = sorted(names)
    for split in ("validation", "test"):
        for name in parts[split].labels:
            if name not in names:
                raise ValueError(
                    f"data: the {split} split has the class {name!r}, which no training row has;"
                    f" expected one of {', '.join(ordered)}"
                )
    return tuple(ordered)
