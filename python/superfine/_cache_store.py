"""Where :class:`superfine.PrefixCache` keeps hidden states: in memory, or in a directory that outlives the process.

A directory holds ``header.json`` (what the states were computed with), ``data.bin`` (records, each at a multiple of
64 bytes), ``index.bin`` (one entry of 40 bytes a record, in the order of writing) and ``lock``. Writers hold the lock
alone: they write a record, then its entry. So what a killed process leaves is a record without an entry, or half an
entry at the end; neither counts, and the next writer overwrites it. Nothing that has an entry is ever changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import warnings
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from superfine._files import atomic_write

__all__ = ["CODES", "DiskStore", "MemoryStore", "Record", "record_bytes"]

FORMAT = "superfine prefix cache"
VERSION = 1

#: How elements are stored, by the number that files hold: name and bytes an element; int8 also a float32 a token.
CODES = {0: ("float32", 4), 1: ("bfloat16", 2), 2: ("float16", 2), 3: ("float64", 8), 4: ("int8", 1)}
INT8 = 4

_ENTRY = struct.Struct("<16sQIIBBHI")  # key, offset, tokens, checksum, stored, dtype, 0, checksum of these
_ALIGN = 64
_FILES = ("header.json", "data.bin", "index.bin", "lock")


class Record(NamedTuple):
    """The states of one sample: ``payload`` (bytes as a uint8 array) holds ``tokens`` rows in the form ``stored``,
    which become ``dtype`` when they are used; both are keys of ``CODES``."""

    tokens: int
    stored: int
    dtype: int
    payload: np.ndarray


def record_bytes(tokens: int, width: int, stored: int) -> int:
    """Bytes of the payload of a sample."""
    return tokens * (width * CODES[stored][1] + (4 if stored == INT8 else 0))


class MemoryStore:
    """Records by key; beyond ``max_bytes`` those go whose last use is the longest ago."""

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._records: OrderedDict[bytes, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The record of each key, None where there is none."""
        records = self._records
        found = []
        for key in keys:
            record = records.get(key)
            if record is not None and self.max_bytes is not None:
                records.move_to_end(key)
            found.append(record)
        return found

    def put(self, items: Sequence[tuple[bytes, Record]]) -> None:
        """Keep records; of a key that is known the first."""
        for key, record in items:
            if key not in self._records:
                self._records[key] = record
                self.nbytes += record.payload.nbytes
        while self.max_bytes is not None and self.nbytes > self.max_bytes:
            _, record = self._records.popitem(last=False)
            self.nbytes -= record.payload.nbytes


