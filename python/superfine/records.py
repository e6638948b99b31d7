"""Records of ``.csv``, ``.tsv`` and ``.jsonl`` files: what a line holds, or what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Records", "csv_records", "decode", "jsonl_records"]

# What a source yields: line number (from 1), the record or None, and what is wrong with it.
Records = Iterator[tuple[int, "dict[str, Any] | None", str]]


def decode(path: Path, encoding: str) -> str:
    """The text of a file; ``ValueError`` naming the line and byte where it is not in ``encoding``."""
    raw = path.read_bytes()
    # Spreadsheets put a byte-order mark before UTF-8; it would become part of the first column's name.
    codec = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8", "utf_8") else encoding
    try:
        return raw.decode(codec)
    except LookupError:
        raise ValueError(f"data: encoding is {encoding!r}; expected a codec such as utf-8") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise ValueError(
            f"data: {path} is not {encoding}: line {line} has the byte 0x{raw[error.start]:02x};"
            f' expected data.encoding = "{guess}", or what else the file was saved in'
        ) from None


def csv_records(content: str, delimiter: str) -> tuple[list[str], Records]:
    lines = list(io.StringIO(content, newline=""))  # csv wants line ends untouched: quoted fields hold them

    def parsed() -> Iterator[tuple[int, list[str] | None, str]]:
        # A stray quote swallows lines until some later quote, so after an error reading goes on at the line
        # after the one where the broken record began.
        start = 0
        while start < len(lines):
            reader = csv.reader(lines[start:], strict=True, delimiter=delimiter)
            first = start
            try:
                for fields in reader:
                    yield first + 1, fields, ""
                    first = start + reader.line_num
                return
            except csv.Error as error:
                yield first + 1, None, str(error)
                start = first + 1

    records = parsed()
    _, header, problem = next(records)
    if header is None:
        raise ValueError(f"data: the header cannot be read: {problem}")

    def rows() -> Records:
        for line, fields, problem in records:
            if fields is None:
                yield line, None, problem
            elif len(fields) != len(header):
                if fields:  # an empty line is no row
                    yield line, None, f"{len(fields)} fields; expected {len(header)}"
            else:
                yield line, dict(zip(header, fields, strict=True)), ""

    return header, rows()


def jsonl_records(content: str) -> tuple[list[str], Records]:
    records: list[tuple[int, dict[str, Any] | None, str]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # JSONDecodeError, and integers of absurd length
            records.append((number, None, f"not JSON: {error}"))
            continue
        if isinstance(value, dict):
            records.append((number, value, ""))
            columns.update(dict.fromkeys(value))
        else:
            records.append((number, None, f"a JSON {type(value).__name__}; expected an object"))
    if not columns:
        number, _, problem = records[0]
        raise ValueError(f"data: no line holds a JSON object; line {number}: {problem}")
    return list(columns), iter(records)
