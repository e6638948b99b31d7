"""A run of the suite: the environment, the ceilings, every case; results on disk after each of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from superfine.env import environment

from . import Case, Ceilings, Row, Settings, all_cases, records
from .compare import device_of
from .display import arithmetic_bound, is_ours
from .harness import providers_of, with_rates
from .isolate import ceilings_alone, measure_alone

CEILING_SECONDS = {True: 15.0, False: 30.0}  # in quick runs, in others: about twice what it takes

#: Rows that a resumed run does not measure again; errors and time-outs get another chance, and so does what was
#: unavailable if a library to compare with has been installed since.
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
    target = find_device(device)
    cases = [case for case in all_cases(only, target.type) if case.in_quick or not settings.quick]
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
            ceilings = done.ceilings = ceilings_alone(
                target, CEILING_SECONDS[settings.quick], lambda text: _say(console, text)
            )
            if file is not None:
                records.append(file, "ceilings", asdict(ceilings))
        print_ceilings(console, ceilings)
        for index, case in enumerate(cases, 1):
            rows = _finished(done, case, target, settings)
            if rows is None:
                _say(console, f"{index}/{len(cases)} {case.key}")
                rows = measure_alone(case, target, settings, ceilings)
                _save(file, done, rows)
                better = recheck_ceilings(rows, case, target, ceilings, settings.quick)
                if better != ceilings:
                    ceilings = done.ceilings = better
                    if file is not None:
                        records.append(file, "ceilings", asdict(ceilings))
                    _save(file, done, _judged_again(done.rows, cases, ceilings))
                    rows = [row for row in done.rows if row.case_key == rows[0].case_key]
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
        if row.status in ("wrong", "error", "timeout") and is_ours(row.provider)
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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {name}; expected auto, cpu or cuda")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"bench: device is {name}; expected one that torch finds here ({_why_no_gpu()})")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f"bench: device is {name}; expected cuda:N with N below {count}, as many as are here"
        )
    return torch.device("cuda", index)


def _why_no_gpu() -> str:
    """What torch has against the driver, or against itself."""
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return "it says that there is none"


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
    if found.environment:
        require_same(file, found.environment, described)
        before, peers = found.environment.get("peers") or {}, described["peers"]
        if not before.items() <= peers.items():
            raise ValueError(f"bench: {file} was measured with peers {before}; expected {peers}, as here")
        if before == peers:
            return found
        found.rows = [row for row in found.rows if row.status != "unavailable"]
    records.append(file, "environment", described)
    found.environment = described
    return found


def require_same(file: Path, found: dict[str, Any], described: dict[str, Any]) -> None:
    """ValueError unless results in `file`, of the environment `found`, may stand beside those of this one."""
    here = _decisive(described)
    for name, value in _decisive(found).items():
        if value != here[name]:
            raise ValueError(
                f"bench: {file} was measured with {name} {value}; expected {here[name]}, as here"
            )


def _decisive(environment: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for rows to stand in one file."""
    return {
        "device": environment.get("device"),
        "processor or GPU": device_of(records.Run(environment=environment)),
        "commit": (environment.get("git") or {}).get("commit"),
        **{name: environment.get(name) for name in ("packages", "native", "settings")},
    }


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


def recheck_ceilings(
    rows: Sequence[Row], case: Case, device: torch.device, ceilings: Ceilings, quick: bool = False
) -> Ceilings:
    """Measure once more what a row exceeds: a machine that others share may have been slow the first time.

    Alone, one stream has several times the share that it had among all.
    """
    exceeded = [row for row in rows if row.status == "suspect"]
    for only in dict.fromkeys(case.gemm if arithmetic_bound(row) else case.traffic for row in exceeded):
        again = ceilings_alone(device, CEILING_SECONDS[quick], lambda text: None, only=only)
        ceilings = ceilings.or_better(again)
    return ceilings


def _judged_again(rows: Sequence[Row], cases: Sequence[Case], ceilings: Ceilings) -> list[Row]:
    """Those of the rows that the ceilings change."""
    by_key = {case.key: case for case in cases}
    found = []
    for row in rows:
        case = by_key.get(f"{row.op}/{row.case}/{row.dtype}")
        if case is not None and row.status in records.MEASURED:
            judged = with_rates(row, case, ceilings)
            found += [judged] if judged != row else []
    return found


def _save(file: Path | None, done: records.Run, rows: Sequence[Row]) -> None:
    done.add(rows)
    if file is not None:
        for row in rows:
            records.append_row(file, row)


def _say(console: Console, text: str) -> None:
    if console.is_terminal:  # a line, no spinner: a spinner's thread would run beside what is timed
        console.print(f"[dim]{text}[/dim]", highlight=False)


def _print_rows(console: Console, rows: Sequence[Row]) -> None:
    from .report import print_tables

    print_tables(console, rows)
