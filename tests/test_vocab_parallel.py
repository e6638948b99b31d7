"""Losses over a vocabulary that lies on several processes, on the CPU with gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_a_vocabulary_give_the_loss_and_gradients_of_the_whole(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER)],
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
    for rank, (process, (output, errors)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, errors
        assert output == f"rank {rank}: 48 cases\n"
