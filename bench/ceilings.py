"""What a machine reaches at best: memory streams, matrix products, an empty call. Nothing comes from a table.

Every figure is the best of several implementations and of many repetitions, because kernels are judged by it: a
ceiling that noise or a slow implementation lowered would let them pass for faster than the machine.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from .records import Ceilings
from .timing import Call, Clock, select

TRAFFICS = ("copy", "read", "write", "4r3w")
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16", "float16")}
# Working sets: the smallest fits any L2, the largest is beyond every cache, twice over where that is larger.
SMALLEST_SET, LARGEST_SET = 2**20, 2**30
# Shares of the time. Repetitions end sooner after PATIENCE turns of each call that improve nothing by 0.5%.
STREAM_SHARE, GEMM_SHARE = 0.25, 0.12
PATIENCE, IMPROVEMENT = 8, 1.005
# A product that takes this long no longer shows the cost of the call nor the tail of the last wave of blocks.
SATURATED_SECONDS = {"cpu": 20e-3, "cuda": 2e-3}


@torch.no_grad()
def measure_ceilings(
    device: torch.device,
    seconds: float = 30.0,
    say: Callable[[str], None] | None = None,
    *,
    only: str | None = None,
) -> Ceilings:
    """Measure what ``device`` reaches; the repetitions take less than half of ``seconds``.

    Streams: ``copy`` (one read, one write), ``read``, ``write`` and ``4r3w`` (AdamW's four reads and three writes),
    over working sets from 1 MiB to beyond the last-level cache, as far as a quarter of the free memory allows.
    Matrix products: square and large; ``float32`` without TF32, ``bfloat16``, and on CUDA ``tf32`` and ``float16``.
    Call: the least time of a torch op on one element, taken as the harness takes the cost of a call: by the wall.

    Args:
        device: a CPU or a CUDA device.
        seconds: bounds the repetitions.
        say: is told what comes next, in a few words.
        only: this stream, or the product of this precision, and nothing else.

    Raises:
        ValueError: ``only`` is none of them.
    """
    precisions = PRECISIONS[device.type]
    if only is not None and only not in (*TRAFFICS, *precisions):
        expected = ", ".join((*TRAFFICS, *precisions))
        raise ValueError(f"measure_ceilings: only is {only!r}; expected one of {expected}")
    say = say or (lambda text: None)
    select(device)
    clock = Clock(device)
    rates: dict[str, list[tuple[int, float]]] = {}
    if traffics := [traffic for traffic in TRAFFICS if only in (None, traffic)]:
        say(f"{only or 'memory'} streams")
        rates = _measure_streams(clock, STREAM_SHARE * seconds, traffics)
    gemm = {}
    for precision in [precision for precision in precisions if only in (None, precision)]:
        say(f"{precision} matrix products")
        rate = _measure_gemm(clock, precision, GEMM_SHARE * seconds / len(precisions))
        if rate is not None:
            gemm[precision] = rate
    if only is not None:
        return Ceilings(str(device), rates, gemm)
    say("an empty call")
    return Ceilings(str(device), rates, gemm, _measure_launch(clock))


# --- streams ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """One way to make ``traffic`` on a working set of ``size`` bytes; a call reads and writes ``bytes``."""

    traffic: str
    size: int
    bytes: int
    call: Call


def _measure_streams(
    clock: Clock, seconds: float, traffics: Collection[str]
) -> dict[str, list[tuple[int, float]]]:
    """GB/s by traffic and size. Streams take turns, so that a slow while hits none of them alone."""
    memory = _largest_set(clock.device)
    if memory is None:
        return {}
    best: dict[tuple[str, int], float] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        streams = _usable_streams(memory, pool, traffics)
        deadline = time.perf_counter() + seconds
        turns_without = 0
        for turn, stream in enumerate(itertools.cycle(streams)):
            settled = turns_without >= PATIENCE * len(streams) or time.perf_counter() > deadline
            if turn >= len(streams) and settled:
                break
            turns_without += 1
            key = stream.traffic, stream.size
            for _ in range(max(1, min(8, 2**28 // stream.size))):  # the first call may find cold caches
                rate = stream.bytes / clock.device_seconds(stream.call)[0] / 1e9
                if rate > IMPROVEMENT * best.get(key, 0.0):
                    turns_without = 0
                best[key] = max(rate, best.get(key, 0.0))
    rates: dict[str, list[tuple[int, float]]] = {}
    for (traffic, size), rate in best.items():
        rates.setdefault(traffic, []).append((size, rate))
    return rates


def _largest_set(device: torch.device) -> torch.Tensor | None:
    """Float32 ones, the largest power of two of bytes that is wanted and fits; None where nothing fits."""
    from superfine.env import available_memory, last_level_cache

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    wanted = max(LARGEST_SET, 2 * (last_level_cache(device) or 0))
    size = 2 ** (wanted - 1).bit_length()
    while size >= SMALLEST_SET:
        if free is None or size <= free // 4:
            try:
                return torch.ones(size // 4, device=device)
            except RuntimeError:  # out of memory: less is available than was said
                pass
        size //= 2
    return None


def _sizes(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] >= 4 * SMALLEST_SET:
        sizes.append(sizes[-1] // 4)
    return sizes[::-1]


def _usable_streams(
    memory: torch.Tensor, pool: ThreadPoolExecutor, traffics: Collection[str]
) -> list[_Stream]:
    """The streams over all sizes; the first calls, over the smallest set, show which of them run here."""
    sets = [memory[: size // memory.element_size()] for size in _sizes(memory.nbytes)]
    usable = [stream.traffic in traffics and _runs(stream) for stream in _streams(sets[0], pool)]
    return [stream for part in sets for stream in itertools.compress(_streams(part, pool), usable)]


def _runs(stream: _Stream) -> bool:
    """Make a call, which compiles and warms up; whoever cannot run here is left to the others."""
    try:
        stream.call()
    except Exception:
        return False
    return True


def _streams(memory: torch.Tensor, pool: ThreadPoolExecutor) -> list[_Stream]:
    """Every known way to stream through ``memory``, which stays finite and away from denormals.

    In place is mostly faster on a CPU: an ordinary store to memory that was not read fetches the line first.
    """
    from superfine_kernels.adamw import adamw_

    source, target = memory.chunk(2)
    p, g, m, v = memory.chunk(4)
    vector = torch.ones(4096, device=memory.device)
    step = torch.zeros((), device=memory.device)  # of AdamW

    def mix() -> None:
        for tensor in (p, m, v):
            tensor.mul_(1.0)
        g.dot(g)

    def adamw() -> None:
        adamw_([p], [g], [m], [v], steps=[step], lr=0.0, beta1=0.0, beta2=0.0, weight_decay=0.0)

    size = memory.nbytes
    ways: list[tuple[str, int, Call]] = [
        ("copy", size, lambda: target.copy_(source)),
        ("copy", 2 * size, lambda: memory.mul_(1.0)),
        ("read", size, memory.sum),
        ("read", size, lambda: source.dot(target)),
        ("read", size, lambda: memory.view(-1, 4096).mv(vector)),
        ("write", size, lambda: memory.fill_(1.0)),
        ("4r3w", size // 4 * 7, mix),
        ("4r3w", size // 4 * 7, adamw),
    ]
    if memory.device.type == "cpu":
        ways.append(("write", size, _threaded_memset(memory, pool)))
    return [_Stream(traffic, size, moved, call) for traffic, moved, call in ways]


def _threaded_memset(memory: torch.Tensor, pool: ThreadPoolExecutor) -> Call:
    """libc's memset by all threads: for large blocks it writes whole lines without fetching them, as fill_ cannot."""
    threads = torch.get_num_threads()
    share = memory.nbytes // threads
    blocks = [(memory.data_ptr() + i * share, share) for i in range(threads)]
    blocks[-1] = (blocks[-1][0], memory.nbytes - (threads - 1) * share)
    return lambda: [done.result() for done in [pool.submit(ctypes.memset, at, 0, n) for at, n in blocks]]


# --- matrix products and the empty call ---------------------------------------------------------------


def _measure_gemm(clock: Clock, precision: str, seconds: float) -> float | None:
    """TFLOP/s of ``a @ b`` and ``a @ b.T``, of sizes that double until one saturates; None where none runs."""
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    deadline = time.perf_counter() + seconds
    best = None
    size = 256
    with _float32_precision("tf32" if precision == "tf32" else "ieee"):
        while True:
            try:
                a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                fastest = _best_seconds(
                    clock, [partial(torch.mm, a, right, out=out) for right in (b, b.T)], deadline
                )
            except RuntimeError:  # out of memory, or a dtype that this device does not multiply
                return best
            best = max(best or 0.0, 2 * size**3 / fastest / 1e12)
            if fastest >= SATURATED_SECONDS[clock.device.type] or time.perf_counter() > deadline:
                return best
            size *= 2


def _best_seconds(clock: Clock, calls: list[Call], deadline: float) -> float:
    """Least seconds of the calls in turns: at least two of each, as the first ones set up libraries."""
    best, turns_without = math.inf, 0
    for turn, call in enumerate(itertools.cycle(calls)):
        settled = turns_without >= PATIENCE * len(calls) or time.perf_counter() > deadline
        if turn >= 2 * len(calls) and settled:
            break
        seconds = clock.device_seconds(call)[0]
        turns_without = 0 if IMPROVEMENT * seconds < best else turns_without + 1
        best = min(best, seconds)
    return best


@contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in ``ieee`` or ``tf32``, whatever was chosen before; which comes back afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _measure_launch(clock: Clock) -> float:
    one = torch.ones(1, device=clock.device)
    return 1e6 * min(clock.wall_seconds(one.neg_)[0] for _ in range(500))
