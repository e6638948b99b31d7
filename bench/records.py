"""What a run leaves behind: one JSON line for the environment, one for the ceilings, one for each row.

The file is appended to, a line at a time, so that Ctrl-C, a crash or a full disk loses at most the line being
written; :func:`read` takes the whole lines of such a file. A run that is resumed appends to the same file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "bench.jsonl"

#: Statuses of rows that have a speed.
MEASURED = ("ok", "suspect")


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times are in ms, rates in GB/s (10^9) and TFLOP/s, sizes in bytes.

    ``median_ms``, ``p20_ms`` and ``p80_ms`` are of single calls: on a GPU the device's time, on a CPU the wall's. Of
    cases about the cost of a call (``cache`` is ``resident``) it is the wall's everywhere, to the end of the work.
    ``low_ms`` and ``high_ms`` bound the median with 95% confidence, from its scatter over the turns in which
    providers alternate; ``p20_low_ms`` and ``p20_high_ms`` bound the 20th percentile, the figure that noise disturbs
    least: runs are compared by it. ``ratio`` is the median over all turns of the baseline's time divided by this
    one's in the same turn (above 1: faster), so that a machine that slows down does not count; ``ratio_low`` and
    ``ratio_high`` bound it.
    """

    op: str
    case: str
    dtype: str
    work: str
    provider: str
    device: str
    status: str  # ok | suspect | wrong | unavailable | error | out of memory | timeout | skipped
    note: str = ""
    baseline: str = ""  # the provider that ratios refer to
    cache: str = ""  # cold | resident
    calls: int = 0
    turns: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    p20_low_ms: float | None = None
    p20_high_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    wall_ms: float | None = None  # median of a call with the wait for its end, as the host sees it
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    traffic: str = ""  # the ceiling that memory-bound work is compared with
    ceiling_gb_per_s: float | None = None
    ceiling_tflop_per_s: float | None = None
    percent_of_ceiling: float | None = None  # of the floor of both ceilings: 100 is as fast as the machine
    peak_memory: int | None = None  # beyond the inputs, in the first call
    clock_mhz: float | None = None  # mean of what was read while timing
    error: float | None = None  # largest error relative to the tolerance
    split: dict[str, float] = field(default_factory=dict)  # parts of a whole step: name -> ms (median)

    @property
    def case_key(self) -> str:
        """Identifies the case on a device."""
        return f"{self.device} {self.op}/{self.case}/{self.dtype}"

    @property
    def key(self) -> str:
        """Identifies the row in result files."""
        return f"{self.case_key} {self.provider}"


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured before anything else.

    Attributes:
        device: what was measured.
        rates: GB/s of ``copy``, ``read``, ``write`` and ``4r3w`` streams: ``rates[traffic]`` is a list of
            ``(bytes of the working set, rate)``. Sets that fit into a cache show the cache.
        gemm: TFLOP/s of a large matrix product, by ``float32``, ``tf32``, ``bfloat16``; what cannot run is missing.
        launch_us: the least time of a torch op on one element, from the call to the end of its work.
    """

    device: str
    rates: dict[str, list[tuple[int, float]]]
    gemm: dict[str, float] = field(default_factory=dict)
    launch_us: float | None = None

    def or_better(self, other: Ceilings) -> Ceilings:
        """The best of both, figure by figure."""
        rates = {traffic: dict(measured) for traffic, measured in self.rates.items()}
        for traffic, measured in other.rates.items():
            best = rates.setdefault(traffic, {})
            best.update((size, max(rate, best.get(size, 0.0))) for size, rate in measured)
        gemm = self.gemm | {name: max(rate, self.gemm.get(name, 0.0)) for name, rate in other.gemm.items()}
        return dataclasses.replace(
            self, rates={traffic: sorted(best.items()) for traffic, best in rates.items()}, gemm=gemm
        )

    def for_bytes(self, traffic: str, size: int) -> float | None:
        """Return the rate at ``size``, interpolated on a log scale between the measured sizes; None for none."""
        measured = sorted(self.rates.get(traffic, ()))
        if not measured or size < SMALLEST_BANDWIDTH_CASE:
            return None
        if size <= measured[0][0]:
            return measured[0][1]
        for (small, slow), (large, fast) in itertools.pairwise(measured):
            if size <= large:
                weight = math.log(size / small) / math.log(large / small)
                return slow * (fast / slow) ** weight
        return measured[-1][1]


#: Below this many bytes the cost of a call hides the memory system: a share of the bandwidth says nothing.
SMALLEST_BANDWIDTH_CASE = 16 * 2**20


@dataclass
class Run:
    """The records of one file."""

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    broken: int = 0  # lines that could not be read

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in; one that was there already gives way."""
        self.rows = list(({row.key: row for row in self.rows} | {row.key: row for row in rows}).values())

    def row(self, key: str) -> Row | None:
        """The row of that :attr:`Row.key`."""
        return next((row for row in self.rows if row.key == key), None)


def append(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Append one record, on a line of its own whatever an interrupted run left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"kind": kind, **content}, allow_nan=False, default=str)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write((line + "\n").encode())


def append_row(path: Path, row: Row) -> None:
    """Append a row."""
    append(path, "row", finite(dataclasses.asdict(row)))


def finite(value: Any) -> Any:
    """`value` with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: str | Path) -> Run:
    """Read a result file, or the one in a folder.

    Of rows measured twice (a resumed run measures failures again) the last one counts. A truncated file is taken
    up to its last whole line; lines that are no records are counted in ``broken``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it holds no record at all.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    run = Run()
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            kind = record.pop("kind")
            if kind == "environment":
                run.environment = record
            elif kind == "ceilings":
                rates = {
                    name: [(size, rate) for size, rate in sizes] for name, sizes in record["rates"].items()
                }
                run.ceilings = _known(Ceilings, record | {"rates": rates})
            elif kind == "row":
                row = _known(Row, record)
                rows[row.key] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            run.broken += 1
    run.rows = list(rows.values())
    if not run.rows and not run.environment:
        raise ValueError(f"{path} holds no benchmark records; expected a {FILE} that superfine bench wrote")
    return run


def _known(kind: type, record: dict[str, Any]) -> Any:
    """A record of a newer version may have fields that this one does not know."""
    names = {item.name for item in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in record.items() if key in names})


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a table with a header line."""
    import csv

    from superfine._files import atomic_write

    names = [item.name for item in dataclasses.fields(Row)]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow([json.dumps(values[name]) if name == "split" else values[name] for name in names])
