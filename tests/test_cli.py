"""The superfine command: what it prints, writes and returns, and one line for every kind of wrong input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from superfine import hf
from superfine import tune as tuning
from superfine.cli import app
from superfine.evaluate import load_run
from superfine.tasks import Classification, of_config, of_settings
from superfine.trainer import Listener
from tiny_models import sentiment_rows, tiny_bert, write_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tune_runs import settings
from typer.testing import CliRunner

# The embeddings stay frozen, so that a delta fits one base only.
OPTIONS = ["--select", "last:2", "--select", "head", "--lr", "5e-3", "--batch-size", "8", "--device", "cpu"]
OPTIONS += ["--set", "data.max_length=32"]

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory) -> Path:
    """A finished run, with its report."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = superfine("tune", "--data", data, "--model", base, "--output", out, "--epochs", 6, *OPTIONS)
    assert done.exit_code == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def superfine(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments, **options) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", "superfine", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---------------------------------------------------------------- tune


def test_tune_announces_six_steps_and_ends_with_base_against_tuned(run):
    text = (run / "stdout.txt").read_text()
    lines = text.splitlines()
    assert [line[:3] for line in lines if line[:1].isdigit()] == ["1/6", "2/6", "3/6", "4/6", "5/6", "6/6"]
    assert "80 samples to train on, 10 for validation, 10 for the test" in text
    assert "new, drawn under seed 0: classifier.bias, classifier.weight" in text
    # Plain lines, because this is no terminal: every tenth step, and each validation.
    assert sum(line.strip().startswith("step ") for line in lines) == 7  # 1, 10, 20, ... 60
    assert sum("validation after step" in line for line in lines) == 6
    table = text[text.index("Test split") :]
    assert "base" in table
    assert "tuned" in table
    assert "accuracy" in table
    assert "report.html" in table


