"""Clocks and statistics of the harness: device and wall time, cold caches, peak memory, intervals."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def select(device: torch.device) -> None:
    """Make a GPU the current one: events, ``synchronize`` and kernels go to that, whatever their tensors say."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Clock:
    """Times single calls on one device, with caches cold or as the last call left them."""

    def __init__(self, device: torch.device, evict_bytes: int = 0) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        self._filler = torch.ones(evict_bytes // 4, device=device) if evict_bytes else None

    def evict(self) -> None:
        """Drive everything else out of the caches, by reading: what is written would have to be written back."""
        if self._filler is not None:
            self._filler.sum()

    def device_seconds(self, call: Call) -> tuple[float, Any]:
        """Seconds that the device takes for a call, and what the call returned; on a CPU the wall's."""
        if not self.on_cuda:
            return self.wall_seconds(call)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # Keeps the GPU busy for about half a millisecond while the host queues the call: without it the time
        # between the events of a short call is the host's.
        torch.cuda._sleep(1_000_000)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, result

    def wall_seconds(self, call: Call) -> tuple[float, Any]:
        """Seconds from the call to the end of its work, as the host sees it."""
        if self.on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


class PeakMemory:
    """Bytes that the block needs at its peak, beyond what was there: ``with PeakMemory(device) as peak: ...``.

    On CUDA what torch allocates; on Linux the resident set, whose high-water mark the kernel keeps and resets on
    request. None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _resident("VmRSS") if _reset_high_water() else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            after: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            after = _resident("VmHWM")
        if self._before is not None and after is not None:
            self.bytes = max(0, after - self._before)


def _reset_high_water() -> bool:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)  # what was freed earlier must not serve unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found.group(1)) * 1024


def eviction(last_level_cache: int | None) -> int:
    """How many bytes to stream through so that nothing of a case lies in a cache, however large the case is.

    Twice the cache, as caches do not replace the oldest line first; 256 MiB where its size is unknown. No more than
    512 MiB: a virtual machine may report the whole host's cache.
    """
    return 2**28 if last_level_cache is None else min(2**29, 2 * last_level_cache)


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile, linear between the two nearest values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the median of what `values` are drawn from, by order statistics: no distribution is assumed.

    The k-th smallest and k-th largest of n values enclose the median unless fewer than k fall on one side of
    it: probability 1 - 2 * P(Binomial(n, 1/2) < k). The largest k that keeps the confidence is taken.
    """
    ordered = sorted(values)
    n = len(ordered)
    k, outside = 0, 0.0
    while k < (n - 1) // 2:
        outside += math.comb(n, k) / 2**n
        if 1 - 2 * outside < confidence:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def quantile_interval(
    turns: Sequence[Sequence[float]], q: float, confidence: float = 0.95, samples: int = 400
) -> tuple[float, float]:
    """Bounds of the `q`-quantile of single calls: bootstrap over whole turns, as calls of one turn are alike."""
    draw = random.Random(0)  # the same bounds for the same times
    found = sorted(
        quantile([call for turn in draw.choices(turns, k=len(turns)) for call in turn], q)
        for _ in range(samples)
    )
    tail = int(samples * (1 - confidence) / 2)
    return found[tail], found[-1 - tail]


def summarise(turns: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """The fields of a row that follow from seconds of single calls, grouped by turn; in ms."""
    calls = [1000 * seconds for turn in turns for seconds in turn]
    low, high = median_interval([1000 * statistics.median(turn) for turn in turns])
    median = statistics.median(calls)
    p20_low, p20_high = quantile_interval([[1000 * seconds for seconds in turn] for turn in turns], 0.2)
    return {
        "calls": len(calls),
        "turns": len(turns),
        "median_ms": median,
        "p20_ms": quantile(calls, 0.2),
        "p80_ms": quantile(calls, 0.8),
        "p20_low_ms": p20_low,
        "p20_high_ms": p20_high,
        "low_ms": min(low, median),
        "high_ms": max(high, median),
    }


def ratios(base: Sequence[Sequence[float]], turns: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times as long the baseline took, turn by turn."""
    paired = [statistics.median(b) / statistics.median(t) for b, t in zip(base, turns, strict=True)]
    low, high = median_interval(paired)
    return {"ratio": statistics.median(paired), "ratio_low": low, "ratio_high": high}
