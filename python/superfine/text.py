"""Text for language models: from files to texts, from texts to splits and blocks of tokens.

A row of a table is a text of its own; splits draw whole rows. A plain text file is one long text; splits cut it, at
blank lines: its beginning trains, then comes the validation part, and its end is the test. Of several files the short
ones, whose parts would be a few words, are drawn whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from superfine.data import Rows, decode, read_rows, stratified_split

__all__ = ["blocks", "cut", "is_plain_text", "read_text"]

PLAIN = (".txt", ".text", ".md")
_PART = 100  # characters: a file whose smallest held-out part would have fewer is short
_WORD = 40  # characters: longer ones are not words, or of a script without spaces


def is_plain_text(path: str | Path) -> bool:
    """Whether ``path`` is a plain text file, or a folder of such."""
    path = Path(path)
    return path.is_dir() or path.suffix.lower() in PLAIN


def read_text(path: str | Path, column: str, *, on_bad_line: str = "error", encoding: str = "utf-8") -> Rows:
    """Texts, without labels: a plain text file, every one in a folder (by name, with those of folders inside), or the
    column of a ``.csv``, ``.tsv`` or ``.jsonl`` file. Lines of plain text end in ``\\n``, whatever they end in there.

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
    contents = (decode(name, encoding).replace("\r\n", "\n").replace("\r", "\n") for name in names)
    texts: list[tuple[str, ...]] = [(text,) for text in contents if text.strip()]
    if not texts:
        what = f"a folder without text in {', '.join(PLAIN)} files" if path.is_dir() else "empty"
        raise ValueError(f"data: {path} is {what}; expected text")
    return Rows(texts, [None] * len(texts))


def cut(rows: Rows, validation: float, test: float, seed: int = 0) -> tuple[Rows, Rows, Rows]:
    """Cuts every text into train, validation and test parts, which keep their order, by shares of its characters.

    A cut moves on to the next blank line, or line, or space, unless that takes more than the share of a part; then it
    moves back to the beginning of its word. Where there are three short texts or more, these are drawn by ``seed``.
    """
    share = min(share for share in (validation, test, 1.0) if share)
    short = [i for i, (text,) in enumerate(rows.texts) if len(text) * share < _PART]
    held_out: dict[int, int] = {}
    if len(short) > 2:
        drawn = stratified_split([""] * len(short), validation, test, seed)
        held_out = {short[i]: part for part, chosen in enumerate(drawn) for i in chosen}
    parts: tuple[Rows, Rows, Rows] = (Rows(), Rows(), Rows())
    for i, (text,) in enumerate(rows.texts):
        if i in held_out:
            pieces = [text if part == held_out[i] else "" for part in range(3)]
        else:
            step, length = max(1, int(len(text) * share)), len(text.rstrip())
            first = _boundary(text, 0, round(length * (1 - validation - test)), step)
            second = _boundary(text, first, max(first, round(length * (1 - test))), step)
            pieces = [text[:first], text[first:second], text[second:]]
        for part, piece in zip(parts, pieces, strict=True):
            if piece.strip():
                part.texts.append((piece,))
                part.labels.append(None)
    return parts


def _boundary(text: str, low: int, position: int, step: int) -> int:
    length = len(text.rstrip())
    if position >= length:
        return len(text)
    end = min(position + step, length)  # a mark at the very end would leave nothing behind it
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, position, end)
        if found >= 0:
            return found + len(mark)
    start = max(text.rfind(mark, 0, position) for mark in "\n ") + 1
    stop = min([length, *(found for mark in "\n " if (found := text.find(mark, position)) >= 0)])
    return max(low, start) if stop - start <= _WORD else position


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