def test_tune_reads_a_file_and_flags_go_over_it(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(
        f'[data]\npath = "{data}"\nmax_length = 32\n[model]\nname = "{base}"\n[train]\nepochs = 9\n'
        '[optimizer]\nlr = 1.0\n[output]\ndirectory = "run"\n'
    )
    done = superfine(
        "tune", "config.toml", "--epochs", 1, "--lr", 1e-3, "--select", "head", "--select", "norms"
    )
    assert done.exit_code == 0, done.stderr
    written = Path("run/config.toml").read_text()
    assert "epochs = 1\n" in written
    assert "lr = 0.001\n" in written
    assert 'parameters = ["head", "norms"]' in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune: no configuration; expected CONFIG.toml, or --data, --model and --output"),
        (["none.toml"], "config: none.toml is not a file"),
        (["--resume"], "--resume without a configuration; expected --output"),
        (["--resume", "--output", "none"], "resume: none has no config.toml"),
        (["--data", "none.csv", "--model", "{base}", "--output", "x"], "data: path is none.csv"),
        (["--data", "{data}", "--model", "./none", "--output", "x"], "model: './none' is not a folder"),
        (
            ["--data", "{data}", "--model", "{base}", "--output", "x", "--set", "train.epoch=3"],
            "did you mean 'epochs'",
        ),
        (
            ["--data", "{data}", "--model", "{base}", "--output", "x", "--label", "lable"],
            "did you mean 'label'",
        ),
        (
            ["--data", "{data}", "--model", "{base}", "--output", "x", "--optimizer", "admw"],
            "did you mean 'adamw'",
        ),
        (
            ["--data", "{data}", "--model", "{base}", "--output", "{run}"],
            "holds a run; continue it with --resume",
        ),
        (["--resume", "--output", "{run}", "--seed", "5"], "differs in train.seed (was 0, now 5)"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(
    base, data, run, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    done = superfine("tune", *(argument.format(base=base, data=data, run=run) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    done = superfine("tune", "none.toml", "--debug")
    assert isinstance(done.exception, FileNotFoundError)


def test_an_unforeseen_error_is_one_line_too_and_exit_code_1(base, data, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(tuning, "load_splits", broken)
    done = superfine("tune", "--data", data, "--model", base, "--output", tmp_path / "x")
    assert done.exit_code == 1
    assert done.stderr == "superfine: RuntimeError: first line (--debug shows where)\n"


def test_ctrl_c_says_how_to_go_on_and_resume_does(base, data, tmp_path, monkeypatch):
    from superfine.display import Display

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            Display, "on_step", lambda self, step, total: step == 4 and signal.raise_signal(signal.SIGINT)
        )
        done = superfine("tune", "--data", data, "--model", base, "--output", out, "--epochs", 1, *OPTIONS)
    assert done.exit_code == 130
    assert done.stderr == f"interrupted; continue with: superfine tune --resume --output {out}\n"
    done = superfine("tune", "--resume", "--output", out)
    assert done.exit_code == 0, done.stderr
    assert "continuing after step 4 of 10" in done.stdout
    assert (out / "delta.safetensors").is_file()


@pytest.mark.slow
def test_sigterm_stops_a_process_with_143_and_a_resumable_run(base, data, tmp_path):
    out = tmp_path / "run"
    # Far more epochs than the test waits for.
    child = process("tune", "--data", data, "--model", base, "--output", out, "--epochs", 10_000, *OPTIONS)
    deadline = time.monotonic() + 90
    while (
        not (out / "checkpoint" / "state.pt").exists()
        and time.monotonic() < deadline
        and child.poll() is None
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 143, stderr
    assert f"superfine tune --resume --output {out}" in stderr
    assert "Traceback" not in stderr


# ---------------------------------------------------------------- eval


def test_eval_of_a_run_gives_its_test_scores_on_its_test_rows(run, data, tmp_path):
    config = tuning.load_config(run / "config.toml")
    test = tuning.load_splits(config.data, of_settings(config)).test
    rows = [(text, label) for (text,), label in zip(test.texts, test.labels, strict=True)]
    path, out = write_csv(tmp_path / "test.csv", rows), tmp_path / "scores.json"
    done = superfine("eval", run, "--data", path, "--json", out, "--batch-size", 8)
    assert done.exit_code == 0, done.stderr
    assert "10 rows" in done.stdout
    scores = json.loads(out.read_text())
    expected = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert expected.pop("event") == "test"
    assert scores == expected | {"rows": 10, "skipped": 0}


def test_eval_skips_bad_lines_when_asked(run, tmp_path):
    path = write_csv(tmp_path / "d.csv", [*sentiment_rows(10), ("", "positive")])
    done = superfine("eval", run, "--data", path)
    assert done.exit_code == 2
    assert "line 12 (text is empty)" in done.stderr
    done = superfine("eval", run, "--data", path, "--skip-bad-lines", "--json", tmp_path / "s.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["skipped"] == 1


def test_eval_reads_other_columns_and_a_moved_base(run, base, tmp_path):
    path = write_csv(tmp_path / "d.csv", sentiment_rows(10), header=("tweet", "mood"))
    done = superfine("eval", run, "--data", path, "--text", "tweet", "--label", "mood", "--base", base)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "--data", "{data}"], "is not a folder; expected a Hugging Face model folder"),
        (["{base}", "--data", "{data}"], "has no classifier.bias; expected a model tuned for classification"),
        (["{base}", "--data", "{data}", "--base", "{base}"], "is no run directory"),
        (["{run}", "--data", "{tmp}/none.csv"], "none.csv is not a file"),
        (["{run}", "--data", "{data}", "--label", "mood"], "has no column 'mood'"),
        (["{run}", "--data", "{tmp}/odd.csv"], "label is 'mixed'; expected one of 'negative', 'positive'"),
        (["{run}", "--data", "{data}", "--base", "{other}"], "belongs to another base"),
        (
            ["{run}", "--data", "{data}", "--device", "tpu"],
            "device is 'tpu'; expected 'auto', 'cpu' or 'cuda'",
        ),
        (["{unfinished}", "--data", "{data}"], "finish it with superfine tune --resume --output"),
    ],
)
def test_eval_errors(run, base, data, tmp_path, arguments, message):
    write_csv(tmp_path / "odd.csv", [("odd", "mixed")])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.toml").write_text((run / "config.toml").read_text())
    places = {
        "run": run,
        "base": base,
        "data": data,
        "tmp": tmp_path,
        "unfinished": tmp_path / "unfinished",
        "other": tiny_bert(tmp_path / "other", seed=1) if "{other}" in arguments else "",
    }
    done = superfine("eval", *(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- merge


def test_merge_writes_a_folder_that_transformers_loads_with_the_same_bits(run, tmp_path):
    out = tmp_path / "merged"
    done = superfine("merge", run, out)
    assert done.exit_code == 0, done.stderr
    merged, loading = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    inputs = AutoTokenizer.from_pretrained(out)(
        ["this was a good film", "awful"], padding=True, return_tensors="pt"
    )
    tuned, _, _ = load_run(run)
    with torch.no_grad():
        assert torch.equal(merged.eval()(**inputs).logits, tuned(**inputs).logits)


def test_a_merged_folder_evaluates_like_its_run(run, data, tmp_path):
    superfine("merge", run / "delta.safetensors", tmp_path / "merged")
    for name, saved in (("run", run), ("merged", tmp_path / "merged")):
        done = superfine("eval", saved, "--data", data, "--json", tmp_path / f"{name}.json")
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "run.json").read_text() == (tmp_path / "merged.json").read_text()


def test_a_merged_binary_classifier_keeps_its_task(base, data, tmp_path):
    arguments = ["--data", data, "--model", base, "--output", tmp_path / "run", "--epochs", 1, *OPTIONS]
    assert superfine("tune", *arguments, "--loss", "binary_cross_entropy").exit_code == 0
    assert superfine("merge", tmp_path / "run", tmp_path / "merged").exit_code == 0
    task = of_config(hf.load_config(str(tmp_path / "merged")))
    assert task == Classification("binary_cross_entropy", ("negative", "positive"), ("text",), "label", 32)
    assert superfine("eval", tmp_path / "merged", "--data", data).exit_code == 0


def test_merge_errors(run, base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "broken.safetensors").write_bytes((run / "delta.safetensors").read_bytes()[:200])
    for arguments, message in [
        ([run, tmp_path / "full"], "expected a new or an empty folder"),
        ([tmp_path / "none.safetensors", tmp_path / "out"], "is not a file; expected a delta file or a run"),
        ([tmp_path / "broken.safetensors", tmp_path / "out"], "truncated or no safetensors file"),
        ([base, tmp_path / "out"], "has no delta.safetensors; expected a run directory"),
        ([base / "model.safetensors", tmp_path / "out"], "does not name its base; expected --base DIR"),
        ([run, tmp_path / "out", "--base", tiny_bert(tmp_path / "other", seed=1)], "belongs to another base"),
    ]:
        done = superfine("merge", *arguments)
        assert done.exit_code == 2, message
        assert message in done.stderr
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- env, and the command itself


def test_env_prints_a_table_or_json():
    done = superfine("env", "--json")
    assert done.exit_code == 0, done.stderr
    version = json.loads(done.stdout)["packages"]["torch"]
    assert version == importlib.metadata.version("torch")  # without "+cu130" where the wheel comes from PyPI
    done = superfine("env")
    assert done.exit_code == 0, done.stderr
    assert version in done.stdout


def test_python_m_superfine_is_the_command():
    done = process("--help")
    stdout, stderr = done.communicate(timeout=60)
    assert done.returncode == 0, stderr
    for command in ("tune", "eval", "merge", "env"):
        assert command in stdout


def test_importing_superfine_or_asking_for_help_loads_no_heavy_package():
    script = (
        "import sys, superfine, superfine.select\n"
        "print(sorted({'transformers', 'typer', 'rich', 'matplotlib', 'pydantic'} & set(sys.modules)))\n"
        "import superfine.cli\n"
        "print(sorted({'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end(base, data, tmp_path):
    from rich.console import Console
    from superfine.display import Display

    config = settings(base, data, tmp_path / "run", train__epochs=1, train__batch_size=32)
    with (tmp_path / "tty").open("w") as terminal:
        console = Console(force_terminal=True, width=100, file=terminal)
        with Display(console) as display:
            assert isinstance(display, Listener)
            tuning.tune(config, listener=display)
    screen = (tmp_path / "tty").read_text()
    assert "3/3" in screen  # 80 samples in batches of 32
    assert "\x1b[?25h" in screen  # the cursor is shown again
    assert "grad norm" not in screen
    assert "validation after step 3" in screen
