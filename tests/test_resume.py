"""Runs that were killed, crashed or interrupted go on to the same bits, and never as another run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from superfine import checkpoint
from superfine import tune as tuning
from superfine.tasks import Classification
from superfine.tune import Interrupted, tune
from tiny_models import sentiment_rows, tiny_bert, write_csv
from tune_runs import At, CrashError, Recorder, assert_same_run, crash, settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def unbroken(base, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    tune(settings(base, data, run))
    return run


# Ten steps an epoch, a checkpoint every three steps and at validations. Stopped: before any checkpoint, right
# on one, between two, at an epoch's end (validation pending), in the second epoch, after the last step.
@pytest.mark.parametrize("step", [1, 3, 5, 10, 14, 20])
def test_a_crashed_run_resumes_to_the_same_bits(base, data, tmp_path, unbroken, step):
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(CrashError):
        tune(config, listener=At(step, crash))
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("step", [4, 10])  # between checkpoints, and where a validation is due
def test_an_interrupted_run_finishes_its_step_saves_and_resumes(base, data, tmp_path, unbroken, step):
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(Interrupted) as caught:
        tune(config, listener=At(step, lambda: signal.raise_signal(signal.SIGINT)))
    assert caught.value.signum == signal.SIGINT
    state = checkpoint.load_state(tmp_path / "run" / "checkpoint")
    assert state["progress"]["step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_an_interrupt_during_validation_resumes_to_the_same_bits(base, data, tmp_path, unbroken, monkeypatch):
    config = settings(base, data, tmp_path / "run")
    loss_of = Classification.loss_of

    def interrupted(self, logits, targets, label_smoothing=0.0):
        if not torch.is_grad_enabled():
            signal.raise_signal(signal.SIGINT)
        return loss_of(self, logits, targets, label_smoothing)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss_of", interrupted)
        with pytest.raises(Interrupted):
            tune(config)
    assert checkpoint.load_state(tmp_path / "run" / "checkpoint")["progress"]["validated_step"] == 0
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_second_interrupt_acts_at_once(base, data, tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(settings(base, data, tmp_path / "run"), listener=At(4, twice))
    assert checkpoint.load_state(tmp_path / "run" / "checkpoint")["progress"]["step"] == 3


def test_a_killed_process_resumes_to_the_same_bits(base, data, tmp_path, unbroken):
    config = settings(base, data, tmp_path / "run")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from superfine.config import load_config
        from superfine.tune import Listener, tune

        class Kill(Listener):
            def on_step(self, step, total):
                if step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

        tune(load_config(sys.argv[1]), listener=Kill())
        """
    )
    (tmp_path / "config.toml").write_text(tuning.to_toml(config))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "config.toml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | threads,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.load_state(tmp_path / "run" / "checkpoint")["progress"]["step"] == 6
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_resuming_a_finished_run_only_evaluates_again(base, data, tmp_path, unbroken):
    config = settings(base, data, tmp_path / "run")
    tune(config)
    steps = Recorder()
    tune(config, resume=True, listener=steps)
    assert steps.steps == []
    assert_same_run(tmp_path / "run", unbroken)


def test_a_failed_checkpoint_leaves_the_one_before(base, data, tmp_path, unbroken, monkeypatch):
    config = settings(base, data, tmp_path / "run")
    save, calls = torch.save, []

    def full_disk(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            tune(config)
    folder = tmp_path / "run" / "checkpoint"
    assert checkpoint.load_state(folder)["progress"]["step"] == 3
    assert [path.name for path in folder.iterdir()] == ["state.pt"]
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_torn_last_line_of_metrics_is_cut_on_resume(base, data, tmp_path, unbroken):
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(CrashError):
        tune(config, listener=At(5, crash))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_an_error_that_names_it(base, data, tmp_path, damage):
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(CrashError):
        tune(config, listener=At(5, crash))
    path = tmp_path / "run" / "checkpoint" / "state.pt"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ValueError, match=r"state\.pt"):
        tune(config, resume=True)


def test_a_resume_with_another_configuration_is_refused(base, data, tmp_path, unbroken):
    config = settings(base, data, unbroken, train__seed=1, optimizer__lr=1e-3)
    with pytest.raises(ValueError) as caught:
        tune(config, resume=True)
    assert "optimizer.lr (was 0.003, now 0.001), train.seed (was 0, now 1)" in str(caught.value)


def test_a_resume_with_other_data_or_another_base_is_refused(tmp_path):
    base = tiny_bert(tmp_path / "base")
    data = write_csv(tmp_path / "data.csv", sentiment_rows(100))
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(CrashError):
        tune(config, listener=At(5, crash))
    tiny_bert(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="the model is not what the run began with"):
        tune(config, resume=True)
    write_csv(data, sentiment_rows(100, seed=1))
    with pytest.raises(ValueError, match="the data is not what the run began with"):
        tune(config, resume=True)


def test_resume_without_a_run_is_an_error(base, data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.toml; expected a run directory"):
        tune(settings(base, data, tmp_path / "none"), resume=True)


def test_an_existing_run_is_never_overwritten(base, data, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run; continue it with --resume, or choose another"):
        tune(settings(base, data, unbroken))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_generator_states_survive_a_save_and_load(tmp_path):
    def draw() -> list:
        return [random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(2).tolist()]

    tuning.seed_everything(3)
    draw()  # an odd number of normal draws leaves one cached, which is part of the state
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    expected = [draw(), draw()]
    tuning.seed_everything(4)
    checkpoint.restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw(), draw()] == expected
