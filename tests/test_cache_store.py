"""Where hidden states are kept: bounds, killed and concurrent writers, full and read-only disks, foreign and damaged
directories."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from superfine._cache_store import DiskStore, MemoryStore, Record, record_bytes

WIDTH = 4
HEADER = {"model": "BertModel", "blocks": "2 of 4", "width": WIDTH, "dtype": "fp32", "prefix": "ab" * 16}


def key(number):
    return number.to_bytes(16, "little")


def record(number, tokens=3, stored=0):
    size = record_bytes(tokens, WIDTH, stored)
    return Record(tokens, stored, 0, np.random.default_rng(number).integers(0, 255, size, dtype=np.uint8))


def assert_same(actual, expected):
    assert actual is not None
    assert actual[:3] == expected[:3]
    np.testing.assert_array_equal(actual.payload, expected.payload)


def filled(directory, count, max_bytes=None):
    store = DiskStore(directory, HEADER, max_bytes)
    store.put([(key(n), record(n)) for n in range(count)])
    return store


def test_memory_drops_what_was_used_the_longest_ago():
    size = record(0).payload.nbytes
    store = MemoryStore(max_bytes=3 * size)
    store.put([(key(n), record(n)) for n in range(3)])
    assert_same(store.get([key(0)])[0], record(0))  # now 1 is the oldest
    store.put([(key(3), record(3))])
    assert [found is None for found in store.get([key(n) for n in range(4)])] == [False, True, False, False]
    assert (len(store), store.nbytes) == (3, 3 * size)
    store.put([(key(9), record(9, tokens=100))])  # larger than all of it
    assert (len(store), store.nbytes) == (0, 0)


@pytest.mark.parametrize(("tokens", "stored"), [(1, 0), (17, 1), (5, 2), (2, 3), (7, 4), (0, 0)])
def test_disk_returns_what_was_stored_to_another_process(tmp_path, tokens, stored):
    kept = record(1, tokens, stored)
    DiskStore(tmp_path / "new" / "cache", HEADER, None).put([(key(1), kept), (key(2), record(2))])
    again = DiskStore(tmp_path / "new" / "cache", HEADER, None)
    first, second, third = again.get([key(1), key(2), key(3)])
    assert_same(first, kept)
    assert_same(second, record(2))
    assert third is None
    assert len(again) == 2


def test_a_record_half_written_is_ignored_and_overwritten(tmp_path):
    """Whatever of the last record's data and entry a killed process had written, in that order, the rest is whole."""
    filled(tmp_path / "two", 2)
    data_before, index_before = (
        (tmp_path / "two" / name).stat().st_size for name in ("data.bin", "index.bin")
    )
    filled(tmp_path / "two", 3)
    data = (tmp_path / "two" / "data.bin").read_bytes()
    index = (tmp_path / "two" / "index.bin").read_bytes()
    states = [(length, index_before) for length in range(data_before, len(data) + 1)]
    states += [(len(data), length) for length in range(index_before, len(index))]
    # Not what a kill leaves, but a file system may after a power cut: the entry is there, its data are not.
    states += [(data_before + 5, len(index))]
    for data_length, index_length in states:
        (tmp_path / "two" / "data.bin").write_bytes(data[:data_length])
        (tmp_path / "two" / "index.bin").write_bytes(index[:index_length])
        store = DiskStore(tmp_path / "two", HEADER, None)
        assert len(store) == 2
        assert store.get([key(2)]) == [None]
        store.put([(key(7), record(7, tokens=2))])
        for reader in (store, DiskStore(tmp_path / "two", HEADER, None)):
            for n, expected in ((0, record(0)), (1, record(1)), (7, record(7, tokens=2))):
                assert_same(reader.get([key(n)])[0], expected)


