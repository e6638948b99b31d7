"""What a person reads of a run: tables on a console, and a folder with a CSV, a picture and a page.

The page carries its pictures, style and numbers inside and asks nothing of the network, so that it can be
mailed or archived as one file. It takes rows of every kind: what was not measured says so and why.
"""

from __future__ import annotations

import base64
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superfine._files import atomic_write
from superfine.env import flat_environment

from . import charts
from .compare import device_of
from .display import (
    FAILED,
    baseline_of,
    best_of_ours,
    by_case,
    by_op,
    case_name,
    interval,
    is_ours,
    number,
    rate,
    size,
    times,
)
from .records import Ceilings, Row, Run, finite, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(run: Run, folder: Path) -> list[Path]:
    """Write ``bench.csv``, ``bench.png`` and ``report.html`` into ``folder``; return their paths.

    Raises:
        ImportError: matplotlib or jinja2 is missing; ``bench.csv`` is there nevertheless.
    """
    table, picture, page = (folder / name for name in ("bench.csv", "bench.png", "report.html"))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(table, run.rows)
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"report: {error.name} is missing; install it with pip install 'superfine[bench]'"
        ) from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_context(run))
    with atomic_write(picture) as temporary:
        temporary.write_bytes(charts.overview(run))
    with atomic_write(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return [table, picture, page]


def summary(rows: Sequence[Row]) -> str:
    """One line on an op: the best of ours in each case against the case's baseline."""
    ratios: dict[str, float] = {}
    baselines: dict[str, None] = {}
    cases = by_case(rows)
    for case in cases:
        best = best_of_ours(case)
        if best is not None and best.ratio:
            ratios[case_name(best)] = best.ratio
            baselines[baseline_of(case)] = None
    faults = [
        f"{count} {status}"
        for status, count in _statuses(rows).items()
        if status not in ("ok", "unavailable")
    ]
    counted = f"; rows: {', '.join(faults)}" if faults else ""
    if not ratios:
        return f"nothing of ours to compare in {_plural(len(cases), 'case')}{counted}"
    low, high = min(ratios.values()), max(ratios.values())
    spread = times(low) if low == high else f"{times(low)} to {times(high)}"
    middle = f", median {times(statistics.median(ratios.values()))}" if len(ratios) > 2 else ""
    return (
        f"{spread} as fast as {' / '.join(baselines)}{middle}; best: {max(ratios, key=ratios.__getitem__)} "
        f"({len(ratios)} of {_plural(len(cases), 'case')}{counted})"
    )


def print_tables(console: Console, rows: Iterable[Row]) -> None:
    """Print a table for each case; columns that no row fills are left out."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for case in by_case(rows):
        first = case[0]
        caches = f", {first.cache} caches" if first.cache else ""
        title = f"{escape(case_name(first))} on {first.device}{caches}: {escape(first.work)}"
        console.print(f"\n[bold]{first.op}[/bold]  {title}", highlight=False)
        columns = {
            "median ms": [number(row.median_ms) for row in case],
            # On a CPU both clocks are one.
            "wall ms": ["" if row.device == "cpu" else number(row.wall_ms) for row in case],
            "ratio": [times(row.ratio) for row in case],
            "95%": [interval(row.ratio_low, row.ratio_high) for row in case],
            "rate": [rate(row) for row in case],
            "ceiling": [_percent(row) for row in case],
            "peak": [size(row.peak_memory) for row in case],
        }
        columns = {name: values for name, values in columns.items() if any(values)}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("provider", overflow="fold", min_width=12)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("check", no_wrap=True)
        absent = [row.provider for row in case if row.status == "unavailable"]
        for index, row in enumerate(case):
            if row.provider not in absent:
                table.add_row(
                    escape(row.provider), *(values[index] for values in columns.values()), row.status
                )
        console.print(table)
        if absent:
            console.print(f"not here: {', '.join(absent)}", markup=False, highlight=False)
        for row in case:
            if row.note and row.provider not in absent:
                console.print(f"{row.provider}: {row.note}", markup=False, highlight=False)
            if row.split:
                parts = ", ".join(f"{name} {number(value)} ms" for name, value in row.split.items())
                console.print(f"{row.provider}: {parts}", markup=False, highlight=False)


def _percent(row: Row) -> str:
    return "" if row.percent_of_ceiling is None else f"{row.percent_of_ceiling:.0f}%"


def _statuses(rows: Iterable[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    return counts


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _context(run: Run) -> dict[str, Any]:
    """What the page's template shows."""
    shades = charts.colours(run.rows)
    sections = {name: content for name, content in run.environment.items() if isinstance(content, dict)}
    loose = {name: content for name, content in run.environment.items() if not isinstance(content, dict)}
    return {
        "device": device_of(run),
        "started": run.environment.get("started"),
        "summaries": [(op, summary(rows)) for op, rows in by_op(run.rows).items()],
        "ops": [_op(op, rows, shades) for op, rows in by_op(run.rows).items()],
        "roofline": _roofline(run, shades),
        "ceilings": _ceilings(run.ceilings),
        "environment": flat_environment(({"run": loose} if loose else {}) | sections),
        "broken": run.broken,
        "columns": list(COLUMNS),
        "fields": [item.name for item in dataclasses.fields(Row)],
        "raw": [finite(dataclasses.asdict(row)) for row in run.rows],
    }


def _op(op: str, rows: list[Row], shades: dict[str, str]) -> dict[str, Any]:
    def bars(figure: Figure, theme: charts.Theme) -> None:
        charts.bars(figure.subplots(), op, rows, shades, theme)

    def split(figure: Figure, theme: charts.Theme) -> None:
        charts.split(figure.subplots(), op, rows, theme)

    has_parts = any(row.split for row in rows)
    return {
        "name": op,
        "summary": summary(rows),
        "bars": _picture(charts.bars_height(rows), bars),
        "split": _picture(charts.split_height(rows), split) if has_parts else None,
        "cases": [
            {
                "name": f"{case_name(case[0])}, {case[0].device}",
                "work": case[0].work,
                "cache": case[0].cache,
                "rows": [_cells(row, baseline_of(case)) for row in case],
            }
            for case in by_case(rows)
        ],
    }


#: The columns of an op's table on the page, and what a row shows there.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "check": lambda row: row.status,
    "median ms": lambda row: number(row.median_ms),
    "95% of it": lambda row: interval(row.low_ms, row.high_ms),
    "p20-p80": lambda row: interval(row.p20_ms, row.p80_ms),
    "wall ms": lambda row: number(row.wall_ms),
    "ratio": lambda row: times(row.ratio),
    "95% of ratio": lambda row: interval(row.ratio_low, row.ratio_high),
    "GB/s": lambda row: number(row.gb_per_s),
    "TFLOP/s": lambda row: number(row.tflop_per_s),
    "of ceiling": lambda row: _percent(row),
    "peak memory": lambda row: size(row.peak_memory),
    "turns x calls": lambda row: f"{row.turns} x {row.calls / row.turns:.0f}" if row.turns else "",
    "MHz": lambda row: number(row.clock_mhz),
    "error / tolerance": lambda row: number(row.error),
}


