"""Losses over a vocabulary that lies on several processes, on the CPU with gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_processes

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_a_vocabulary_give_the_loss_and_gradients_of_the_whole(world):
    outputs = run_processes(world, WORKER)
    assert outputs == [f"rank {rank}: 48 cases\n" for rank in range(world)]
