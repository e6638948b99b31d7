"""Where the time of one case goes: ops or kernels, gaps between them, memory over time.

A profiler slows down what it watches, so times for rates are taken before it starts; it gives the shares. On a
GPU it sees every kernel, on a CPU torch's ops only: native kernels of ours get a range each, put around the
functions of their module while the profiler runs. What is in no op or kernel is in the shares, too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import OPS, all_cases
from .binaries import LIMITS, LIMITS_SOURCE, built_usage, occupancy, short_name
from .ceilings import measure_ceilings
from .counters import Counters, read_counters
from .display import number, size
from .harness import PARTS, Case, Provider, with_rates
from .records import Ceilings, Row, finite
from .timing import Clock, select
from .trace import NATIVE, Total, Trace, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

TRACE, PICTURE, NUMBERS = "trace.json.gz", "memory.png", "profile.json"
NO_KERNEL = "no kernel running"
CEILING_SECONDS = 6.0
SHOWN = 20  # lines of the table; profile.json has all


@dataclass(frozen=True)
class Entry:
    """One op or kernel: calls and milliseconds in one call of the case, and its share of the wall time in %.

    `ms` is self time: without the ops that it calls. What follows is known of GPU kernels only: registers per
    thread, spilled bytes per thread (`stack`), shared bytes and threads per block, resident warps as a share of
    what fits; with ncu, bytes to and from DRAM and the load of the multiprocessors.
    """

    name: str
    calls: float
    ms: float
    share: float
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    threads: int | None = None
    occupancy: float | None = None
    dram_bytes: float | None = None
    sm_percent: float | None = None


@dataclass(frozen=True)
class Profile:
    """The numbers of `profile.json`.

    Attributes:
        row: the case with its rates, timed without the profiler.
        entries: by share, the largest first; shares sum to 100, overlapping kernels apart.
        profiled_ms: wall time of a call under the profiler, of which the shares are.
        gap_ms: of it, in no op (CPU) or with no kernel running (GPU).
        parts: milliseconds of the ranges "forward", "backward", "optimizer" where the trace has them.
        memory: (milliseconds, bytes beyond those at the start) over the last call.
        peak_memory: the largest of them.
        files: what was written.
        notes: what a reader has to know.
    """

    row: Row
    entries: list[Entry]
    profiled_ms: float
    gap_ms: float
    parts: dict[str, float]
    memory: list[tuple[float, int]]
    peak_memory: int
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_case(
    op: str, case: str | None = None, provider: str = "superfine", device: str = "cpu"
) -> tuple[Case, Provider]:
    """The first case of `op` for a type of `device` whose key contains `case`, and its provider of that name.

    `train` is short for `train_step`.

    Raises:
        ValueError: there is none; the message has near misses.
    """
    if op not in (*OPS, "train"):
        raise ValueError(f"profile: op is {op!r}; expected {_one_of(op, [*OPS, 'train'])}")
    cases = all_cases("train_step" if op == "train" else op, device)
    found = next((one for one in cases if case is None or case in one.key), None)
    if found is None:
        raise ValueError(f"profile: case is {case!r}; expected {_one_of(str(case), [c.key for c in cases])}")
    names = [one.name for one in found.providers]
    if provider not in names:
        raise ValueError(f"profile: provider is {provider!r}; expected {_one_of(provider, names)}")
    return found, found.providers[names.index(provider)]


def _one_of(given: str, names: list[str]) -> str:
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    return f"one of {', '.join(names)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def profile_case(
    case: Case,
    provider: Provider,
    device: torch.device,
    folder: Path,
    ceilings: Ceilings | None = None,
    *,
    calls: int = 5,
    ncu: bool = False,
) -> Profile:
    """Profile `calls` calls of one provider and write trace, picture and numbers into `folder`.

    `ceilings` are measured when they are not given. `ncu` adds the GPU's counters where they can be read.

    Raises:
        ValueError: `calls` is below 1.
        UnavailableError: the provider cannot run here.
    """
    if calls < 1:
        raise ValueError(f"profile_case: calls is {calls}; expected at least 1")
    select(device)
    inputs = case.inputs(device)
    call = provider.build(inputs)
    folder.mkdir(parents=True, exist_ok=True)

    def prepare() -> Callable[[], Any]:
        case.before(inputs)
        return call

    row = _timed(case, provider, device, ceilings, prepare, calls)
    label = f"{case.op}: {provider.name}"
    trace = record(label, device, prepare, calls, folder / TRACE)
    on_gpu = device.type == "cuda"
    counted: dict[str, Counters] | str = {}
    if ncu:
        counted = read_counters(case.key, provider.name, str(device)) if on_gpu else "no counters: not a GPU"
    notes = [counted] if isinstance(counted, str) else []
    if on_gpu:
        counters = {} if isinstance(counted, str) else counted
        gap_ms = (trace.wall_us - trace.busy_us()) / 1000 / calls
        major, minor = torch.cuda.get_device_capability(device)
        kernel = partial(_kernel, trace, 10 * major + minor, _stacks(f"sm_{major}{minor}"), counters)
        entries = [kernel(name, total) for name, total in trace.kernels().items()]
        entries.append(Entry(NO_KERNEL, 1, gap_ms, 100 * gap_ms * 1000 * calls / trace.wall_us))
        notes.append(f"Occupancy by the limits of the {LIMITS_SOURCE}.")
    else:
        ops = trace.ops()
        gap_ms = ops[label].us / 1000 / calls
        entries = [_entry(name, total, trace) for name, total in ops.items()]
        notes.append(f"{label!r} is the time in no op; {NATIVE}* are native kernels of ours.")
    memory = trace.memory(on_gpu, device.index or 0)
    profile = Profile(
        row=row,
        entries=sorted(entries, key=lambda entry: -entry.share),
        profiled_ms=trace.wall_us / 1000 / calls,
        gap_ms=gap_ms,
        parts=trace.parts(PARTS, on_gpu),
        memory=memory,
        peak_memory=max(bytes_ for _, bytes_ in memory),
        files=[str(folder / name) for name in (TRACE, PICTURE, NUMBERS)],
        notes=notes,
    )
    _write(profile, folder)
    return profile


def _timed(
    case: Case,
    provider: Provider,
    device: torch.device,
    ceilings: Ceilings | None,
    prepare: Callable[[], Callable[[], Any]],
    calls: int,
) -> Row:
    """The row of the case, from calls that nobody watches; the harness times with more care."""
    clock = Clock(device)
    clock.wall_seconds(prepare())  # warms up
    walls = [1000 * clock.wall_seconds(prepare())[0] for _ in range(calls)]
    times = [1000 * clock.device_seconds(prepare())[0] for _ in range(calls)] if clock.on_cuda else walls
    row = Row(
        case.op, case.name, case.dtype, case.work, provider.name, str(device), "ok", cache="resident",
        calls=calls, median_ms=statistics.median(times), wall_ms=statistics.median(walls),
    )  # fmt: skip
    return with_rates(row, case, ceilings or measure_ceilings(device, CEILING_SECONDS))


def _entry(name: str, total: Total, trace: Trace) -> Entry:
    calls = len(trace.spans)
    return Entry(name, total.calls / calls, total.us / 1000 / calls, 100 * total.us / trace.wall_us)


def _kernel(
    trace: Trace,
    capability: int,
    stacks: dict[str, int],
    counters: dict[str, Counters],
    name: str,
    total: Total,
) -> Entry:
    """What the trace, our own binary and ncu know of a kernel."""
    short, launch = short_name(name), total.launch
    entry = replace(_entry(name, total, trace), name=short, stack=stacks.get(short))
    if short in counters:
        counted = counters[short]
        entry = replace(entry, dram_bytes=counted.dram_bytes, sm_percent=counted.sm_percent)
    if "registers per thread" not in launch:  # a copy or a fill
        return entry
    registers, shared, threads = (
        launch["registers per thread"],
        launch["shared memory"],
        math.prod(launch["block"]),
    )
    resident = occupancy(capability, registers, shared, threads) if capability in LIMITS else None
    return replace(entry, registers=registers, shared=shared, threads=threads, occupancy=resident)


def _stacks(arch: str) -> dict[str, int]:
    """Spilled bytes per thread of our CUDA kernels, by short name; empty where they cannot be read."""
    return {short_name(name): usage.stack for name, usage in (built_usage(arch) or {}).items()}


def _write(profile: Profile, folder: Path) -> None:
    from superfine._files import atomic_write

    from .charts import png

    with atomic_write(folder / PICTURE) as temporary:
        temporary.write_bytes(png(3.2, lambda figure: _draw_memory(figure, profile)))
    content = finite(dataclasses.asdict(profile))
    with atomic_write(folder / NUMBERS) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _draw_memory(figure: Figure, profile: Profile) -> None:
    axes = figure.subplots()
    times = [milliseconds for milliseconds, _ in profile.memory]
    mebibytes = [bytes_ / 2**20 for _, bytes_ in profile.memory]
    axes.fill_between(times, mebibytes, step="post", alpha=0.3, linewidth=0)
    axes.step(times, mebibytes, where="post", linewidth=1.3)
    axes.set_title(f"{profile.row.op}, {profile.row.case}, {profile.row.dtype}: {profile.row.provider}")
    axes.set_xlabel("ms")
    axes.set_ylabel("MiB beyond the inputs")
    axes.set_xlim(0, times[-1])
    axes.grid(axis="y")


def print_profile(console: Console, profile: Profile) -> None:
    """Print rates, entries and notes."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    row = profile.row

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{row.op}  {row.case}, {row.dtype}, {row.device}: {row.provider}")
    line(
        f"{number(row.median_ms)} ms a call; {number(profile.profiled_ms)} ms under the profiler, shared out below"
    )
    rates = [f"{number(row.gb_per_s)} GB/s"] if row.bytes else []
    rates += [f"{number(row.tflop_per_s)} TFLOP/s"] if row.flops else []
    rates += [f"{row.percent_of_ceiling:.0f}% of the ceiling"] if row.percent_of_ceiling is not None else []
    if rates:
        line(f"By what the op must do: {', '.join(rates)}")
    for name, milliseconds in profile.parts.items():
        line(f"{name} {number(milliseconds)} ms")
    columns: dict[str, Callable[[Entry], str]] = {
        "calls": lambda entry: f"{entry.calls:.4g}",
        "ms": lambda entry: f"{entry.ms:.3g}",
        "%": lambda entry: f"{entry.share:.1f}",
        "regs": lambda entry: number(entry.registers),
        "spilled": lambda entry: number(entry.stack),
        "shared": lambda entry: number(entry.shared),
        "threads": lambda entry: number(entry.threads),
        "occupancy": lambda entry: "" if entry.occupancy is None else f"{100 * entry.occupancy:.0f}%",
        "DRAM": lambda entry: "" if entry.dram_bytes is None else size(int(entry.dram_bytes)),
        "SM load": lambda entry: "" if entry.sm_percent is None else f"{entry.sm_percent:.0f}%",
    }
    columns = {title: show for title, show in columns.items() if any(map(show, profile.entries))}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("self time of", overflow="ellipsis", no_wrap=True, ratio=1)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in profile.entries[:SHOWN]:
        table.add_row(escape(entry.name), *(show(entry) for show in columns.values()))
    console.print(table)
    if len(profile.entries) > SHOWN:
        rest = sum(entry.share for entry in profile.entries[SHOWN:])
        line(f"{len(profile.entries) - SHOWN} more take {rest:.1f}%")
    line(f"Gaps {number(profile.gap_ms)} ms; peak memory {size(profile.peak_memory)} beyond the inputs")
    for text in (*profile.notes, *profile.files):
        line(text)
