"""The pictures of a run: ratios as bars, whole steps by part, and the roofline that this machine measured."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .display import baseline_of, by_case, by_op, case_name, is_ours, number, times
from .records import MEASURED, Row, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH = 10.0  # inches
LINE = 0.21  # inches that a bar with its label needs


@dataclass(frozen=True)
class Theme:
    """Colours of everything that is no data."""

    paper: str
    ink: str
    soft: str
    line: str


LIGHT = Theme(paper="#ffffff", ink="#1b1f24", soft="#5b6470", line="#e3e6ea")
DARK = Theme(paper="#171b21", ink="#e4e7eb", soft="#9aa4b0", line="#30363d")

# Readable on both papers. Ours are blue, baselines grey, whatever else was found has a colour of its own.
OURS = ("#2f7bf6", "#6fb1ff", "#1850b8", "#22b8cf")
BASELINES = ("#8b949e", "#6a737d", "#a8a29e")
OTHERS = ("#0f9d8a", "#d1762f", "#8a63d2", "#c2487f", "#8c8c1f", "#a5673f", "#4c8c4a")
FAULT, DOUBT = "#d1502f", "#c08a00"
PARTS = ("#2f7bf6", "#0f9d8a", "#d1762f", "#8a63d2", "#c2487f", "#8b949e")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider, the same in all pictures of a run."""
    baselines = {baseline_of(case) for case in by_case(rows)}
    used: dict[str, str] = {}
    counts: dict[tuple[str, ...], int] = {}
    for provider in dict.fromkeys(row.provider for row in rows):
        palette = OURS if is_ours(provider) else BASELINES if provider in baselines else OTHERS
        place = counts[palette] = counts.get(palette, -1) + 1
        used[provider] = palette[place % len(palette)]
    return used


