"""Compare two result files, row by row and by interval: noise is neither a gain nor a loss.

Noise only adds time, so the 20th percentiles are compared, which it disturbs least. Where both files hold the same
baseline, the time and its ratio to the baseline's are looked at: the one with the narrower interval decides, and the
other's value must not contradict it. So a machine that is slower today, which slows the baseline as well, is no slow
kernel, and a baseline that had a bad day does not make us faster. Without a baseline, times decide alone,
which is fair only on one machine in one state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .display import FAILED, baseline_of, by_case, case_name, is_ours
from .records import MEASURED, Row, Run

if TYPE_CHECKING:
    from rich.console import Console

#: A value and its bounds.
Measured = tuple[float | None, float | None, float | None]

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
            within, ``unclear`` when it crosses; ``broken`` when a row that had a speed failed; ``new`` and
            ``missing`` when one file has no speed to compare. Rows without a speed in both are the ``same`` when
            their statuses are.
        change: relative change of time, positive for slower; None where nothing could be compared.
        low, high: bounds of ``change``; None where a file has no intervals.
        by: what was compared: ``time``, or ``ratio to`` a baseline.
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


def compare(a: Run, b: Run, threshold: float = 0.03, force: bool = False) -> list[Comparison]:
    """Compare ``b`` with the earlier ``a``: a comparison for every row of ``b``, then for those only in ``a``.

    Args:
        a, b: two runs of the same cases.
        threshold: relative changes of time up to this are called the same.
        force: compare runs of different devices, too.

    Raises:
        ValueError: the runs are of different devices, or ``threshold`` is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"compare: threshold is {threshold}; expected 0 or more")
    before, after = device_of(a), device_of(b)
    if before != after and not force:
        raise ValueError(f"compare: device is {after}; expected {before}, as in the earlier run, or force")
    yardsticks = {row.key for case in by_case(b.rows) for row in case if row.provider == baseline_of(case)}
    if len(yardsticks) == len(b.rows):
        yardsticks = set()  # there is nothing else to judge
    earlier = {row.key: row for row in a.rows}
    bases = _baselines(a), _baselines(b)
    found = [
        _compare_row(earlier.pop(row.key, None), row, bases, threshold, row.key in yardsticks)
        for row in b.rows
    ]
    return found + [_describe(row, "missing", note="not in the later run") for row in earlier.values()]


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
    """Whether anything broke, or one of ours became slower; where none is ours, any."""
    comparisons = list(comparisons)
    broken = any(comparison.verdict == "broken" for comparison in comparisons)
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


def _baselines(run: Run) -> dict[str, Row]:
    """By case: the row of the provider that ratios refer to."""
    return {row.case_key: row for row in run.rows if row.provider == row.baseline and row.status in MEASURED}


def _compare_row(
    old: Row | None, new: Row, bases: tuple[dict[str, Row], dict[str, Row]], threshold: float, yardstick: bool
) -> Comparison:
    remark = "" if new.status == "ok" else f"{new.status}: {new.note}" if new.note else new.status
    if old is None:
        return _describe(new, "new", note=remark)
    if old.status not in MEASURED and new.status not in MEASURED:
        return _describe(new, "same" if old.status == new.status else "unclear", note=remark)
    if old.status not in MEASURED:
        return _describe(new, "new", note=_join(f"was {old.status}", remark))
    if new.status not in MEASURED:
        return _describe(new, "broken" if new.status in FAILED else "missing", note=remark)

    ratios = (old.ratio, old.ratio_low, old.ratio_high), (new.ratio, new.ratio_low, new.ratio_high)
    by = "time"
    change, low, high = _change(
        (old.median_ms, old.low_ms, old.high_ms), (new.median_ms, new.low_ms, new.high_ms)
    )
    if old.baseline == new.baseline != new.provider and all(ratios[0] + ratios[1]):
        # A ratio is the baseline's time over this one's: times have changed as its inverse has.
        by = f"ratio to {new.baseline}"
        change, low, high = _change(ratios[1], ratios[0])
    verdict = _verdict(low, high, threshold)
    time = _undisturbed(old, new)
    if time is not None:
        (change, low, high), by = time, "time"
        verdict = _verdict(low, high, threshold)
        yard = _undisturbed(bases[0].get(new.case_key), bases[1].get(new.case_key))
        if yard is not None and new.provider != new.baseline == old.baseline:
            by = f"time, and ratio to {new.baseline}"
            sharper, other = sorted((time, _quotient(time, yard)), key=lambda bounds: bounds[2] - bounds[1])
            change, low, high = sharper
            verdict = _unless_contradicted(_verdict(low, high, threshold), other[0], threshold)
    if yardstick and verdict == "slower":
        return _describe(
            new, "unclear", change, low, high, by, _join(remark, "the baseline: no change of ours")
        )
    unbounded = "no interval recorded" if low is None else ""
    return _describe(new, verdict, change, low, high, by, _join(remark, unbounded))


def _describe(
    row: Row,
    verdict: str,
    change: float | None = None,
    low: float | None = None,
    high: float | None = None,
    by: str = "",
    note: str = "",
) -> Comparison:
    return Comparison(
        row.key, row.op, verdict, change, low, high, by, note, case=case_name(row), provider=row.provider
    )


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _change(a: Measured, b: Measured) -> Measured:
    """``b / a - 1`` with its bounds: the extremes of numerator and denominator."""
    change = b[0] / a[0] - 1 if a[0] and b[0] else None
    low = b[1] / a[2] - 1 if b[1] and a[2] else None
    high = b[2] / a[1] - 1 if b[2] and a[1] else None
    return (change, low, high) if None not in (change, low, high) else (change, None, None)


def _undisturbed(old: Row | None, new: Row | None) -> tuple[float, float, float] | None:
    """Change of the 20th percentile with its bounds, where both rows have them."""
    if old is None or new is None or not (old.p20_ms and old.p20_low_ms and old.p20_high_ms):
        return None
    if not (new.p20_ms and new.p20_low_ms and new.p20_high_ms):
        return None
    return _quotient(
        (new.p20_ms - 1, new.p20_low_ms - 1, new.p20_high_ms - 1),
        (old.p20_ms - 1, old.p20_low_ms - 1, old.p20_high_ms - 1),
    )


def _quotient(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """``(1 + a) / (1 + b) - 1`` with bounds: independent errors, added as squares on a logarithmic scale."""
    value, low, high = (math.log1p(x) for x in a)
    other, other_low, other_high = (math.log1p(x) for x in b)
    change = value - other
    down, up = math.hypot(value - low, other_high - other), math.hypot(high - value, other - other_low)
    return math.expm1(change), math.expm1(change - down), math.expm1(change + up)


def _unless_contradicted(verdict: str, other: float, threshold: float) -> str:
    """A change must show in the other measure's value, too."""
    contradicted = (verdict == "slower" and other <= threshold) or (
        verdict == "faster" and other >= -threshold
    )
    return "unclear" if contradicted else verdict


def _verdict(low: float | None, high: float | None, threshold: float) -> str:
    if low is None or high is None:
        return "unclear"
    if low > threshold:
        return "slower"
    if high < -threshold:
        return "faster"
    return "same" if -threshold <= low and high <= threshold else "unclear"
