"""Text for language models: from files to texts, from texts to splits and blocks of tokens.

A row of a table is a text of its own; splits draw whole rows. A plain text file is one long text; splits cut it, at
blank lines: its beginning trains, then comes the validation part, and its end is the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from superfine.data import Rows, decode, read_rows

__all__ = ["blocks", "cut", "is_plain_text", "read_text"]

PLAIN = (".txt", ".text", ".md")


def is_plain_text(path: str | Path) -> bool:
    """Whether ``path`` is a plain text file, or a folder of such."""
    path = Path(path)
    return path.is_dir() or path.suffix.lower() in PLAIN


def read_text(path: str | Path, column: str, *, on_bad_line: str = "error", encoding: str = "utf-8") -> Rows:
    """Texts, without labels: a plain text file, every one in a folder (by name, with those of folders inside), or the
    column of a ``.csv``, ``.tsv`` or ``.jsonl`` file.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file and what is wrong: no text, another encoding, and
    for tables as ``read_rows``.
    """
    path = Path(path)
    if not is_plain_text(path):
        return read_rows(path, (column,), None, on_bad_line=on_bad_line, encoding=encoding)
    names = [path]
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix.lower() in PLAIN and p.is_file())
    elif not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file; expected a text file")
    texts: list[tuple[str, ...]] = [
        (text,) for text in (decode(name, encoding) for name in names) if text.strip()
    ]
    if not texts:
        what = f"a folder without text in {', '.join(PLAIN)} files" if path.is_dir() else "empty"
        raise ValueError(f"data: {path} is {what}; expected text")
    return Rows(texts, [None] * len(texts))


def cut(rows: Rows, validation: float, test: float) -> tuple[Rows, Rows, Rows]:
    """Cuts every text into train, validation and test parts, which keep their order, by shares of its characters.

    A cut moves on to the next blank line, or line, or space, unless that takes more than the share of a part.
    """
    parts: tuple[Rows, Rows, Rows] = (Rows(), Rows(), Rows())
    for (text,) in rows.texts:
        step = max(1, int(len(text) * min(share for share in (validation, test, 1.0) if share)))
        first = _boundary(text, round(len(text) * (1 - validation - test)), step)
        second = _boundary(text, max(first, round(len(text) * (1 - test))), step)
        for part, (start, stop) in zip(parts, ((0, first), (first, second), (second, None)), strict=True):
            if text[start:stop].strip():
                part.texts.append((text[start:stop],))
                part.labels.append(None)
    return parts


def _boundary(text: str, position: int, step: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, position, position + step)
        if found >= 0:
            return found + len(mark)
    return position


def blocks(
    documents: Sequence[list[int]], end: int | None, max_length: int, *, pack: bool
) -> list[list[int]]:
    """Token ids of documents as samples of 2 to ``max_length`` tokens.

    ``pack``: the documents follow each other, each closed by the token ``end`` where there is one, cut into equal
    blocks; the last may be shorter. Else each document is a sample, cut at ``max_length``. A sample of a single token
    predicts nothing and is left out.
    """
    if not pack:
        return [document[:max_length] for document in documents if len(document) > 1]
    closed = (
        document if end is None or document[-1:] == [end] else [*document, end]
        for document in documents
        if document
    )
    stream = list(chain.from_iterable(closed))
    found = [
        stream[i * max_length : (i + 1) * max_length] for i in range(math.ceil(len(stream) / max_length))
    ]
    return [block for block in found if len(block) > 1]
