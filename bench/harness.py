"""The one place where kernels are timed: cases, providers, interleaved measurement, result rows.

An op's file declares :class:`Case` objects. A case has inputs, the bytes that the op must move, a check
against the reference, and providers that do *equal work* on the same inputs. :func:`measure` runs the
providers of one case in turns, so that a machine that slows down slows all of them, and reports the
median, the 20th and the 80th percentile of single calls.

A provider's turn is: ``before`` (untimed: puts back what the last call overwrote, equally for everyone),
then one timed call. Correctness is checked before and after timing; a provider that fails gets no speed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

# Below this many bytes the cost of a call hides the memory system: a share of the bandwidth says nothing.
SMALLEST_BANDWIDTH_CASE = 16 * 2**20
# Faster than the measured ceiling by more than timing noise: caches, or less work than claimed.
SUSPECT_PERCENT = 102.0


class UnavailableError(Exception):
    """Raised by a provider's ``build`` when it cannot run here; the text says why."""


class MovesMemory(Protocol):
    """What a case needs of ``superfine_kernels``' cost: the bytes and FLOPs that the op must move."""

    @property
    def bytes(self) -> int: ...

    @property
    def flops(self) -> int: ...


@dataclass(frozen=True)
class Provider:
    """One implementation of a case's work.

    Attributes:
        name: as shown in tables.
        build: takes the case's inputs and returns the call to be timed; may raise :class:`UnavailableError`.
        in_quick: False leaves it out of quick runs (it compiles for a long time, for instance).
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    in_quick: bool = True


@dataclass(frozen=True)
class Case:
    """One measurement: the same work on the same inputs for all providers.

    Attributes:
        op: file name of the op, such as ``"adamw"``.
        name: what distinguishes it within the op, such as ``"1024x30522"``.
        dtype: of the op's main tensors, as shown in tables.
        work: what every provider does, in words.
        cost: returns the bytes and FLOPs that the work must move, computed by the op's ``cost``.
        traffic: which measured ceiling it is compared with: ``"copy"`` or ``"4r3w"``.
        memory: bytes that inputs, outputs and temporaries need at most, to skip what does not fit.
        inputs: builds the inputs on a device, from a fixed seed.
        before: untimed; restores in the inputs what a call overwrites.
        check: given inputs and a provider's call, runs it once and returns its largest error relative
            to the tolerance (at most 1 passes).
        providers: the first one is the baseline of the ratios.
        in_quick: False leaves the case out of quick runs.
    """

    op: str
    name: str
    dtype: str
    work: str
    cost: Callable[[], MovesMemory]
    traffic: str
    memory: int
    inputs: Callable[[torch.device], Any]
    before: Callable[[Any], None]
    check: Callable[[Any, Callable[[], Any]], float]
    providers: tuple[Provider, ...]
    in_quick: bool = True

    @property
    def key(self) -> str:
        """Identifies the case in result files and on the command line."""
        return f"{self.op}/{self.name}/{self.dtype}"


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: for each provider of a case, about.
        min_calls: timed calls at least, however long they take.
        max_calls: timed calls at most, however short they are.
        turn_seconds: a provider's calls are grouped into turns of about this length.
        quick: leave out cases and providers that are not marked for quick runs.
    """

    seconds: float = 3.0
    min_calls: int = 9
    max_calls: int = 2000
    turn_seconds: float = 0.02
    quick: bool = False


QUICK = Settings(seconds=0.7, min_calls=5, max_calls=500, quick=True)


@dataclass(frozen=True)
class Row:
    """One line of the result: one provider on one case. Times are in ms, rates in GB/s (10^9)."""

    op: str
    case: str
    dtype: str
    work: str
    provider: str
    device: str
    status: str  # ok | suspect | wrong | unavailable | error | out of memory | skipped
    note: str = ""
    calls: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None  # the baseline's median divided by this median: above 1 is faster
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    ceiling_gb_per_s: float | None = None
    percent_of_ceiling: float | None = None
    error: float | None = None  # largest error relative to the tolerance


@dataclass(frozen=True)
class Ceilings:
    """What this machine's memory reaches, in GB/s: ``rates[traffic]`` is a list of ``(bytes, rate)``."""

    device: str
    rates: dict[str, list[tuple[int, float]]]

    def for_bytes(self, traffic: str, size: int) -> float | None:
        """Return the rate measured at the size nearest to ``size``, or None for what was not measured."""
        measured = self.rates.get(traffic)
        if not measured or size < SMALLEST_BANDWIDTH_CASE:
            return None
        return min(measured, key=lambda entry: abs(math.log(entry[0] / size)))[1]


def measure(
    case: Case, device: torch.device, settings: Settings, ceilings: Ceilings | None = None
) -> list[Row]:
    """Check and time every provider of ``case`` on ``device``; one row for each, whatever happens to it."""
    blank = Row(case.op, case.name, case.dtype, case.work, "", str(device), "skipped")
    providers = [provider for provider in case.providers if provider.in_quick or not settings.quick]
    available = _available_memory(device)
    if available is not None and case.memory > available:
        note = f"needs {case.memory / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free"
        return [replace(blank, provider=provider.name, note=note) for provider in providers]

    inputs = case.inputs(device)
    rows: dict[str, Row] = {}
    running: dict[str, Callable[[], Any]] = {}
    for provider in providers:
        row = replace(blank, provider=provider.name)
        try:
            call = provider.build(inputs)
        except UnavailableError as reason:
            rows[provider.name] = replace(row, status="unavailable", note=str(reason))
            continue
        except Exception as error:
            rows[provider.name] = _failed(row, error)
            continue
        rows[provider.name] = row = _checked(case, inputs, call, row)
        if row.status == "ok":
            running[provider.name] = call

    times: dict[str, list[float]] = {name: [] for name in running}
    collecting = gc.isenabled()
    gc.disable()  # a collection inside a timed call would be charged to whoever is running
    try:
        for name, seconds in _interleaved(case, inputs, running, device, settings):
            times[name].append(seconds)
    finally:
        if collecting:
            gc.enable()

    for name, call in running.items():
        row = _checked(case, inputs, call, rows[name])
        rows[name] = _timed(row, times[name]) if row.status == "ok" else row
    finished = [rows[provider.name] for provider in providers]
    baseline = finished[0].median_ms if finished else None
    return [_with_rates(row, baseline, case, ceilings) for row in finished]


