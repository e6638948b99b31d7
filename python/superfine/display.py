"""What a person sees of a run: a progress bar on a terminal, plain lines in a file or pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from superfine.trainer import Listener

__all__ = ["Display", "print_scores"]

METRICS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "pearson": "Pearson r",
    "spearman": "Spearman rho",
    "chrf": "chrF",
    "bleu": "BLEU",
    "exact_match": "exact match",
    "f1": "F1",
}


class Display(Listener):
    """Prints a run on ``console``; a context manager, so that the bar is gone whatever happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._train: dict[str, Any] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def stage(self, number: int, text: str) -> None:
        self._stop_bar()
        self.console.print(f"[bold]{number}/6 {text}[/bold]", highlight=False)

    def note(self, text: str) -> None:
        for line in text.splitlines():
            self._line(f"    {line}")

    def on_step(self, step: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("    {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("step", total=total)
        if self._task is not None:
            loss = f"loss {self._train['loss']:.4f}" if self._train else "step"
            self._bar.update(self._task, completed=step, description=loss)

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "train":
            self._train = event
            if not self.console.is_terminal:
                ms = event["ms_forward"] + event["ms_backward"] + event["ms_optimizer"]
                self._line(
                    f"    step {event['step']:>5}  epoch {event['epoch']:.2f}  loss {event['loss']:.4f}"
                    f"  lr {event['lr']:.2e}  grad norm {event['grad_norm']:.3f}  {ms:.0f} ms"
                )
        elif event["event"] == "validation":
            scores = "  ".join(f"{METRICS[key]} {_number(event[key])}" for key in METRICS if key in event)
            self._line(f"    validation after step {event['step']}  {scores}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_scores(console: Console, title: str, columns: dict[str, dict[str, Any]]) -> None:
    """A table with one row per metric and one column per set of scores, as ``evaluate`` returns them."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key, text in METRICS.items():
        if all(key in scores for scores in columns.values()):
            table.add_row(text, *(_number(scores[key]) for scores in columns.values()))
    console.print(table)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
