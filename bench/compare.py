"""Compare two result files, row by row and by interval: noise is neither a gain nor a loss.

Noise only adds time, so the 20th percentiles are compared, which it disturbs least. But the turns of one run do not
show how much the next run differs: pages lie elsewhere, the host has other guests. The rows that are not ours do, as
the same torch ran twice. From them follows how far the machine alone moves a time (``sigma``), and from the case's
baseline, how far it has moved this case: with a baseline that moved by ``x``, known within ``s``, it is
``x * sigma^2 / (sigma^2 + s^2)``, the mean of the normal posterior. So a machine that is slower today is no slow
kernel, and a baseline that had a bad day does not make us faster.

What remains of a row's change is the code's, or the row's own: pages that lie elsewhere move one row and not the one
beside it. How far (``rho``) is seen in the rows of others that are no baselines, by what remains of their changes
beyond the scatter within the runs; every interval is widened by it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .display import FAILED, baseline_of, by_case, case_name, is_ours
from .records import MEASURED, Row, Run

if TYPE_CHECKING:
    from rich.console import Console

#: Fewer rows than these do not show how far anything moves between runs.
FEWEST = 3

#: How far a row moves on its own where too few rows show it. On the reference machine, rows of others moved beside
#: their baselines by 4% to 7% (root mean square over 7 rows, in 6 pairs of runs), scatter within the runs included.
UNKNOWN_RHO = 0.05

#: From the worst to the best.
VERDICTS = ("broken", "slower", "missing", "unclear", "same", "faster", "new")

STYLES = {"broken": "bold red", "slower": "red", "missing": "yellow", "unclear": "yellow", "faster": "green"}


@dataclass(frozen=True)
class Comparison:
    """What became of one row.

    Attributes:
        key: the row's :attr:`Row.key`.
        op: the row's op.
        verdict: ``slower`` or ``faster`` when the whole interval lies beyond the threshold, ``same`` when it lies
            within, ``unclear`` when it crosses; ``broken`` when a row that had a speed failed, or is one of ours and
            gone from its case; ``new`` and ``missing`` when one file has no speed to compare. Rows without a speed in
            both are the ``same`` when their statuses are.
        change: relative change of time, positive for slower; None where nothing could be compared.
        low, high: bounds of ``change``; None where a file has no intervals.
        by: what was compared: ``time``, or ``time beside`` a baseline's.
        note: what a reader should know.
        case: the case with its dtype.
        provider: whose row it is.
    """

    key: str
    op: str
    verdict: str
    change: float | None = None
    low: float | None = None
    high: float | None = None
    by: str = ""
    note: str = ""
    case: str = ""
    provider: str = ""


@dataclass(frozen=True)
class Change:
    """The logarithm of a factor, with 95% bounds."""

    value: float
    low: float
    high: float

    def over(self, other: Change) -> Change:
        """The change of a quotient: independent errors add as squares."""
        value = self.value - other.value
        down = math.hypot(self.value - self.low, other.high - other.value)
        up = math.hypot(self.high - self.value, other.value - other.low)
        return Change(value, value - down, value + up)

    @property
    def error(self) -> float:
        """Its standard error."""
        return (self.high - self.low) / (2 * 1.96)

    def widened(self, sigma: float) -> Change:
        """With another error of that standard deviation."""
        return self.over(Change(0.0, -1.96 * sigma, 1.96 * sigma)) if sigma else self

    def shrunk(self, sigma: float) -> Change:
        """What is believed of a quantity that was measured so and is known to be around 0 within ``sigma``."""
        if math.isinf(sigma):
            return self
        variance = sigma**2 + self.error**2
        weight = sigma**2 / variance if variance else 0.0
        value = weight * self.value
        down, up = self.value - self.low, self.high - self.value
        return Change(value, value - math.sqrt(weight) * down, value + math.sqrt(weight) * up)

    def verdict(self, threshold: float) -> str:
        """``slower``, ``faster``, ``same`` or ``unclear``, with times that change by up to ``threshold`` the same."""
        low, high = math.expm1(self.low), math.expm1(self.high)
        if low > threshold:
            return "slower"
        if high < -threshold:
            return "faster"
        return "same" if -threshold <= low and high <= threshold else "unclear"


def compare(a: Run, b: Run, threshold: float = 0.03, force: bool = False) -> list[Comparison]:
    """Compare ``b`` with the earlier ``a``: a comparison for every row of ``b``, then for those only in ``a``.

    Args:
        a, b: two runs of the same cases.
        threshold: relative changes of time up to this are called the same.
        force: compare runs of different devices, too: rows of one case and provider with each other.

    Raises:
        ValueError: the runs are of different devices, or ``threshold`` is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"compare: threshold is {threshold}; expected 0 or more")
    before, after = device_of(a), device_of(b)
    if before != after and not force:
        raise ValueError(f"compare: device is {after}; expected {before}, as in the earlier run, or force")
    judge = _Judge(a, b)
    baselines = [row for case in by_case(b.rows) for row in case if row.provider == baseline_of(case)]
    yardsticks = {_place(row) for row in baselines} if len(baselines) < len(b.rows) else set()
    found = [_compare_row(judge, row, threshold, _place(row) in yardsticks) for row in b.rows]
    later, cases = {_place(row) for row in b.rows}, {_case(row) for row in b.rows}
    for row in a.rows:
        if _place(row) not in later:
            gone = is_ours(row.provider) and row.status in MEASURED and _case(row) in cases
            found.append(_describe(row, "broken" if gone else "missing", note="not in the later run"))
    return found


