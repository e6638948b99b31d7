"""Files and folders that appear whole or not at all.

Everything Superfine writes goes through here: first to a temporary name in the same folder (a rename is
atomic only within one file system), then to disk, then onto its final name. A full disk, an exception or a
kill at any moment leaves the previous file as it was. A kill can leave the temporary behind: a hidden name
that contains ``.tmp-``, safe to delete.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_folder", "atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on normal exit it becomes ``path``, on an exception nothing
    changes.

    The temporary lies in the same folder and has the same suffix, for writers that choose a format by it.
    A symbolic link is followed: its target is replaced and the link stays. An existing file's permissions are
    kept.

    Raises ``FileNotFoundError`` when the folder is missing or the block wrote nothing, and
    ``IsADirectoryError`` when ``path`` is a folder.
    """
    final = Path(os.path.realpath(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(f"atomic_write: path is {path}; expected a file in an existing folder")
    if final.is_dir():
        raise IsADirectoryError(f"atomic_write: path is {path}, a folder; expected a file name")
    temporary = _temporary_beside(final)
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(
                f"atomic_write: nothing was written for {path}; expected a file at {temporary}"
            )
        # Some writers make private files; what people share should have the usual permissions.
        os.chmod(temporary, stat.S_IMODE(final.stat().st_mode) if final.exists() else 0o666 & ~_umask())
        _fsync(temporary)
        os.replace(temporary, final)
    except BaseException:  # Ctrl-C too: no half-written file stays behind
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(final.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on normal exit it becomes ``path``, on an exception it is removed.

    ``path`` must be missing or an empty folder, because a folder cannot be replaced atomically:
    ``FileExistsError`` otherwise. Missing parents are created.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(
            f"atomic_folder: path is {path}, which exists; expected a new or an empty folder"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(final)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                os.chmod(Path(folder, name), 0o666 & ~_umask())
                _fsync(Path(folder, name))
            _fsync_folder(Path(folder))
        os.replace(temporary, final)  # POSIX lets a folder replace an empty one, and nothing else
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_folder(final.parent)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def _temporary_beside(final: Path) -> Path:
    return final.with_name(f".{final.stem}.tmp-{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself durable. Some network file systems refuse this; the data is safe there too."""
    with suppress(OSError):
        _fsync(folder)
