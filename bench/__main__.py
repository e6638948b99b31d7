"""Command line of the benchmarks: ``python -m superfine_bench``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from superfine._files import atomic_write
from superfine.env import environment

from . import OPS, Row, Settings, all_cases, measure_ceilings
from .harness import QUICK
from .isolate import measure_alone


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; return 0 when every provider that ran gave right results."""
    parser = argparse.ArgumentParser(prog="superfine_bench", description="Time the ops beside torch's.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no torch.compile")
    parser.add_argument("--only", metavar="OP", help=f"one op: {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.jsonl (default: none)")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # a log has no width of its own
    try:
        cases = all_cases(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; expected a machine where torch finds a CUDA device")
    device = torch.device(options.device)
    settings = QUICK if options.quick else Settings()
    cases = [case for case in cases if case.in_quick or not settings.quick]

    results = Results(options.out)
    results.add("environment", environment() | {"device": str(device), "quick": options.quick})
    ceilings = measure_ceilings(device)
    results.add("ceilings", asdict(ceilings))
    _print_ceilings(console, ceilings.rates)
    rows: list[Row] = []
    try:
        for index, case in enumerate(cases, 1):
            if console.is_terminal:  # a line, no spinner: a spinner's thread would run beside what is timed
                print(f"{index}/{len(cases)} {case.key} ...", flush=True)
            measured = measure_alone(case, device, settings, ceilings)
            for row in measured:
                results.add("row", asdict(row))
            rows += measured
            _print_rows(console, measured)
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured before is kept.")
        return 130
    if results.path is not None:
        console.print(f"Results: {results.path}")
    wrong = [row for row in rows if row.status in ("wrong", "error")]
    for row in wrong:
        print(f"{row.op}/{row.case}/{row.dtype}: {row.provider} is {row.status}: {row.note}", file=sys.stderr)
    return 1 if wrong else 0


class Results:
    """The lines of ``bench.jsonl``; the file is whole after every :meth:`add`."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "bench.jsonl"
        self.lines: list[str] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """Append one record and bring the file up to date."""
        self.lines.append(json.dumps({"kind": kind, **content}))
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                temporary.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def _print_ceilings(console: Console, rates: dict[str, list[tuple[int, float]]]) -> None:
    for traffic, measured in rates.items():
        shown = ", ".join(f"{rate:.1f} GB/s at {size / 2**20:.0f} MiB" for size, rate in measured)
        console.print(f"Measured ceiling, {traffic}: {shown or 'not measured'}", highlight=False)


def _print_rows(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    title = f"{escape(first.case)}  {first.dtype}, {first.device}: {escape(first.work)}"
    console.print(f"\n[bold]{first.op}[/bold]  {title}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    for name in ("median ms", "p20-p80 ms", "x first", "GB/s", "% of ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("check", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row.provider),
            _number(row.median_ms, ".4g"),
            "" if row.p20_ms is None else f"{row.p20_ms:.4g}-{row.p80_ms:.4g}",
            _number(row.ratio, ".2f"),
            _number(row.gb_per_s, ".1f"),
            _number(row.percent_of_ceiling, ".0f"),
            row.status,
        )
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.provider}: {row.note}", markup=False, highlight=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