def _case(row: Row) -> tuple[str, str, str]:
    return row.op, row.case, row.dtype


def _place(row: Row) -> tuple[str, str, str, str]:
    """What two rows of two runs have in common; the device is compared once, for the runs."""
    return row.op, row.case, row.dtype, row.provider


class _Judge:
    """What two runs say of a row's change, beside how far the machine moves everything, and a row moves alone.

    ``sigma`` is the root mean square of the logarithms of all changes that are not ours. With fewer than three it is
    unknown: infinite, so that a baseline is taken at its word. With another torch nobody has run the same code twice,
    and times decide alone. ``rho`` is what remains beside the baselines, less the scatter within the runs; where that
    is unknown, ``sigma``, of which it is a part, or else ``UNKNOWN_RHO``.
    """

    def __init__(self, a: Run, b: Run) -> None:
        self.earlier = {_place(row): row for row in a.rows}
        self.bases = _baselines(a), _baselines(b)
        self.same_torch = _torch_version(a) == _torch_version(b)
        self.sigma, self.rho = math.inf, UNKNOWN_RHO
        others = [row for row in b.rows if not is_ours(row.provider)] if self.same_torch else []
        moved = [change for row in others if (change := _change(self.earlier.get(_place(row)), row))]
        if len(moved) < FEWEST:
            return
        self.sigma = self.rho = math.sqrt(statistics.mean(change.value**2 for change in moved))
        left = [found[0] for row in others if (found := self._beside(row)) is not None and found[1]]
        if len(left) >= FEWEST:
            self.rho = math.sqrt(max(0.0, statistics.mean(c.value**2 - c.error**2 for c in left)))

    def change(self, row: Row) -> tuple[Change, str] | None:
        """The change of a row's time, as far as it is not the machine's, and what was compared."""
        found = self._beside(row)
        if found is None:
            return None
        change, baseline = found
        change = change.widened(self.rho)
        if baseline:
            return change, f"time beside {baseline}'s"
        return change if math.isinf(self.sigma) else change.widened(self.sigma), "time"

    def _beside(self, row: Row) -> tuple[Change, str] | None:
        """The change beside that of the baseline, and its name; empty for a change by itself."""
        old = self.earlier.get(_place(row))
        change = _change(old, row)
        if old is None or change is None:
            return None
        base = _change(*(bases.get(_case(row)) for bases in self.bases))
        if (
            base is None
            or not self.same_torch
            or row.provider == row.baseline
            or row.baseline != old.baseline
        ):
            return change, ""
        return change.over(base.shrunk(self.sigma)), row.baseline


def device_of(run: Run) -> str:
    """The device that a run measured: a GPU's name and uuid, or a processor with its ISA and threads."""
    environment = run.environment
    device = str(environment.get("device") or (run.rows[0].device if run.rows else "cpu"))
    if device.startswith("cuda"):
        devices = (environment.get("cuda") or {}).get("devices") or []
        index = int(device.partition(":")[2] or 0)
        gpu: dict[str, Any] = devices[index] if index < len(devices) else {}
        return f"{gpu.get('name', 'unknown GPU')} ({gpu.get('uuid', 'unknown uuid')})"
    cpu = environment.get("cpu") or {}
    model = cpu.get("model") or "unknown processor"
    return f"{model} ({cpu.get('isa') or 'unknown ISA'}, {cpu.get('threads') or 'unknown number of'} threads)"


