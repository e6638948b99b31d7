"""superfine tune --cache: the frozen layers' states are computed once; scores as without, resumed runs as whole."""

from __future__ import annotations

import json

import pytest
from superfine.tune import Listener, tune
from tiny_models import tiny_bert
from tune_runs import At, CrashError, assert_same_run, crash, of_kind, settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def summary(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_cached_runs_score_as_without_and_resume_to_the_same_bits(data, tmp_path):
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    plain = tune(settings(base, data, tmp_path / "plain"))
    listener = Notes()
    options = {"train__cache": str(tmp_path / "states")}
    cached = tune(settings(base, data, tmp_path / "cached", **options), listener=listener)
    assert cached.test["accuracy"] == plain.test["accuracy"]
    assert cached.test["loss"] == pytest.approx(plain.test["loss"], abs=1e-4)
    for ours, theirs in zip(
        of_kind(tmp_path / "cached", "train"), of_kind(tmp_path / "plain", "train"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    said = [note for note in listener.notes if note.startswith("frozen prefix: ")]
    assert said[0].startswith("frozen prefix: 1 of 2 layers, without dropout, from ")
    assert "samples computed in" in said[1]
    assert "s an epoch" in said[2]
    found = summary(tmp_path / "cached")
    assert found["cache_misses"] == 0
    assert found["cache_hits"] > 0
    assert found["cache_bytes"] > 0
    assert "seconds_per_epoch" in found
    assert "cache_hits" not in summary(tmp_path / "plain")

    run = settings(base, data, tmp_path / "broken", train__cache=str(tmp_path / "others"))
    with pytest.raises(CrashError):
        tune(run, listener=At(5, crash))
    again = Notes()
    tune(run, resume=True, listener=again)
    assert any(note.startswith("frozen prefix: 0 samples computed") for note in again.notes)
    for name in ("broken", "cached"):  # hits count one session
        log = tmp_path / name / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [
            {k: v for k, v in line.items() if k not in ("cache_hits", "seconds_per_epoch")} for line in lines
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(tmp_path / "broken", tmp_path / "cached")


def test_a_directory_of_another_model_or_no_frozen_layer_is_an_error(data, tmp_path):
    base = tiny_bert(tmp_path / "base")
    options = {"train__cache": str(tmp_path / "states"), "train__epochs": 1}
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.0.* trains; expected a frozen prefix"):
        tune(settings(base, data, tmp_path / "run", select__parameters=["last:2", "head"], **options))
    assert not (tmp_path / "run").exists()
    tune(settings(base, data, tmp_path / "run", **options))
    other = tiny_bert(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="filled by another model or plan, with prefix"):
        tune(settings(other, data, tmp_path / "second", **options))
    with pytest.raises(ValueError, match="dtype 'fp32'; expected 'int8'"):
        tune(settings(base, data, tmp_path / "second", train__cache_dtype="int8", **options))


def test_of_a_run_that_trains_the_head_alone_one_token_a_text_is_kept(data, tmp_path):
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    options = {"select__parameters": ["head"], "train__epochs": 1}
    plain = tune(settings(base, data, tmp_path / "plain", **options))
    cached = tune(settings(base, data, tmp_path / "run", train__cache=str(tmp_path / "states"), **options))
    assert cached.summary["cache_misses"] == 0
    assert cached.summary["cache_bytes"] == 90 * 32 * 4  # texts to train on and to validate, width, float32
    assert cached.test["loss"] == pytest.approx(plain.test["loss"], abs=1e-5)
