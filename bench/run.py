"""A run of the suite: the environment, the ceilings, every case; results on disk after each of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from superfine.env import environment

from . import Case, Ceilings, Row, Settings, all_cases, records
from .ceilings import measure_ceilings
from .harness import SUSPECT_PERCENT, providers_of
from .isolate import measure_alone

CEILING_SECONDS = {True: 15.0, False: 30.0}  # in quick runs, in others: about twice what it takes

#: Rows that a resumed run does not measure again; errors and time-outs get another chance.
DONE = ("ok", "suspect", "wrong", "unavailable", "skipped", "out of memory")


def run(
    *,
    only: str | None = None,
    device: str = "auto",
    settings: Settings | None = None,
    out: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> records.Run:
    """Measure the cases of one op or of all; print tables, write ``out/bench.jsonl`` and the report beside it.

    Ctrl-C raises KeyboardInterrupt after the report of what is there has been written.

    Raises:
        ValueError: no such op, no such device, results of another machine to be resumed.
        FileExistsError: ``out`` holds results already, and ``resume`` is not set.
    """
    settings = settings or Settings()
    console = console or Console()
    cases = [case for case in all_cases(only) if case.in_quick or not settings.quick]
    target = find_device(device)
    described = environment() | {
        "device": str(target),
        "settings": asdict(settings),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    done = _begin(out, described, resume)
    file = None if out is None else out / records.FILE
    try:
        ceilings = done.ceilings
        if ceilings is None:
            ceilings = done.ceilings = measure_ceilings(
                target, CEILING_SECONDS[settings.quick], say=lambda text: _say(console, text)
            )
            if file is not None:
                records.append(file, "ceilings", asdict(ceilings))
        print_ceilings(console, ceilings)
        for index, case in enumerate(cases, 1):
            rows = _finished(done, case, target, settings)
            if rows is None:
                _say(console, f"{index}/{len(cases)} {case.key}")
                rows = measure_alone(case, target, settings, ceilings)
                rows = [recheck_ceiling(row, case, target) for row in rows]
                done.add(rows)
                if file is not None:
                    for row in rows:
                        records.append_row(file, row)
            _print_rows(console, rows)
    finally:
        if out is not None and done.rows:
            from . import report

            for path in [file, *report.write(done, out)]:
                console.print(f"    {path}", markup=False, highlight=False, soft_wrap=True)
    return done


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for every provider of ours that was wrong or failed; peers' faults are their own."""
    return [
        f"{row.key} is {row.status}: {row.note}"
        for row in rows
        if row.status in ("wrong", "error", "timeout") and row.provider.startswith("superfine")
    ]


def print_ceilings(console: Console, ceilings: Ceilings) -> None:
    """Print what this machine reaches."""
    for traffic, measured in ceilings.rates.items():
        shown = ", ".join(f"{rate:.1f} at {_size(size)}" for size, rate in measured)
        console.print(f"Ceiling, {traffic}, GB/s: {shown or 'not measured'}", highlight=False)
    if ceilings.gemm:
        shown = ", ".join(f"{name} {rate:.3g}" for name, rate in ceilings.gemm.items())
        console.print(f"Ceiling, matrix product, TFLOP/s: {shown}", highlight=False)
    if ceilings.launch_us is not None:
        console.print(f"Least time of a call: {ceilings.launch_us:.2f} us", highlight=False)


def _size(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size < 2**30 else f"{size / 2**30:.3g} GiB"


def find_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: there is none of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"bench: device is {name!r}; expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        raise ValueError(f"bench: device is {name}; expected one that torch finds here ({why})")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {name}; expected auto, cpu or cuda")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _begin(out: Path | None, described: dict[str, Any], resume: bool) -> records.Run:
    """An empty run, or the one in `out` to go on with; its environment is on disk."""
    if out is None:
        return records.Run(environment=described)
    file = out / records.FILE
    if not file.exists():
        records.append(file, "environment", described)
        return records.Run(environment=described)
    if not resume:
        raise FileExistsError(f"bench: {file} exists; expected a new folder, or --resume to go on with it")
    found = records.read(file)
    for name in ("device", "packages", "native"):
        if found.environment and found.environment.get(name) != described[name]:
            raise ValueError(
                f"bench: {file} was measured with {name} {found.environment.get(name)}; "
                f"expected {described[name]}, as here"
            )
    if not found.environment:
        records.append(file, "environment", described)
        found.environment = described
    return found


def _finished(done: records.Run, case: Case, device: torch.device, settings: Settings) -> list[Row] | None:
    """The rows of a case that an earlier run finished, or None where something is missing."""
    rows = []
    for provider in providers_of(case, settings):
        blank = Row(case.op, case.name, case.dtype, case.work, provider.name, str(device), "")
        row = done.row(blank.key)
        if row is None or row.status not in DONE:
            return None
        rows.append(row)
    return rows


def recheck_ceiling(row: Row, case: Case, device: torch.device) -> Row:
    """A machine that others share may have been slow when its ceilings were measured: look once more."""
    if row.status != "suspect" or row.ceiling_gb_per_s is None or row.percent_of_ceiling is None:
        return row
    size = row.bytes if row.bytes and row.cache == "resident" else 2**40
    again = measure_ceilings(device, only=case.traffic).for_bytes(case.traffic, size)
    rate = max(again or 0.0, row.ceiling_gb_per_s)
    percent = row.percent_of_ceiling * row.ceiling_gb_per_s / rate
    fits = percent <= SUSPECT_PERCENT
    return replace(
        row,
        ceiling_gb_per_s=rate,
        percent_of_ceiling=percent,
        status="ok" if fits else row.status,
        note="" if fits else row.note,
    )


def _say(console: Console, text: str) -> None:
    if console.is_terminal:  # a line, no spinner: a spinner's thread would run beside what is timed
        console.print(f"[dim]{text}[/dim]", highlight=False)


def _print_rows(console: Console, rows: Sequence[Row]) -> None:
    from .report import print_tables

    print_tables(console, rows)
