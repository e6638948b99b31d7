"""A picture and a page of a run: ``curves.png`` and ``report.html`` from what it recorded.

The page carries its picture and style inside, so that it can be mailed or archived as one file. It is
written for runs that are finished, unfinished or were killed: what is missing is left out.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import atomic_write
from .env import environment, flat_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Event = dict[str, Any]

TRAIN, VALIDATION, NEUTRAL = "#1f6feb", "#d1502f", "#6b7280"
FEW_POINTS = 30  # more markers than this run into each other
# Everything else that is a number in a validation event is a metric.
NOT_METRICS = {"event", "step", "epoch", "loss", "seconds", "examples", "time"}
METRIC_NAMES = {
    "f1_macro": "macro F1", "mse": "MSE", "mae": "MAE", "pearson": "Pearson r", "spearman": "Spearman rho",
    "chrf": "chrF", "bleu": "BLEU", "f1": "F1",
}  # fmt: skip
PHASES = (("ms_forward", "forward + loss"), ("ms_backward", "backward"), ("ms_optimizer", "optimizer"))


@dataclass
class Run:
    """The contents of a run directory.

    Attributes:
        config: the resolved configuration; empty when there is no ``config.toml``.
        train, validation: events in order of their step, one for each step.
        test, baseline, original, summary: the last event of that name, or None; of `original` the scores are in
            its entries `base` and `tuned`.
        environment: as recorded by the run, or None.
        unreadable: how many lines of ``metrics.jsonl`` were no JSON object.
    """

    name: str
    config: dict[str, Any]
    train: list[Event]
    validation: list[Event]
    test: Event | None
    baseline: Event | None
    original: Event | None
    summary: Event | None
    environment: dict[str, Any] | None
    unreadable: int


def write_report(run_dir: str | Path) -> None:
    """Write ``curves.png`` and ``report.html`` into a run directory of ``superfine tune``.

    Raises:
        ValueError: there is no ``metrics.jsonl``, or ``config.toml`` is no TOML.
        ImportError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  before anything is written
    except ImportError as error:
        raise ImportError(
            f"write_report: {error.name} is missing; install it with pip install 'superfine[report]'"
        ) from error
    folder = Path(run_dir)
    run = read_run(folder)
    picture = draw_curves(run)
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    html = page.render(_context(run, picture))
    with atomic_write(folder / "curves.png") as temporary:
        temporary.write_bytes(picture)
    with atomic_write(folder / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")


def read_run(folder: Path) -> Run:
    """Read a run directory; a last line of ``metrics.jsonl`` that a kill cut short is left out."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"write_report: run_dir is {folder}; expected a folder that holds metrics.jsonl")
    events: list[Event] = []
    unreadable = 0
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.append(event)
        else:
            unreadable += 1

    def last(name: str) -> Event | None:
        return next((event for event in reversed(events) if event.get("event") == name), None)

    recorded = [event["environment"] for event in events if isinstance(event.get("environment"), dict)]
    return Run(
        name=folder.resolve().name,
        config=_read_config(folder / "config.toml"),
        train=_by_step(events, "train"),
        validation=_by_step(events, "validation"),
        test=last("test"),
        baseline=last("baseline"),
        original=last("original"),
        summary=last("summary"),
        environment=recorded[-1] if recorded else None,
        unreadable=unreadable,
    )


def _by_step(events: Iterable[Event], name: str) -> list[Event]:
    """Events of a kind, ordered by step; where a resumed run repeats a step, the later event counts."""
    found = {
        event["step"]: event
        for event in events
        if event.get("event") == name and isinstance(event.get("step"), int)
    }
    return [found[step] for step in sorted(found)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"write_report: {path.name} is {error}; expected TOML") from error


def _series(events: list[Event], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of ``key``."""
    points = [(event["step"], event[key]) for event in events if _is_finite(event.get(key))]
    return [step for step, _ in points], [value for _, value in points]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _metrics(events: Iterable[Event | None]) -> list[str]:
    """Names of the scalar metrics in these events, in order of appearance."""
    names = {
        key: None
        for event in events
        for key, value in (event or {}).items()
        if key not in NOT_METRICS and _is_finite(value)
    }
    return list(names)


def smooth(values: list[float], window: int) -> list[float]:
    """Exponential moving average over about ``window`` values, corrected for its start at zero."""
    keep = 1 - 1 / max(1, window)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def draw_curves(run: Run) -> bytes:
    """Draw losses, validation metrics, learning rate and gradient norm over the steps; returns a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "axes.edgecolor": "#c8ccd2",
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "font.size": 9,
        "grid.color": "#eceef1",
        "legend.frameon": False,
        "xtick.color": "#4b5563",
        "ytick.color": "#4b5563",
    }
    # Figure and canvas by hand rather than pyplot: no global state, no display, safe in threads.
    with rc_context(style):
        figure = Figure(figsize=(11, 6.4), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2).ravel()
        _draw_loss(panels[0], run)
        _draw_metrics(panels[1], run)
        _draw_line(panels[2], "Learning rate", *_series(run.train, "lr"))
        panels[2].yaxis.set_major_formatter("{x:.2g}")
        _draw_line(panels[3], "Gradient norm, before clipping", *_series(run.train, "grad_norm"))
        last_step = max((event["step"] for event in run.train + run.validation), default=1)
        for panel in panels:
            panel.set_xlabel("step")
            panel.set_xlim(0, max(1, last_step) * 1.02)
            panel.xaxis.get_major_locator().set_params(integer=True)
        picture = io.BytesIO()
        canvas.print_png(picture)
    return picture.getvalue()


def _draw_loss(panel: Axes, run: Run) -> None:
    panel.set_title("Loss")
    steps, losses = _series(run.train, "loss")
    # Raw values of single batches scatter: shown pale, under an average over 5% of the run.
    _plot(panel, steps, losses, color=TRAIN, alpha=0.22, linewidth=0.9, label="train, batches")
    averages = smooth(losses, max(5, len(losses) // 20))
    _plot(panel, steps, averages, color=TRAIN, linewidth=1.8, label="train, smoothed")
    _plot(panel, *_series(run.validation, "loss"), color=VALIDATION, label="validation")
    _legend_or_note(panel)


def _draw_metrics(panel: Axes, run: Run) -> None:
    names = _metrics(run.validation) or _metrics([run.test])
    panel.set_title("Validation " + (" and ".join(map(_metric_name, names[:2])) or "metric"))
    colors = (VALIDATION, TRAIN, NEUTRAL)
    for name, color in zip(names[:2], colors, strict=False):
        _plot(panel, *_series(run.validation, name), color=color, label=_metric_name(name))
    for event, style, label in ((run.test, "-.", "test"), (run.baseline, ":", "test, untouched base")):
        if names and event is not None and _is_finite(event.get(names[0])):
            panel.axhline(
                event[names[0]],
                color=NEUTRAL,
                linestyle=style,
                linewidth=1.3,
                label=f"{_metric_name(names[0])}, {label}",
            )
    _legend_or_note(panel)


def _draw_line(panel: Axes, title: str, steps: list[float], values: list[float]) -> None:
    panel.set_title(title)
    if steps:
        _plot(panel, steps, values, color=NEUTRAL, linewidth=1.3)
        panel.set_ylim(bottom=0)
    else:
        _legend_or_note(panel)


def _plot(panel: Axes, steps: list[float], values: list[float], **style: Any) -> None:
    """A line, with markers where its points are few: a line through a single point draws nothing."""
    if steps:
        panel.plot(steps, values, marker="o" if len(steps) <= FEW_POINTS else "", markersize=4, **style)


def _legend_or_note(panel: Axes) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)
    else:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", color=NEUTRAL)


def _metric_name(name: str) -> str:
    return METRIC_NAMES.get(name, name.replace("_", " "))


def _context(run: Run, picture: bytes) -> dict[str, Any]:
    """What the page's template shows."""
    return {
        "name": run.name,
        "picture": base64.b64encode(picture).decode("ascii"),
        "headlines": _headlines(run),
        "comparison": _comparison(run.baseline, run.test),
        "original": _comparison((run.original or {}).get("base"), (run.original or {}).get("tuned")),
        "validations": _validations(run),
        "confusion": _confusion(run.test),
        "phases": _phases(run.train),
        "summary": _scalars(run.summary),
        "config": _config_tables(run.config),
        "environment": flat_environment(run.environment or environment()),
        "environment_recorded": run.environment is not None,
        "unreadable": run.unreadable,
        "finished": run.test is not None,
    }


def _headlines(run: Run) -> list[tuple[str, str]]:
    """The few figures at the top of the page."""
    found: list[tuple[str, str]] = []
    for name in _metrics([run.test])[:2]:
        found.append((f"test {_metric_name(name)}", _show((run.test or {})[name])))
    if run.test and _is_finite(run.test.get("loss")):
        found.append(("test loss", _show(run.test["loss"])))
    total = sum(milliseconds for _, milliseconds, _ in _phases(run.train))
    if total:
        found.append(("per step", f"{total:.4g} ms"))
    peak = (run.summary or {}).get("peak_memory_bytes")
    if isinstance(peak, int):
        found.append(("peak memory of training", f"{peak / 1e6:,.0f} MB"))
    if run.train:
        found.append(("steps", str(run.train[-1]["step"])))
    return found


def _comparison(baseline: Event | None, tuned: Event | None) -> list[tuple[str, str, str, str]]:
    """Rows ``(metric, untouched base, tuned, change)``."""
    if tuned is None:
        return []
    base, rows = baseline or {}, []
    for name in ["loss", *_metrics([tuned])]:
        before, after = base.get(name), tuned.get(name)
        both = _is_finite(before) and _is_finite(after)
        change = f"{float(after) - float(before):+.4g}" if both else ""  # type: ignore[arg-type]
        rows.append((_metric_name(name), _show(before), _show(after), change))
    return rows


def _validations(run: Run) -> dict[str, Any]:
    names = ["loss", *_metrics(run.validation)]
    measured = [event for event in run.validation if _is_finite(event.get("loss"))]
    best = min(measured, key=lambda event: event["loss"], default=None)
    return {
        "columns": ["step", "epoch", *map(_metric_name, names)],
        "rows": [
            (event is best, [_show(event.get(key)) for key in ("step", "epoch", *names)])
            for event in run.validation
        ],
    }


def _confusion(test: Event | None) -> dict[str, Any] | None:
    """Counts with shades, and each label's precision, recall and F1; None when absent or not square."""
    counts = (test or {}).get("confusion")
    if not isinstance(counts, list) or not counts or any(len(row) != len(counts) for row in counts):
        return None
    labels = [str(label) for label in (test or {}).get("labels") or range(len(counts))]
    rows = []
    for index, row in enumerate(counts):
        right, actual, predicted = row[index], sum(row), sum(other[index] for other in counts)
        precision = right / predicted if predicted else 0.0
        recall = right / actual if actual else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        rows.append(
            {
                "label": labels[index],
                "cells": [(n, round(n / actual, 3) if actual else 0, i == index) for i, n in enumerate(row)],
                "scores": [f"{score:.3f}" for score in (precision, recall, f1)],
                "count": actual,
            }
        )
    return {"labels": labels, "rows": rows}


def _phases(train: list[Event]) -> list[tuple[str, float, float]]:
    """``(phase, median ms of a step, share in percent)`` for the phases that were timed."""
    medians = []
    for key, name in PHASES:
        values = _series(train, key)[1]
        if values:
            medians.append((name, statistics.median(values)))
    total = sum(milliseconds for _, milliseconds in medians)
    return [(name, value, 100 * value / total if total else 0.0) for name, value in medians]


def _scalars(event: Event | None) -> list[tuple[str, str]]:
    return [
        (key.replace("_", " "), _show(value))
        for key, value in (event or {}).items()
        if key != "event" and not isinstance(value, (dict, list))
    ]


def _config_tables(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration's sections; keys outside any section come first, under no title."""
    loose = [(key, _show(value)) for key, value in config.items() if not isinstance(value, dict)]
    tables = [("", loose)] if loose else []
    for section, content in config.items():
        if isinstance(content, dict):
            tables.append((section, [(key, _show(value)) for key, value in content.items()]))
    return tables


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return str(value)
