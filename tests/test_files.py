"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
from superfine._files import atomic_folder, atomic_write
from support import contents


def test_new_file_appears_with_the_same_suffix_and_nothing_else_stays(tmp_path):
    with atomic_write(tmp_path / "curves.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"whole")
        assert contents(tmp_path) == [temporary.name]
    assert contents(tmp_path) == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"whole"


def write(path, text="half", error=None):
    with atomic_write(path) as temporary:
        if text is not None:
            temporary.write_text(text)
        if error is not None:
            raise error


def fill(path, error=None):
    with atomic_folder(path) as temporary:
        (temporary / "a.txt").write_text("a")
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_keeps_the_previous_file_and_leaves_no_temporary(tmp_path, error):
    path = tmp_path / "state.bin"
    path.write_bytes(b"previous")
    with pytest.raises(type(error)):
        write(path, error=error)
    assert contents(tmp_path) == ["state.bin"]
    assert path.read_bytes() == b"previous"


def test_failing_fsync_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "state.bin"
    path.write_bytes(b"previous")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert contents(tmp_path) == ["state.bin"]
    assert path.read_bytes() == b"previous"


def test_permissions_follow_the_umask_and_then_the_previous_file(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("1")
    (tmp_path / "plain.txt").write_text("1")
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    path.chmod(0o640)
    with atomic_write(path) as temporary:
        temporary.write_text("2")
    assert path.stat().st_mode & 0o777 == 0o640


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "file.txt")
    with atomic_write(link) as temporary:
        temporary.write_text("through")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file.txt").read_text() == "through"


def test_bad_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write(tmp_path / "missing" / "a.txt")
    with pytest.raises(IsADirectoryError, match="a folder"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing was written"):
        write(tmp_path / "a.txt", text=None)
    assert contents(tmp_path) == []


def test_kill_in_the_middle_leaves_the_previous_file(tmp_path):
    path = tmp_path / "state.bin"
    path.write_bytes(b"previous")
    script = (
        "import sys, time\n"
        "from superfine._files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"previous"


def test_folder_appears_whole_and_replaces_an_empty_one(tmp_path):
    out = tmp_path / "parent" / "model"
    with atomic_folder(out) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("a")
        assert not out.exists()
    assert (out / "inner" / "a.txt").read_text() == "a"
    assert contents(out.parent) == ["model"]

    empty = tmp_path / "empty"
    empty.mkdir()
    with atomic_folder(empty) as temporary:
        (temporary / "b.txt").write_text("b")
    assert contents(empty) == ["b.txt"]


def test_folder_failure_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "model", OSError(errno.ENOSPC, "No space left on device"))
    assert contents(tmp_path) == []


@pytest.mark.parametrize("taken", ["model", "file"])
def test_folder_refuses_to_overwrite(tmp_path, taken):
    fill(tmp_path / "model")
    (tmp_path / "file").write_text("a")
    with pytest.raises(FileExistsError, match="new or an empty folder"):
        fill(tmp_path / taken)
    assert contents(tmp_path / "model") == ["a.txt"]
    assert (tmp_path / "file").read_text() == "a"
