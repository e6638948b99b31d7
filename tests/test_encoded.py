"""Padding and the order of samples."""

from __future__ import annotations

import pytest
import torch
from superfine.encoded import epoch_order, padded


@pytest.mark.parametrize(
    ("side", "expected"),
    [("right", [[1, 2, 3], [4, 9, 9], [9, 9, 9]]), ("left", [[1, 2, 3], [9, 9, 4], [9, 9, 9]])],
)
def test_rows_are_filled_up_to_the_longest(side, expected):
    found = padded([[1, 2, 3], [4], []], 9, side)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_an_epochs_order_follows_from_seed_and_epoch_alone():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert epoch_order(50, 0, 0) == epoch_order(50, 0, 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