def test_a_killed_writer_leaves_a_valid_cache(tmp_path):
    """kill -9 in the middle of writing, as often as it takes to hit it."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import test_cache_store as t
        store = t.DiskStore(sys.argv[1], t.HEADER, None)
        print("ready", flush=True)
        n = len(store)
        while True:
            store.put([(t.key(n), t.record(n, tokens=50))])
            n += 1
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c"), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        reader = DiskStore(tmp_path / "c", HEADER, None)
        while len(reader) < 50:
            reader.get([key(10**6)])  # reads what the other adds meanwhile
        writer.kill()
    store = DiskStore(tmp_path / "c", HEADER, None)
    count = len(store)
    assert count >= 50
    for n in range(count):
        assert_same(store.get([key(n)])[0], record(n, tokens=50))
    store.put([(key(count), record(count))])
    assert_same(DiskStore(tmp_path / "c", HEADER, None).get([key(count)])[0], record(count))


def _fill(directory, first):
    store = DiskStore(directory, HEADER, None)
    for n in range(first, first + 60, 3):  # both write some of the same
        store.put([(key(k), record(k)) for k in range(n, n + 3)])


def test_two_processes_fill_one_directory(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path / "c", first)) for first in (0, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = DiskStore(tmp_path / "c", HEADER, None)
    assert len(store) == 90
    for n in range(90):
        assert_same(store.get([key(n)])[0], record(n))


def test_a_forked_process_and_its_parent_share_a_store(tmp_path):
    store = filled(tmp_path / "c", 1)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: store.put([(key(n), record(n)) for n in range(1, 5)])
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert_same(store.get([key(4)])[0], record(4))
    store.put([(key(5), record(5))])
    assert len(DiskStore(tmp_path / "c", HEADER, None)) == 6


@pytest.mark.parametrize("full", ["data", "index"])
def test_a_full_disk_is_an_error_and_leaves_the_cache_valid(tmp_path, monkeypatch, full):
    store = filled(tmp_path / "c", 2)
    write = os.pwrite

    def pwrite(descriptor, view, offset):
        if (descriptor == store._data) == (full == "data"):
            if len(view) > 20:
                return write(descriptor, view[:20], offset)  # some of it fits
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"no space is left in .*; expected some: free space") as error:
        store.put([(key(2), record(2))])
    assert error.value.errno == errno.ENOSPC
    assert_same(store.get([key(1)])[0], record(1))
    monkeypatch.undo()
    store.put([(key(2), record(2))])
    assert_same(DiskStore(tmp_path / "c", HEADER, None).get([key(2)])[0], record(2))


def test_a_directory_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    filled(tmp_path / "c", 2)
    opened = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)  # permissions do not hold root back
    store = DiskStore(tmp_path / "c", HEADER, None)
    assert_same(store.get([key(1)])[0], record(1))
    with pytest.warns(
        UserWarning, match="cannot be written to: what is missing there is computed and not stored"
    ):
        store.put([(key(2), record(2))])
    store.put([(key(3), record(3))])  # warned once
    assert store.get([key(2), key(3)]) == [None, None]
    with pytest.raises(OSError, match="Read-only"):
        DiskStore(tmp_path / "new", HEADER, None)


def test_max_bytes_ends_the_growth_of_a_directory(tmp_path):
    store = DiskStore(tmp_path / "c", HEADER, max_bytes=130)
    with pytest.warns(UserWarning, match="holds max_bytes = 130 bytes"):
        store.put([(key(n), record(n)) for n in range(4)])
    assert len(store) == 2
    assert store.nbytes <= 130


@pytest.mark.parametrize(("name", "value"), [("prefix", "cd" * 16), ("blocks", "3 of 4"), ("dtype", "int8")])
def test_another_model_is_refused(tmp_path, name, value):
    filled(tmp_path / "c", 1)
    with pytest.raises(
        ValueError, match=f"filled by another model or plan, with {name} .*; expected '{value}'"
    ):
        DiskStore(tmp_path / "c", HEADER | {name: value}, None)


def test_other_formats_and_folders_are_refused(tmp_path):
    filled(tmp_path / "c", 1)
    header = tmp_path / "c" / "header.json"
    stated = json.loads(header.read_text())
    header.write_text(json.dumps(stated | {"version": 2}))
    with pytest.raises(ValueError, match=r"of format 2; expected 1: pass another directory, or delete"):
        DiskStore(tmp_path / "c", HEADER, None)
    for content in ("{", "[]", "{}"):
        header.write_text(content)
        with pytest.raises(ValueError, match=r"damaged: header.json cannot be read .* delete the directory"):
            DiskStore(tmp_path / "c", HEADER, None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"which holds 'cat.jpg' and no cache; expected a new or an empty folder"
    ):
        DiskStore(tmp_path / "photos", HEADER, None)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(ValueError, match="a file; expected a folder"):
        DiskStore(header, HEADER, None)


def test_damage_is_an_error_that_says_what_to_do(tmp_path):
    filled(tmp_path / "whole", 3)

    def damaged(name, position):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "c")
        content = bytearray((tmp_path / "c" / name).read_bytes())
        content[position] ^= 1
        (tmp_path / "c" / name).write_bytes(content)

    for position in range(80):  # any bit of an entry that others follow
        damaged("index.bin", position)
        with pytest.raises(
            ValueError, match=r"damaged: entry . of index.bin is bad; .* delete the directory"
        ):
            DiskStore(tmp_path / "c", HEADER, None)
    damaged("data.bin", 70)
    store = DiskStore(tmp_path / "c", HEADER, None)
    assert_same(store.get([key(0)])[0], record(0))
    with pytest.raises(
        ValueError, match=r"damaged: the record at byte 64 .* checksum; .* delete the directory"
    ):
        store.get([key(1)])
