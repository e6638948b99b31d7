"""The one place where kernels are timed: cases, providers, interleaved measurement, result rows.

An op's file declares :class:`Case` objects. A case has inputs, the bytes that the op must move, a check
against the reference, and providers that do *equal work* on the same inputs. :func:`measure` runs the
providers of one case in turns, so that a machine that slows down slows all of them.

A provider is built twice. The first one is checked, which also pays for imports, compilations and libraries'
workspaces: they would otherwise count as memory of whoever comes first. The second one is timed. A call of it is:
``before`` (untimed: puts back what the last call overwrote, equally for everyone), the caches emptied unless the case
is about the cost of a call, then the timed call. Then it is checked, too; a provider that fails gets no speed.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from .records import SMALLEST_BANDWIDTH_CASE, Ceilings, Row
from .timing import Clock, PeakMemory, eviction, ratios, select, summarise

#: The parts of a whole training step, by which ranges of a trace and times of a call are named.
PARTS = ("forward", "backward", "optimizer")

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
        build: takes the case's inputs and returns the call to be timed; may raise :class:`UnavailableError`. It is
            called more than once, on the same inputs.
        in_quick: False leaves it out of quick runs (it compiles for a long time, for instance).
        cost: where it does other work than the case says: what that must move.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    in_quick: bool = True
    cost: Callable[[], MovesMemory] | None = None


@dataclass(frozen=True)
class Case:
    """One measurement: the same work on the same inputs for all providers.

    Attributes:
        op: file name of the op, such as ``"adamw"``.
        name: what distinguishes it within the op, such as ``"1024x30522"``.
        dtype: of the op's main tensors, as shown in tables.
        work: what every provider does, in words.
        cost: returns the bytes and FLOPs that the work must move, computed by the op's ``cost``.
        traffic: the measured stream that it is compared with: ``"copy"``, ``"read"``, ``"write"`` or ``"4r3w"``;
            empty where memory is not what bounds it.
        memory: bytes that inputs, outputs and temporaries of one provider need at most, to skip what does not fit.
        inputs: builds the inputs on a device, from a fixed seed.
        before: untimed; restores in the inputs what a call overwrites.
        check: given inputs and a provider's call, runs it once and returns its largest error relative
            to the tolerance (at most 1 passes).
        providers: the first one is the baseline of the ratios.
        in_quick: False leaves the case out of quick runs.
        gemm: the measured matrix product (a key of ``Ceilings.gemm``) whose rate bounds it; empty for none.
        resident: the cost of a call is what is measured: caches stay as the last call left them, and on a GPU the
            wall's time counts, to the end of the call's work.
        redraw: given inputs and a seed, draws other values into the same buffers, so that a provider that
            remembers its last result is found out. Not needed where every call changes its own input.
        parts: a call returns the seconds of its parts by name, which the row keeps apart.
        device: the type of device whose speed its sizes are chosen for; empty for any.
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
    gemm: str = ""
    resident: bool = False
    redraw: Callable[[Any, int], None] | None = None
    parts: bool = False
    device: str = ""

    @property
    def key(self) -> str:
        """Identifies the case in result files and on the command line."""
        return f"{self.op}/{self.name}/{self.dtype}"


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: for each provider of a case, about, with what is not timed.
        turns: how often every provider gets its turn; intervals come from the scatter over turns.
        max_calls: timed calls in a turn at most, however short they are.
        timeout: seconds that one step (a build, a check, a turn) of a provider may take.
        quick: leave out cases and providers that are not marked for quick runs.
    """

    seconds: float = 3.0
    turns: int = 15
    max_calls: int = 200
    timeout: float = 300.0
    quick: bool = False


QUICK = Settings(seconds=0.6, turns=8, max_calls=60, timeout=90.0, quick=True)
FULL = Settings(seconds=8.0, turns=31)


def providers_of(case: Case, settings: Settings) -> list[Provider]:
    """The case's providers that run with these settings, the baseline first."""
    return [provider for provider in case.providers if provider.in_quick or not settings.quick]


