"""The measured tables of README and docs, from ``bench/results/*/bench.jsonl`` and ``convergence.jsonl``.

    python -m superfine_bench.tables [--check]

rewrites what lies between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``. NAME is a folder of
``bench/results``, for the table of that machine, ``ratios``, for one line per op and machine, or ``convergence``, for
where optimizers end.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superfine._files import atomic_write

from . import convergence
from .compare import device_of
from .display import (
    baseline_of,
    best_of_ours,
    by_case,
    by_op,
    case_name,
    does_the_case,
    interval,
    number,
    times,
)
from .records import FILE, MEASURED, Row, Run, read

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"<!-- bench:(?P<name>[\w.-]+) -->\n(?P<text>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)

#: A file of results of training: its path, environment and results.
Trained = tuple[Path, dict[str, Any], list[convergence.Result]]

OP_NAMES = {
    "adamw": "AdamW step",
    "lamb": "LAMB step",
    "cross_entropy": "cross-entropy, forward + backward",
    "linear_cross_entropy": "linear + cross-entropy, forward + backward",
    "bce_with_logits": "binary cross-entropy, forward + backward",
    "mse": "mean squared error, forward + backward",
    "gelu": "GELU, forward + backward",
    "swiglu": "SwiGLU, forward + backward",
    "geglu": "GEGLU, forward + backward",
    "rows_linear": "linear layer, few rows train, forward + backward",
    "cols_linear": "linear layer, few columns train, forward + backward",
    "rows_embedding": "embedding, few rows train, forward + backward + step",
    "layer_norm": "layer norm, forward + backward",
    "rms_norm": "RMS norm, forward + backward",
    "train_step": "whole training step",
    "fused_modules": "forward + backward with fused modules",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables; with ``--check`` only name the files that differ, and return 1 if one does."""
    parser = argparse.ArgumentParser(prog="superfine_bench.tables", description="Tables of README and docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file differs")
    options = parser.parse_args(arguments)
    try:
        stale = outdated(ROOT)
    except ValueError as error:
        parser.error(str(error))
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'differs from bench/results' if options.check else 'written'}")
        if not options.check:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


def outdated(root: Path) -> dict[Path, str]:
    """README and docs whose tables differ from the results in ``root/bench/results``, with the text they need.

    Raises:
        ValueError: a region has a name that no results have, or is not closed.
    """
    runs = {path.parent.name: read(path) for path in sorted(root.glob(f"bench/results/*/{FILE}"))}
    trained = [
        (path, *convergence.read(path)) for path in sorted(root.glob(f"bench/results/*/{convergence.FILE}"))
    ]
    found = {}
    for path in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            up_to_date = _replace(path, text, runs, trained, root)
            if up_to_date != text:
                found[path] = up_to_date
    return found


def _replace(path: Path, text: str, runs: dict[str, Run], trained: Sequence[Trained], root: Path) -> str:
    opened = re.findall(r"<!-- bench:([^ ]*) -->", text)
    closed = [region["name"] for region in REGION.finditer(text)]
    if opened != closed or text.count("<!-- /bench:") != len(closed):
        raise ValueError(f"tables: {path.name} opens {opened} and closes {closed}; expected the same regions")

    def region(found: re.Match[str]) -> str:
        name = found["name"]
        if name == "ratios":
            content = ratios_table(runs)
        elif name == "convergence" and trained:
            content = "\n\n".join(
                f"{convergence.markdown(environment, results)}\n\n{_origin(Run(environment), file, path)}"
                for file, environment, results in trained
            )
        elif name in runs:
            file = root / "bench" / "results" / name / FILE
            content = f"{measured_table(runs[name])}\n\n{_origin(runs[name], file, path)}"
        else:
            expected = ", ".join(["ratios", *["convergence"] * bool(trained), *runs])
            raise ValueError(f"tables: {path.name} has region {name!r}; expected one of {expected}")
        return f"<!-- bench:{name} -->\n{content}\n<!-- /bench:{name} -->"

    return REGION.sub(region, text)


def measured_table(run: Run) -> str:
    """Each of our providers beside the baseline of its case."""
    lines = ["| op | case | baseline | Superfine | ratio |", "|---|---|---|---|---|"]
    for case in by_case(run.rows):
        baseline = baseline_of(case)
        first = next((row for row in case if row.provider == baseline), None)
        for row in case:
            if not does_the_case(row.provider):
                continue
            variant = row.provider.removeprefix("superfine")  # such as ", in place"
            cells = [
                OP_NAMES.get(row.op, row.op) + variant,
                case_name(row),
                f"{baseline}: {_time(first)}",
                _time(row),
                _ratio(row),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    notes = [
        "Times are medians over all calls. A ratio is the median over turns of the baseline's time by ours in a turn",
        "(with its 95% interval): it need not be the quotient of the times.",
    ]
    shown = [row for row in run.rows if does_the_case(row.provider)]
    if any(_unclear(row) for row in shown):
        notes.append("Unclear: the interval of the ratio holds 1.")
    if any(row.status == "suspect" for row in shown):
        notes.append("\\* suspect: faster than the ceiling measured on this machine, so not to be relied on.")
    return "\n".join([*lines, "", *notes])


def ratios_table(runs: dict[str, Run]) -> str:
    """The best of ours against the baseline, over the cases of an op where it is clear which is faster."""
    lines = ["| op | measured on | cases | ratio | to |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        for op, rows in by_op(run.rows).items():
            cases = [(baseline_of(case), best_of_ours(case)) for case in by_case(rows)]
            best = [row for _, row in cases if row is not None]
            if best:
                baselines = " / ".join(dict.fromkeys(name for name, row in cases if row is not None))
                lines.append(f"| `{op}` | {name} | {len(best)} | {_span(best)} | {baselines} |")
    return "\n".join(lines)


def _time(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{number(row.median_ms)} ms" if row.status in MEASURED and row.median_ms else row.status


def _unclear(row: Row) -> bool:
    """Whether the interval of the ratio leaves open which of both is faster."""
    return row.ratio_low is not None and row.ratio_high is not None and row.ratio_low <= 1 <= row.ratio_high


def _span(rows: Sequence[Row]) -> str:
    ratios = [row.ratio for row in rows if row.ratio is not None and not _unclear(row)]
    low, high = (times(min(ratios)), times(max(ratios))) if ratios else ("", "")
    unclear = len(rows) - len(ratios)
    span = low if low == high else f"{low} to {high}"
    return ", ".join(filter(None, [span, f"{unclear} unclear" if unclear else ""]))


def _ratio(row: Row) -> str:
    if row.ratio is None or row.status not in MEASURED:
        return ""
    bounds = interval(row.ratio_low, row.ratio_high)
    ratio = "unclear" if _unclear(row) else times(row.ratio)
    return ratio + (f" ({bounds})" if bounds else "") + (" \\*" if row.status == "suspect" else "")


def _origin(run: Run, file: Path, page: Path) -> str:
    """Where and with what the run in `file` was measured, with a link from `page`."""
    environment = run.environment
    torch = (environment.get("packages") or {}).get("torch")
    git = environment.get("git") or {}
    commit = (
        f"commit `{git['commit'][:7]}`" + (" with changes" if git.get("modified") else "")
        if git.get("commit")
        else ""
    )
    kind = "quick run" if (environment.get("settings") or {}).get("quick") else "run"
    where = ", ".join(filter(None, [f"One {kind} on {device_of(run)}", torch and f"torch {torch}", commit]))
    return f"{where}: [the file]({os.path.relpath(file, page.parent)})."


if __name__ == "__main__":
    sys.exit(main())