def verdicts(comparisons: Iterable[Comparison]) -> dict[str, str]:
    """The verdict of each op: the worst of our providers; of all providers where none is ours."""
    by_op: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_op.setdefault(comparison.op, []).append(comparison)
    return {
        op: min(
            (one.verdict for one in [c for c in found if is_ours(c.provider)] or found), key=VERDICTS.index
        )
        for op, found in by_op.items()
    }


def failed(comparisons: Iterable[Comparison]) -> bool:
    """Whether one of ours broke or became slower; where none of an op is ours, whether any became slower."""
    comparisons = list(comparisons)
    broken = any(c.verdict == "broken" and is_ours(c.provider) for c in comparisons)
    return broken or "slower" in verdicts(comparisons).values()


def print_comparison(console: Console, comparisons: list[Comparison]) -> None:
    """Print the verdict of each op, then every row."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for op, verdict in verdicts(comparisons).items():
        counts = {name: sum(c.op == op and c.verdict == name for c in comparisons) for name in VERDICTS}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        console.print(f"[bold]{escape(op)}[/bold]: {_styled(verdict)} (all rows: {shown})", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("provider", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("95% interval", justify="right", no_wrap=True)
    table.add_column("by", overflow="fold")
    previous = ""
    for c in comparisons:
        case = f"{c.op}: {c.case}"
        bounds = "" if c.low is None or c.high is None else f"{c.low:+.1%} to {c.high:+.1%}"
        table.add_row(
            "" if case == previous else escape(case),
            escape(c.provider),
            _styled(c.verdict),
            "" if c.change is None else f"{c.change:+.1%}",
            bounds,
            escape(c.by),
        )
        previous = case
    console.print(table)
    for note in dict.fromkeys(f"{c.case}, {c.provider}: {c.note}" for c in comparisons if c.note):
        console.print(note, markup=False, highlight=False)


def _styled(verdict: str) -> str:
    style = STYLES.get(verdict)
    return verdict if style is None else f"[{style}]{verdict}[/]"


def _baselines(run: Run) -> dict[tuple[str, str, str], Row]:
    """By case: the row of the provider that ratios refer to."""
    return {_case(row): row for row in run.rows if row.provider == row.baseline and row.status in MEASURED}


def _torch_version(run: Run) -> Any:
    return (run.environment.get("packages") or {}).get("torch")


def _compare_row(judge: _Judge, new: Row, threshold: float, yardstick: bool) -> Comparison:
    old = judge.earlier.get(_place(new))
    remark = "" if new.status == "ok" else f"{new.status}: {new.note}" if new.note else new.status
    if old is None:
        return _describe(new, "new", note=remark)
    if old.status not in MEASURED and new.status not in MEASURED:
        return _describe(new, "same" if old.status == new.status else "unclear", note=remark)
    if old.status not in MEASURED:
        return _describe(new, "new", note=_join(f"was {old.status}", remark))
    if new.status not in MEASURED:
        gone = new.status == "unavailable" and is_ours(new.provider)
        return _describe(new, "broken" if gone or new.status in FAILED else "missing", note=remark)

    found = judge.change(new)
    if found is None:
        return _describe(new, "unclear", note=_join(remark, "no interval recorded"))
    change, by = found
    verdict = change.verdict(threshold)
    if yardstick and verdict == "slower":
        verdict, remark = "unclear", _join(remark, "the baseline: no change of ours")
    return _describe(new, verdict, change, by, remark)


def _describe(
    row: Row, verdict: str, change: Change | None = None, by: str = "", note: str = ""
) -> Comparison:
    value, low, high = (None, None, None) if change is None else map(math.expm1, dataclasses.astuple(change))
    return Comparison(row.key, row.op, verdict, value, low, high, by, note, case_name(row), row.provider)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _change(old: Row | None, new: Row | None) -> Change | None:
    """Change of the 20th percentile; None where a row has no interval."""
    logs = [
        Change(math.log(row.p20_ms), math.log(row.p20_low_ms), math.log(row.p20_high_ms))
        for row in (new, old)
        if row is not None and row.status in MEASURED and row.p20_ms and row.p20_low_ms and row.p20_high_ms
    ]
    return logs[0].over(logs[1]) if len(logs) == 2 else None