@dataclass
class _Runner:
    """One provider that runs: its call, and the seconds of its calls by turn."""

    call: Callable[[], Any]
    first_seconds: float  # of the first call, which allocates what the others find
    calls_per_turn: int = 1
    turns: list[list[float]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)


def measure(
    case: Case,
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings | None = None,
    *,
    leave_out: Collection[str] = (),
    tell: Callable[[str], None] = lambda provider: None,
) -> list[Row]:
    """Check and time every provider of ``case`` on ``device``; one row for each, whatever happens to it.

    ``tell`` is called with a provider's name whenever something of that provider begins.

    On CUDA an error of a provider other than want of memory is raised: it may have spoilt the context for all others,
    so this process must end.
    """
    from superfine.env import clock_mhz, last_level_cache

    select(device)
    providers = [provider for provider in providers_of(case, settings) if provider.name not in leave_out]
    baseline = case.providers[0].name
    evict = 0 if case.resident else eviction(last_level_cache(device))
    blank = Row(
        case.op, case.name, case.dtype, case.work, "", str(device), "skipped",
        baseline=baseline, traffic=case.traffic, cache="resident" if case.resident else "cold",
    )  # fmt: skip
    available = _available_memory(device)
    if available is not None and case.memory + evict > available:
        note = f"needs {(case.memory + evict) / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free"
        return [replace(blank, provider=provider.name, note=note) for provider in providers]

    try:
        clock = Clock(device, evict)
        inputs = case.inputs(device)
    except Exception as error:
        return [_failed(replace(blank, provider=provider.name), error) for provider in providers]
    rows: dict[str, Row] = {}
    running: dict[str, _Runner] = {}
    for provider in providers:
        tell(provider.name)
        row, runner = _made_ready(case, inputs, provider, replace(blank, provider=provider.name), clock)
        rows[provider.name] = row
        if runner is not None:
            running[provider.name] = runner

    def attempt(name: str, work: Callable[[Case, Any, _Runner, Clock], None]) -> None:
        tell(name)
        try:
            work(case, inputs, running[name], clock)
        except Exception as error:
            rows[name] = _failed(rows[name], error)
            del running[name]

    clocks: list[float] = []
    with _no_collection():
        for name in list(running):
            attempt(name, partial(_plan, settings=settings))
        for turn in range(settings.turns if running else 0):
            order = list(running)
            for name in order if turn % 2 == 0 else reversed(order):
                attempt(name, _take_turn)
            mhz = clock_mhz(device)
            clocks += [] if mhz is None else [mhz]

    if case.redraw is not None:
        case.redraw(inputs, 1)
    for name, runner in running.items():
        tell(name)
        rows[name] = row = _checked(case, inputs, runner.call, rows[name])
        if row.status != "ok":
            continue
        row = replace(row, **summarise(runner.turns))  # type: ignore[arg-type]
        if baseline in running:
            row = replace(row, **ratios(running[baseline].turns, runner.turns))  # type: ignore[arg-type]
        rows[name] = replace(
            with_rates(row, case, ceilings),
            wall_ms=1000 * statistics.median(runner.walls),
            clock_mhz=statistics.mean(clocks) if clocks else None,
            split=_medians(runner.parts),
        )
    return [rows[provider.name] for provider in providers]


def _made_ready(
    case: Case, inputs: Any, provider: Provider, row: Row, clock: Clock
) -> tuple[Row, _Runner | None]:
    """The provider's row, checked and with its peak memory, and its call; None where it cannot run."""
    try:
        row = _checked(case, inputs, provider.build(inputs), row)
        if row.status != "ok":
            return row, None
        gc.collect()
        with PeakMemory(clock.device) as peak:
            call = provider.build(inputs)
            case.before(inputs)
            seconds = clock.wall_seconds(call)[0]  # allocates its state
    except UnavailableError as reason:
        return replace(row, status="unavailable", note=str(reason)), None
    except Exception as error:
        return _failed(row, error), None
    return replace(row, peak_memory=peak.bytes), _Runner(call, seconds)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection inside a timed call would be charged to whoever is running."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _timed(case: Case, inputs: Any, runner: _Runner, clock: Clock) -> tuple[float, Any]:
    """Seconds of one call and what it returned."""
    case.before(inputs)
    clock.evict()
    # Of a short call the device's time depends on how much of it was queued before the device began.
    return (clock.wall_seconds if case.resident else clock.device_seconds)(runner.call)