def _interleaved(
    case: Case,
    inputs: Any,
    running: dict[str, Callable[[], Any]],
    device: torch.device,
    settings: Settings,
) -> Iterator[tuple[str, float]]:
    """Yield (provider, seconds of one call), in turns that move from provider to provider."""
    timer = _cuda_seconds if device.type == "cuda" else _wall_seconds

    def one_call(call: Callable[[], Any]) -> float:
        case.before(inputs)
        return timer(call)

    shares: dict[str, tuple[int, int]] = {}  # calls in a turn, calls in all
    for name, call in running.items():
        one_call(call)  # warm-up: caches, thread pool, first launch
        seconds = max(one_call(call), 1e-7)
        total = min(settings.max_calls, max(settings.min_calls, int(settings.seconds / seconds)))
        shares[name] = (max(1, min(total, int(settings.turn_seconds / seconds))), total)
    left = {name: total for name, (_, total) in shares.items()}
    while any(left.values()):
        for name, call in running.items():
            for _ in range(min(shares[name][0], left[name])):
                yield name, one_call(call)
                left[name] -= 1


def _wall_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed here: an outcome that lives on is no part of the work
    return seconds


def _cuda_seconds(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # Keeps the GPU busy for about half a millisecond while the host queues the call: without it the time
    # between the events of a short call is the host's.
    torch.cuda._sleep(1_000_000)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1000


def _checked(case: Case, inputs: Any, call: Callable[[], Any], row: Row) -> Row:
    """Run the case's check; the row says ``ok`` or what is wrong."""
    try:
        case.before(inputs)
        error = case.check(inputs, call)
    except Exception as failure:
        return _failed(row, failure)
    worst = error if row.error is None else max(error, row.error)
    if not error <= 1:  # also when it is NaN
        return replace(row, status="wrong", error=error, note=f"error is {error:.3g} times the tolerance")
    return replace(row, status="ok", error=worst)


def _failed(row: Row, error: Exception) -> Row:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return replace(row, status="out of memory", note=text.splitlines()[0][:200])
    return replace(row, status="error", note=f"{type(error).__name__}: {text.splitlines()[0][:200]}")


def _timed(row: Row, seconds: list[float]) -> Row:
    milliseconds = sorted(1000 * value for value in seconds)
    p20, _, _, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return replace(row, calls=len(seconds), median_ms=statistics.median(milliseconds), p20_ms=p20, p80_ms=p80)


def _with_rates(row: Row, baseline: float | None, case: Case, ceilings: Ceilings | None) -> Row:
    if row.median_ms is None:
        return row
    cost = case.cost()
    rate = cost.bytes / row.median_ms / 1e6
    ceiling = None if ceilings is None else ceilings.for_bytes(case.traffic, cost.bytes)
    percent = None if ceiling is None else 100 * rate / ceiling
    suspect = percent is not None and percent > SUSPECT_PERCENT
    return replace(
        row,
        status="suspect" if suspect else row.status,
        note=f"above {SUSPECT_PERCENT:.0f}% of the measured ceiling" if suspect else row.note,
        ratio=None if baseline is None else baseline / row.median_ms,
        bytes=cost.bytes,
        flops=cost.flops,
        gb_per_s=rate,
        ceiling_gb_per_s=ceiling,
        percent_of_ceiling=percent,
    )


def measure_ceilings(device: torch.device, sizes: Iterable[int] = (2**25, 2**28, 2**30)) -> Ceilings:
    """Measure what streaming through memory reaches on this machine, with torch's own element-wise ops.

    ``copy`` is one read and one write, into another buffer or in place, whichever is faster. ``4r3w`` is
    the mix of AdamW: four reads and three writes, in place, so that no write needs an extra read first.
    The rate at a size is the best of several repetitions, for a working set of that many bytes.
    """
    rates: dict[str, list[tuple[int, float]]] = {"copy": [], "4r3w": []}
    timer = _cuda_seconds if device.type == "cuda" else _wall_seconds
    available = _available_memory(device)
    for size in sizes:
        if available is not None and size > available // 2:
            continue
        count = size // 8  # two fp32 buffers
        a = torch.ones(count, device=device)
        b = torch.ones(count, device=device)
        best = [min(timer(partial(stream, a, b)) for _ in range(6)) for stream in (_copy, _scale, _mix)]
        rates["copy"].append((size, max(8 * count / best[0], 16 * count / best[1]) / 1e9))
        rates["4r3w"].append((size, 28 * count / best[2] / 1e9))
        del a, b
    return Ceilings(str(device), rates)


def _copy(a: torch.Tensor, b: torch.Tensor) -> None:
    b.copy_(a)  # one read, one write


def _scale(a: torch.Tensor, b: torch.Tensor) -> None:
    a.mul_(1.0)  # one read, one write; and the same again
    b.mul_(1.0)


def _mix(a: torch.Tensor, b: torch.Tensor) -> None:
    a.add_(b, alpha=0.0)  # two reads, one write
    _scale(a, b)  # two reads, two writes


def _available_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from superfine.env import available_memory

    return available_memory()
