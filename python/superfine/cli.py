"""The ``superfine`` command: tune, eval, merge, env; cli_bench.py has bench, compare, report, profile.

Each command imports what it needs when it runs.
Exit codes: 0 done; 2 the input is wrong (one line on stderr says what); 1 anything else that failed;
130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superfine._cli import Debug, console, errors
from superfine.cli_bench import add_commands

if TYPE_CHECKING:
    from superfine.config import Config

__all__ = ["app", "main"]

app = typer.Typer(
    name="superfine",
    help="Fine-tune part of a pretrained model as cheaply as the hardware allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Text = Annotated[
    list[str] | None,
    typer.Option(help="Text column; give it twice for sentence pairs, or for question and context."),
]
Label = Annotated[str | None, typer.Option(help="Label column: class, number, target text or answers.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def tune(
    config: Annotated[Path | None, typer.Argument(help="TOML file; the flags below go over it.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classification (the default), regression, causal-lm, translation or qa."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled .csv, .tsv or .jsonl file; for causal-lm also .txt, or a folder of these."
        ),
    ] = None,
    text: Text = None,
    label: Label = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model folder or hub name.")] = None,
    select: Annotated[
        list[str] | None, typer.Option(help="What trains: last:2, head, norms, ...; once for each.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Run directory.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adam, lamb or sgd.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate after warm-up.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in one forward pass.")] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, binary_cross_entropy or mse.")] = None,
    fused_loss: Annotated[
        bool | None,
        typer.Option(
            "--fused-loss/--eager-loss", help="causal-lm, translation: the loss without logits, or torch's."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Directory to keep in what the frozen layers compute of each sample.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation, order and dropout.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key, as --set train.warmup=0.06.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model for a task: data, model, selection, optimizer, training, test."""
    with errors(debug):
        from superfine.config import parse_override

        flags = {
            "model.task": task,
            "data.path": data,
            "data.text": text[0] if text and len(text) == 1 else text,
            "data.label": label,
            "model.name": model,
            "select.parameters": select,
            "output.directory": output,
            "optimizer.name": optimizer,
            "optimizer.lr": lr,
            "train.epochs": epochs,
            "train.batch_size": batch_size,
            "train.loss": loss,
            "train.fused_loss": fused_loss,
            "train.cache": cache,
            "train.precision": precision,
            "train.device": device,
            "train.seed": seed,
        }
        overrides = {key: value for key, value in flags.items() if value is not None and value != []}
        overrides.update(parse_override(item) for item in set_ or [])
        settings = _settings(config, overrides, resume)

        from superfine.display import Display, print_scores
        from superfine.tune import Interrupted
        from superfine.tune import tune as run

        shown = console()
        try:
            with Display(shown) as display:
                result = run(settings, resume=resume, listener=display)
        except (Interrupted, KeyboardInterrupt) as stop:
            if not Path(settings.output.directory, "config.toml").is_file():
                raise  # it had not begun to train
            again = f"superfine tune --resume --output {settings.output.directory}"
            typer.echo(f"interrupted; continue with: {again}", err=True)
            raise typer.Exit(128 + stop.signum if isinstance(stop, Interrupted) else 130) from None
        print_scores(shown, "Test split", {"base": result.baseline, "tuned": result.test})
        if result.original is not None:
            print_scores(shown, "Original task, held back", result.original)
        for name in ("delta.safetensors", "metrics.jsonl", "curves.png", "report.html"):
            if (result.directory / name).is_file():
                shown.print(f"    {result.directory / name}", markup=False, highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    saved: Annotated[
        Path, typer.Argument(help="Run directory, or folder of a model with a head for one of the tasks.")
    ],
    data: Annotated[
        Path,
        typer.Option(help="Labelled .csv, .tsv or .jsonl file; for a language model also .txt, or a folder."),
    ],
    text: Text = None,
    label: Label = None,
    base: Annotated[str | None, typer.Option(help="Base model, where it has moved since the run.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one forward pass.")] = 32,
    device: Device = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave unreadable lines out.")
    ] = False,
    encoding: Annotated[str, typer.Option(help="Encoding of the file.")] = "utf-8",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file, too.")] = None,
    debug: Debug = False,
) -> None:
    """Score a tuned model on a labelled file; a language model on text."""
    with errors(debug):
        from superfine._files import atomic_write
        from superfine.display import print_scores
        from superfine.evaluate import evaluate_saved

        scores = evaluate_saved(
            saved,
            data,
            text=tuple(text) if text else None,
            label=label,
            base=base,
            batch_size=batch_size,
            device=device or "auto",
            on_bad_line="skip" if skip_bad_lines else "error",
            encoding=encoding,
        )
        skipped = f", {scores['skipped']:,} lines skipped" if scores["skipped"] else ""
        print_scores(console(), f"{data} ({scores['rows']:,} rows{skipped})", {str(saved): scores})
        if json_ is not None:
            with atomic_write(json_) as temporary:
                temporary.write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@app.command()
def merge(
    tuned: Annotated[Path, typer.Argument(help="Run directory, or a delta file.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the delta names.")] = None,
    weight: Annotated[
        float, typer.Option(help="Below 1: part of the way from the base, (1 - w) base + w tuned.")
    ] = 1.0,
    debug: Debug = False,
) -> None:
    """Put a delta on its base: an ordinary Hugging Face folder that from_pretrained loads."""
    with errors(debug):
        from superfine.delta import merge as merge_delta
        from superfine.evaluate import delta_notes, delta_of_run
        from superfine.hf import local_folder, quiet

        delta = delta_of_run(tuned) if tuned.is_dir() else tuned
        name = base or delta_notes(delta).get("base")
        if name is None:
            raise ValueError(f"merge: {delta} does not name its base; expected --base DIR")
        with quiet():
            merge_delta(local_folder(name), delta, out, weight=weight)
        typer.echo(str(out))


@app.command()
def env(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, CPU, GPUs and which native kernels work here."""
    with errors(debug):
        from superfine.env import environment, print_environment

        if json_:
            typer.echo(json.dumps(environment(), indent=2))
        else:
            print_environment(console())


def main() -> None:
    """Entry point of the ``superfine`` command."""
    app(prog_name="superfine")


def _settings(path: Path | None, overrides: dict[str, Any], resume: bool) -> Config:
    from superfine.config import load_config

    if path is None and resume:
        directory = overrides.get("output.directory")
        if directory is None:
            raise ValueError("tune: --resume without a configuration; expected --output DIRECTORY of the run")
        path = Path(directory, "config.toml")
        if not path.is_file():
            raise FileNotFoundError(f"resume: {directory} has no config.toml; expected a run directory")
    elif path is None and not {"model.name", "output.directory"} <= set(overrides):
        raise ValueError("tune: no configuration; expected CONFIG.toml, or --data, --model and --output")
    return load_config(path, overrides)


add_commands(app)
