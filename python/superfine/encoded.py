"""A split as token ids: samples of any length, padded batch by batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

__all__ = ["Encoded", "epoch_order", "padded"]


@dataclass
class Encoded:
    """Samples as token ids, not yet padded, and their targets: a tensor with a row for each, or a list."""

    features: dict[str, list[list[int]]]
    targets: Any
    padding: dict[str, int]
    padding_side: str
    truncated: int  # samples cut at max_length

    def __len__(self) -> int:
        return len(self.features["input_ids"])

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.features["input_ids"]]

    def vocabulary(self) -> set[int]:
        """The tokens that occur."""
        return set().union(*self.features["input_ids"])

    def tokens(self) -> int | None:
        """How many tokens the loss is of, where it is one of tokens."""
        return None

    def terms(self, indices: Sequence[int]) -> int:
        """How many terms the mean loss of these samples has."""
        return len(indices)

    def batch(self, indices: Sequence[int], device: torch.device | str) -> tuple[dict[str, Tensor], Tensor]:
        """Samples ``indices`` padded to the longest of them: int64 (n, longest), and their targets."""
        inputs = self.inputs(indices, device)
        return inputs, self.targets_of(indices, inputs).to(device, non_blocking=True)

    def inputs(self, indices: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        """What the model takes: int64 (n, longest)."""
        return {
            key: padded([values[i] for i in indices], self.padding[key], self.padding_side).to(
                device, non_blocking=True
            )
            for key, values in self.features.items()
        }

    def targets_of(self, indices: Sequence[int], inputs: dict[str, Tensor]) -> Tensor:
        """What the loss compares with: of most tasks one entry for each sample."""
        return self.targets[torch.tensor(indices)]

    def followed_by(self, other: Self) -> Self:
        """The samples of both, to train on."""
        joined = {key: values + other.features[key] for key, values in self.features.items()}
        tensors = isinstance(self.targets, Tensor)
        targets = torch.cat([self.targets, other.targets]) if tensors else [*self.targets, *other.targets]
        return replace(self, features=joined, targets=targets, truncated=self.truncated + other.truncated)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` samples in an epoch, from (seed, epoch) alone: a resumed run finds its place."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)  # a string seeds the same on every machine and version
    return order


def padded(rows: Sequence[list[int]], fill: int, side: str = "right") -> Tensor:
    """Rows filled up to the longest of them: int64 (n, longest)."""
    longest = max(map(len, rows))
    whole = np.full(
        (len(rows), longest), fill, dtype=np.int64
    )  # torch.tensor of lists takes ten times as long
    for line, row in zip(whole, rows, strict=True):
        begin = longest - len(row) if side == "left" else 0
        line[begin : begin + len(row)] = row
    return torch.from_numpy(whole)
