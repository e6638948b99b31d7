"""The cache of the frozen prefix in ``superfine tune`` (``--cache DIR``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from superfine.cache import PrefixCache
from superfine.config import Config
from superfine.evaluate import autocast
from superfine.select import Plan

__all__ = ["FilledCache"]


class FilledCache:
    """A cache that holds every sample of ``splits`` before training begins; in a ``with`` block it is attached.

    Batches are those of the configuration's size, sorted by length, whatever the seed: so an interrupted run finds,
    or computes again, the same bits.
    """

    def __init__(
        self, directory: str, plan: Plan, config: Config, splits: Sequence[Any], listener: Any
    ) -> None:
        self.cache = PrefixCache(plan.model, plan, directory, config.train.cache_dtype, eval_prefix=True)
        self.listener = listener
        place = self.cache.place
        listener.note(
            f"frozen prefix: {len(place.blocks)} of {len(place.prefix.stack.blocks)} layers, without dropout, from"
            f" {directory} ({config.train.cache_dtype})"
        )
        if any(split.padding_side == "left" for split in splits):
            # Padding moves positions there, so that batches of other lengths have other states.
            listener.note(
                "frozen prefix: the tokenizer pads on the left: samples are found in batches of one length only"
            )
            return
        started = time.perf_counter()
        device = torch.device(config.train.device)
        with autocast(device, config.train.precision):
            computed = self.cache.fill(_Batches(splits, config.train.batch_size, device))
        listener.note(
            f"frozen prefix: {computed:,} samples computed in {time.perf_counter() - started:.1f} s,"
            f" {self.cache.nbytes / 1e6:,.1f} MB kept"
        )

    def __enter__(self) -> FilledCache:
        self.cache.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.cache.detach()

    def summary(self, seconds: float, epochs: float) -> dict[str, Any]:
        """What the summary of a run says, of this session and of validation too."""
        cache, per_epoch = self.cache, seconds / max(epochs, 1e-9)
        self.listener.note(
            f"frozen prefix: {cache.hits:,} of {cache.hits + cache.misses:,} samples found,"
            f" {per_epoch:.2f} s an epoch"
        )
        return {
            "seconds_per_epoch": round(per_epoch, 3),
            "cache_hits": cache.hits,
            "cache_misses": cache.misses,
            "cache_bytes": cache.nbytes,
        }


class _Batches:
    def __init__(self, splits: Sequence[Any], size: int, device: torch.device) -> None:
        self.splits, self.size, self.device = splits, size, device

    def __len__(self) -> int:
        return sum(-(-len(split) // self.size) for split in self.splits)

    def __iter__(self) -> Iterator[Any]:
        for split in self.splits:
            order = sorted(range(len(split)), key=split.lengths().__getitem__)
            for start in range(0, len(order), self.size):
                yield split.batch(order[start : start + self.size], self.device)