def _plan(case: Case, inputs: Any, runner: _Runner, clock: Clock, settings: Settings) -> None:
    """Set how many calls make a turn: one where that is long, else by how long it takes with everything around it."""
    turn = settings.seconds / settings.turns
    if runner.first_seconds >= 2 * turn:
        return

    def everything() -> None:
        _timed(case, inputs, runner, clock)

    everything()
    seconds = max(clock.wall_seconds(everything)[0], 1e-6)
    runner.calls_per_turn = max(1, min(settings.max_calls, int(turn / seconds)))


def _take_turn(case: Case, inputs: Any, runner: _Runner, clock: Clock) -> None:
    turn = []
    for _ in range(runner.calls_per_turn):
        seconds, result = _timed(case, inputs, runner, clock)
        turn.append(seconds)
        if case.parts:
            runner.parts.append(result)
        del result  # freed before the next call: an outcome that lives on is no part of the work
    runner.turns.append(turn)
    if clock.on_cuda and not case.resident:
        case.before(inputs)
        clock.evict()
        runner.walls.append(clock.wall_seconds(runner.call)[0])
    else:
        runner.walls += turn


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    return (
        {name: 1000 * statistics.median(part[name] for part in parts) for name in parts[0]} if parts else {}
    )


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
    status, note = failure(error)
    if status == "error" and row.device.startswith("cuda"):
        raise error
    return replace(row, status=status, note=note)


def failure(error: Exception) -> tuple[str, str]:
    """The status and the note of a row that ended with `error`."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    # On the CPU torch raises a plain RuntimeError, native code std::bad_alloc.
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
        r"can't allocate memory|not enough memory|out of memory", line
    )
    return ("out of memory", line) if out_of_memory else ("error", f"{type(error).__name__}: {line}")


def with_rates(row: Row, case: Case, ceilings: Ceilings | None) -> Row:
    """The row with its rates, and how near it comes to the slower of both ceilings."""
    assert row.median_ms is not None
    cost = next((p.cost for p in case.providers if p.name == row.provider and p.cost), case.cost)()
    seconds = row.median_ms / 1000
    bandwidth = rate = None
    if ceilings is not None:
        bandwidth = ceilings.for_bytes(case.traffic, _working_set(case, cost)) if case.traffic else None
        rate = ceilings.gemm.get(case.gemm)
    floors = [cost.bytes / bandwidth / 1e9] if bandwidth else []
    floors += [cost.flops / rate / 1e12] if rate else []
    percent = 100 * max(floors) / seconds if floors else None
    suspect = percent is not None and percent > SUSPECT_PERCENT
    return replace(
        row,
        status="suspect" if suspect else "ok",
        note=f"above {SUSPECT_PERCENT:.0f}% of the measured ceiling" if suspect else "",
        bytes=cost.bytes,
        flops=cost.flops,
        gb_per_s=cost.bytes / seconds / 1e9,
        tflop_per_s=cost.flops / seconds / 1e12,
        ceiling_gb_per_s=bandwidth,
        ceiling_tflop_per_s=rate,
        percent_of_ceiling=percent,
    )


def _working_set(case: Case, cost: MovesMemory) -> int:
    """The size at which the streams are compared: cold caches are those of a set that fits into none."""
    return cost.bytes if case.resident or cost.bytes < SMALLEST_BANDWIDTH_CASE else max(cost.bytes, 2**40)


def _available_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from superfine.env import available_memory

    return available_memory()
