"""Prepared models and the optimizers on two processes, on the CPU with gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_processes

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    outputs = run_processes(2, WORKER, str(tmp_path))
    assert outputs == [f"rank {rank}: 8 cases\n" for rank in range(2)]
