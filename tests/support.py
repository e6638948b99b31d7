"""Small helpers that several test files share."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _cpu

ISAS = _cpu.isas()


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A few of all combinations, in which every two values of different factors meet: for the parameters of a test.

    Almost every error depends on one or two of them, and the full product takes several times as long.
    """
    positions = range(len(factors))

    def pairs(chosen: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, chosen[i], j, chosen[j]) for i, j in itertools.combinations(positions, 2)}

    rest = list(itertools.product(*(range(len(values)) for values in factors)))
    missing = set().union(*map(pairs, rest))
    found = []
    while missing:
        best = max(
            rest, key=lambda chosen: len(pairs(chosen) & missing)
        )  # the first of equals: deterministic
        missing -= pairs(best)
        found.append(tuple(values[i] for values, i in zip(factors, best, strict=True)))
    return found


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; any NaN equals any other."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    nan = actual.isnan()
    integers = _INTEGERS[actual.element_size()]
    bits = [t.detach().contiguous().view(integers).masked_fill(nan, 0) for t in (actual, expected)]
    return torch.equal(nan, expected.isnan()) and torch.equal(*bits)


def assert_same_bits_in_lists(
    actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> None:
    for k, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert same_bits(a, b), f"list {k}, tensor {i} of shape {tuple(a.shape)} differs"


@contextlib.contextmanager
def one_warning(text: str) -> Iterator[None]:
    """The block gives exactly one warning, and it contains `text`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1, messages
    assert text in messages[0]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with torch at `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contents(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


def saved_and_loaded(state_dict: dict) -> dict:
    """As a checkpoint that is no pickle gives it back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gradient_of(loss: Tensor, leaf: Tensor, **options: Any) -> Tensor:
    """Of one leaf."""
    return torch.autograd.grad(loss, leaf, **options)[0]


def random_like(tensors, seed=1):
    """Tensors of these shapes and types, the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]


def run_python(code: str, *options: str) -> str:
    """What `code` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_processes(world: int, script: Path, *arguments: str) -> list[str]:
    """What `world` processes print that run `script` as one process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]
