"""Each case in a process of its own, so that no case profits from the memory that another one freed."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from . import Case, Ceilings, Row, Settings, all_cases, measure


def measure_alone(case: Case, device: torch.device, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Measure in a process of its own: what earlier cases freed must not serve this one's large buffers.

    Eager cross-entropy over 1024 x 30522 takes 57 ms in a heap that another case has grown and 150 ms in
    memory fresh from the system, as a training step sees it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_by_key, case.op, case.key, device, settings, ceilings).result()


def _measure_by_key(
    op: str, key: str, device: torch.device, settings: Settings, ceilings: Ceilings
) -> list[Row]:
    case = next(case for case in all_cases(op) if case.key == key)
    return measure(case, device, settings, ceilings)