class DiskStore:
    """Records in ``directory``, shared with every process that has it open; ``max_bytes`` bounds its data.

    ``header`` says what the states were computed with. Raises ``ValueError`` where the directory holds another
    model's, is damaged, or is no cache.
    """

    def __init__(
        self, directory: str | os.PathLike[str], header: dict[str, Any], max_bytes: int | None
    ) -> None:
        self.directory = Path(directory)
        self.width: int = header["width"]
        self.max_bytes = max_bytes
        self._entries: dict[bytes, tuple[int, int, int, int, int]] = {}
        self._checked: set[bytes] = set()
        self._index_end = self._data_end = 0
        self._map: mmap.mmap | None = None
        self._warned = False
        self.read_only = not self._create(header)
        self._check_header(header)
        self._data, self._index = (self._open(name) for name in ("data.bin", "index.bin"))
        weakref.finalize(self, _close, (self._data, self._index))
        with self._lock(fcntl.LOCK_SH):
            self._refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of data in use."""
        return self._data_end

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The records, None where there is none; what other processes have added counts."""
        if any(key not in self._entries for key in keys) and _size(self._index) != self._index_end:
            with self._lock(fcntl.LOCK_SH):
                self._refresh()
        return [self._read(key) for key in keys]

    def put(self, items: Sequence[tuple[bytes, Record]]) -> None:
        """Append records whose key is new. A read-only or full cache warns once and stores nothing.

        Raises ``OSError`` where the disk is full; what is stored stays valid.
        """
        if self.read_only:
            self._warn("cannot be written to")
            return
        with self._lock(fcntl.LOCK_EX):
            self._refresh()  # and from here on no other process adds anything
            data, index = bytearray(), bytearray()
            start = self._data_end
            for key, record in items:
                if key in self._entries:
                    continue
                if self.max_bytes is not None and start + len(data) + record.payload.nbytes > self.max_bytes:
                    self._warn(f"holds max_bytes = {self.max_bytes:,} bytes")
                    break
                payload = record.payload.tobytes()
                head = _ENTRY.pack(
                    key,
                    start + len(data),
                    record.tokens,
                    zlib.crc32(payload),
                    record.stored,
                    record.dtype,
                    0,
                    0,
                )[:-4]
                index += head + struct.pack("<I", zlib.crc32(head))
                data += payload + bytes(-len(payload) % _ALIGN)
            try:
                _write(self._data, data, start)
                _write(self._index, index, self._index_end)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OSError(
                    error.errno,
                    f"PrefixCache: no space is left in {self.directory} for {len(data):,} bytes; expected some: free"
                    " space and go on (what is stored stays valid), or pass max_bytes, dtype='int8' or another"
                    " directory",
                ) from error
            self._refresh()

    def _create(self, header: dict[str, Any]) -> bool:
        """Make what is missing of the directory; whether it can be written to."""
        if self.directory.exists() and not (self.directory / "header.json").exists():
            if not self.directory.is_dir():
                raise ValueError(f"PrefixCache: directory is {self.directory}, a file; expected a folder")
            foreign = [path.name for path in self.directory.iterdir() if not _ours(path.name)]
            if foreign:
                raise ValueError(
                    f"PrefixCache: directory is {self.directory}, which holds {min(foreign)!r} and no cache;"
                    " expected a new or an empty folder, or a cache"
                )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            with self._lock(fcntl.LOCK_EX):
                if not (self.directory / "header.json").exists():
                    with atomic_write(self.directory / "header.json") as temporary:
                        stated = {"format": FORMAT, "version": VERSION, **header}
                        temporary.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
                for name in ("data.bin", "index.bin"):
                    os.close(os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
            if denied and all((self.directory / name).exists() for name in _FILES[:3]):
                return False
            raise
        return True

    def _check_header(self, header: dict[str, Any]) -> None:
        path = self.directory / "header.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError("it is no header of a cache")
        except ValueError as error:
            raise self._damaged(f"header.json cannot be read ({error})") from error
        if found.get("version") != VERSION:
            raise ValueError(
                f"PrefixCache: {self.directory} is of format {found.get('version')}; expected {VERSION}: pass another"
                " directory, or delete this one"
            )
        for key, expected in header.items():
            if found.get(key) != expected:
                raise ValueError(
                    f"PrefixCache: {self.directory} was filled by another model or plan, with {key}"
                    f" {found.get(key)!r}; expected {expected!r}: pass another directory, or delete this one"
                )

    def _open(self, name: str) -> int:
        return os.open(self.directory / name, (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC)

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        # Opened anew each time: forked processes share what was open, and with it the lock.
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self.read_only:
                raise self._damaged("its file 'lock' is missing") from None
            yield  # copied without it, and nobody can write here
            return
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _refresh(self) -> None:
        """Read the entries that were added since. A bad one at the end is what a killed process left."""
        known = self._index_end
        if _size(self._index) < known:
            raise self._damaged("index.bin has become shorter")
        raw = os.pread(self._index, _size(self._index) - known, known)
        available, bad = _size(self._data), False
        for position in range(0, len(raw) - _ENTRY.size + 1, _ENTRY.size):
            entry = raw[position : position + _ENTRY.size]
            key, offset, tokens, checksum, stored, dtype, _, own = _ENTRY.unpack(entry)
            good = zlib.crc32(entry[:-4]) == own and stored in CODES and dtype in CODES
            end = offset + record_bytes(tokens, self.width, stored) if good else 0
            if not good or end > available:
                bad = True
                continue
            if bad:
                raise self._damaged(f"entry {(known + position) // _ENTRY.size - 1} of index.bin is bad")
            self._entries[key] = (offset, tokens, checksum, stored, dtype)
            self._index_end = known + position + _ENTRY.size
            self._data_end = max(self._data_end, end + -end % _ALIGN)

    def _read(self, key: bytes) -> Record | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        offset, tokens, checksum, stored, dtype = entry
        size = record_bytes(tokens, self.width, stored)
        if self._map is None or offset + size > len(self._map):
            if offset + size > _size(self._data):
                raise self._damaged("data.bin has become shorter")
            self._map = mmap.mmap(
                self._data, 0, access=mmap.ACCESS_READ
            )  # the earlier one lives in its arrays
        payload = np.frombuffer(self._map, np.uint8, size, offset)
        if key not in self._checked:
            if zlib.crc32(payload.data) != checksum:
                raise self._damaged(f"the record at byte {offset} of data.bin does not match its checksum")
            self._checked.add(key)
        return Record(tokens, stored, dtype, payload)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"PrefixCache: {self.directory} is damaged: {what}; expected a whole cache: delete the directory, and it"
            " is filled anew"
        )

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"PrefixCache: {self.directory} {why}: what is missing there is computed and not stored",
                stacklevel=2,
            )


def _ours(name: str) -> bool:
    return name in _FILES or name.startswith(".header.tmp-")  # of a process killed while it made the header


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _write(descriptor: int, content: bytearray, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