def _cells(row: Row, baseline: str) -> dict[str, Any]:
    kind = "ours" if is_ours(row.provider) else "baseline" if row.provider == baseline else ""
    mark = "fault" if row.status in FAILED else "doubt" if row.status == "suspect" else ""
    return {
        "provider": row.provider,
        "kind": f"{kind} {mark}".strip(),
        "cells": [show(row) for show in COLUMNS.values()],
        "note": row.note,
        "split": ", ".join(f"{name} {number(value)} ms" for name, value in row.split.items()),
    }


def _roofline(run: Run, shades: dict[str, str]) -> dict[str, str] | None:
    def draw(figure: Figure, theme: charts.Theme) -> None:
        charts.roofline(figure.subplots(), run, shades, theme)

    return _picture(charts.ROOFLINE_HEIGHT, draw) if charts.roofline_rows(run) else None


def _picture(height: float, draw: Callable[[Figure, charts.Theme], None]) -> dict[str, str]:
    """The picture on light and on dark paper, in base64."""

    def on(theme: charts.Theme) -> str:
        return base64.b64encode(charts.png(height, lambda figure: draw(figure, theme), theme)).decode("ascii")

    return {"light": on(charts.LIGHT), "dark": on(charts.DARK)}


def _ceilings(ceilings: Ceilings | None) -> list[tuple[str, str]]:
    if ceilings is None:
        return []
    shown = [
        (f"{traffic} stream", ", ".join(f"{number(rate)} GB/s at {size(count)}" for count, rate in sizes))
        for traffic, sizes in ceilings.rates.items()
    ]
    shown += [(f"{name} matrix product", f"{number(rate)} TFLOP/s") for name, rate in ceilings.gemm.items()]
    if ceilings.launch_us is not None:
        shown.append(("least time of a call", f"{number(ceilings.launch_us)} us"))
    return shown