def png(height: float, draw: Callable[[Figure], None], theme: Theme = LIGHT) -> bytes:
    """Draw on a figure of the usual width and ``height`` inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.soft,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "figure.facecolor": theme.paper,
        "font.size": 9,
        "grid.color": theme.line,
        "legend.frameon": False,
        "text.color": theme.ink,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
    }
    # Figure and canvas by hand rather than pyplot: no global state, no display, safe in threads.
    with rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(WIDTH, height), dpi=130, layout=layout)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        picture = io.BytesIO()
        canvas.print_png(picture)
    return picture.getvalue()


def overview(run: Run, theme: Theme = LIGHT) -> bytes:
    """All pictures of a run, one below the other."""
    shades = colours(run.rows)
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    for op, rows in by_op(run.rows).items():
        panels.append((bars_height(rows), partial(bars, op=op, rows=rows, shades=shades, theme=theme)))
        if any(row.split for row in rows):
            panels.append((split_height(rows), partial(split, op=op, rows=rows, theme=theme)))
    if roofline_rows(run):
        panels.append((ROOFLINE_HEIGHT, partial(roofline, run=run, shades=shades, theme=theme)))
    if not panels:
        panels.append((1.0, partial(_say, text="No rows were measured.")))

    def draw(figure: Figure) -> None:
        parts = figure.subfigures(len(panels), 1, height_ratios=[height for height, _ in panels])
        # One layout for each panel: names of very different length would otherwise share a margin.
        column: list[SubFigure] = [parts] if len(panels) == 1 else list(parts)  # type: ignore[arg-type, list-item]
        for part, (_, panel) in zip(column, panels, strict=True):
            panel(part.subplots())

    return png(sum(height for height, _ in panels), draw, theme)


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center")


# --- bars: how many times as fast as the baseline --------------------


def bars_height(rows: Sequence[Row]) -> float:
    """Inches that :func:`bars` needs."""
    return LINE * (len(rows) + 1.4 * len(by_case(rows))) + 0.95


def bars(axes: Axes, op: str, rows: Sequence[Row], shades: dict[str, str], theme: Theme) -> None:
    """A bar for each provider, from 1 (as fast as the baseline) to its ratio, with its 95% interval."""
    reached = [value for row in rows for value in (row.ratio, row.ratio_low, row.ratio_high) if value]
    lowest, highest = min([0.5, *reached]) / 1.12, max([2.0, *reached]) * 1.12
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest)
    for row, y in _lines(axes, rows, theme):
        colour = shades[row.provider]
        if row.ratio and row.status in MEASURED:
            left, width = min(1.0, row.ratio), abs(row.ratio - 1)
            hatch = "////" if row.status == "suspect" else None
            axes.barh(
                y,
                width,
                left=left,
                height=0.72,
                color=colour,
                hatch=hatch,
                edgecolor=theme.paper,
                linewidth=0,
            )
            axes.plot(row.ratio, y, marker="|", markersize=9, markeredgewidth=2, color=colour)
            if row.ratio_low and row.ratio_high and row.ratio_low < row.ratio_high:
                axes.plot([row.ratio_low, row.ratio_high], [y, y], color=theme.ink, linewidth=1.2)
        _remark(axes, y, row, theme)
    axes.axvline(1, color=theme.ink, linewidth=1)
    _ratio_ticks(axes, lowest, highest)
    axes.set_xlabel("times as fast as the baseline (the first of each case), whiskers: 95%", fontsize=8.5)
    axes.set_title(op)


def _lines(axes: Axes, rows: Sequence[Row], theme: Theme) -> list[tuple[Row, float]]:
    """Put case and provider names beside the axis; return each row with its height."""
    placed: list[tuple[Row, float]] = []
    ticks: list[float] = []
    labels: list[str] = []
    heads: list[int] = []
    devices = {row.device for row in rows}
    y = 0.0
    for case in by_case(rows):
        heads.append(len(ticks))
        name = case_name(case[0]) + (f", {case[0].device}" if len(devices) > 1 else "")
        ticks.append(y)
        labels.append(name if len(name) <= 48 else name[:47] + "…")
        for row in case:
            y += 1
            placed.append((row, y))
            ticks.append(y)
            labels.append(row.provider)
        y += 1.4
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.set_ylim(y - 0.7, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    for place in heads:
        axes.get_yticklabels()[place].set(fontweight="bold", color=theme.ink)
    return placed


def _remark(axes: Axes, y: float, row: Row, theme: Theme) -> None:
    """The figures to the right of the axis, in columns; or what kept the row from having any."""
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
    if row.status not in MEASURED:
        colour = theme.soft if row.status in ("unavailable", "skipped") else FAULT
        axes.text(1.015, y, row.status, color=colour, **place)
        return
    axes.text(1.09, y, times(row.ratio), ha="right", **place)
    milliseconds = f"{number(row.median_ms)} ms" if row.median_ms is not None else ""
    axes.text(1.205, y, milliseconds, ha="right", color=theme.soft, **place)
    if row.status == "suspect":
        axes.text(1.215, y, "suspect", color=DOUBT, **place)


def _ratio_ticks(axes: Axes, lowest: float, highest: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    steps = (1, 2, 5) if math.log10(highest / lowest) < 2.5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if lowest <= tick <= highest]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


# --- whole steps by part --------------------


def split_height(rows: Sequence[Row]) -> float:
    """Inches that :func:`split` needs."""
    return bars_height([row for row in rows if row.split]) + 0.2


def split(axes: Axes, op: str, rows: Sequence[Row], theme: Theme) -> None:
    """Stacked bars of the parts of a step; all bars of a case are relative to its longest step."""
    rows = [row for row in rows if row.split]
    longest = {case[0].case_key: max(_total(row) for row in case) for case in by_case(rows)}
    names = list(dict.fromkeys(name for row in rows for name in row.split))
    shades = {name: PARTS[index % len(PARTS)] for index, name in enumerate(names)}
    for row, y in _lines(axes, rows, theme):
        left = 0.0
        for name, milliseconds in row.split.items():
            width = milliseconds / (longest[row.case_key] or 1)
            axes.barh(y, width, left=left, height=0.72, color=shades[name])
            text = f"{number(milliseconds)} ms"
            if width > 0.011 * len(text):
                axes.text(left + width / 2, y, text, ha="center", va="center", color="#ffffff", fontsize=8)
            left += width
        _remark(axes, y, row, theme)
    axes.set_xlim(0, 1.001)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("of the longest step of the case", fontsize=8.5)
    axes.set_title(f"{op}: parts of a step")
    for name in names:
        axes.bar([0], [0], color=shades[name], label=name)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(names), fontsize=8.5, borderaxespad=0.2
    )


def _total(row: Row) -> float:
    return sum(row.split.values())


# --- roofline --------------------

ROOFLINE_HEIGHT = 4.4


def roofline_rows(run: Run) -> list[Row]:
    """The rows that have a place on the roofline."""
    return [row for row in run.rows if row.status in MEASURED and row.flops and row.bytes and row.median_ms]


def roofline(axes: Axes, run: Run, shades: dict[str, str], theme: Theme) -> None:
    """Arithmetic rate over arithmetic intensity, under what this machine reached with plain kernels."""
    from matplotlib.lines import Line2D

    rows = roofline_rows(run)
    points = [(row.flops / row.bytes, row.flops / row.median_ms / 1e6) for row in rows]  # type: ignore[operator]
    left, right = min(x for x, _ in points) / 8, max(x for x, _ in points) * 8
    roofs: list[Any] = []
    streams = {
        name: sorted(sizes)[-1][1]
        for name, sizes in (run.ceilings.rates if run.ceilings else {}).items()
        if sizes
    }
    products = dict(run.ceilings.gemm) if run.ceilings else {}
    bandwidth = max(streams.values(), default=0.0)
    if bandwidth and products:  # show where the roofs meet
        right = max(right, 4 * 1000 * min(products.values()) / bandwidth)
    xs = [left * (right / left) ** (i / 200) for i in range(201)]
    dashes = ("-", "--", "-.", ":")
    for index, (name, gb_per_s) in enumerate(sorted(streams.items(), key=lambda item: -item[1])):
        top = 1000 * max(products.values(), default=math.inf)
        style = dashes[index % len(dashes)]
        under = [x for x in xs if x * gb_per_s <= top]
        roofs += axes.plot(under, [x * gb_per_s for x in under], style, color=theme.soft, linewidth=1.3)
        roofs[-1].set_label(f"{name} in memory, {number(gb_per_s)} GB/s")
    for index, (name, tflops) in enumerate(sorted(products.items(), key=lambda item: item[1])):
        start = 1000 * tflops / bandwidth if bandwidth else left
        roofs += axes.plot(
            [max(left, start), right],
            [1000 * tflops] * 2,
            dashes[index % len(dashes)],
            color=theme.ink,
            linewidth=1.3,
        )
        roofs[-1].set_label(f"{name} product, {number(tflops)} TFLOP/s")
    shapes = {op: SHAPES[index % len(SHAPES)] for index, op in enumerate(by_op(rows))}
    for row, (x, y) in zip(rows, points, strict=True):
        colour = shades[row.provider]
        face = "none" if row.status == "suspect" else colour
        axes.plot(
            x,
            y,
            shapes[row.op],
            color=colour,
            markerfacecolor=face,
            markersize=6.5,
            markeredgewidth=1.2,
            alpha=0.9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left, right)
    axes.grid(True)
    axes.set_xlabel("FLOP per byte that must move", fontsize=8.5)
    axes.set_ylabel("GFLOP/s", fontsize=8.5)
    axes.set_title("Roofline: this machine's measured ceilings (hollow: suspect)")
    marks = [
        Line2D([], [], marker=shape, linestyle="", color=theme.soft, label=op) for op, shape in shapes.items()
    ]
    marks += [
        Line2D([], [], marker="o", linestyle="", color=shades[name], label=name)
        for name in dict.fromkeys(row.provider for row in rows)
    ]
    axes.legend(handles=roofs + marks, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8.5)
