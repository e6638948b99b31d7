"""Against forgetting: what is replayed in which order, and the original task's scores."""

from __future__ import annotations

import pytest
from superfine.cli import app
from superfine.replay import Mixture
from superfine.tune import tune
from tiny_models import sentiment_rows, story, tiny_llama, write_csv
from tune_runs import At, CrashError, Recorder, assert_same_run, crash, of_kind, settings
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    rows = [(text, label) for text, label in sentiment_rows(60, seed=9)]
    replay = write_csv(folder / "replay.csv", rows[:40], ("old", "mood"))
    return replay, write_csv(folder / "held_back.csv", rows[30:], ("old", "mood"))


def with_original(base, data, out, original, **values):
    options = {
        f"{name}__{key}": value
        for name in ("replay", "original")
        for key, value in (("text", "old"), ("label", "mood"))
    }
    options |= {"replay__path": str(original[0]), "original__path": str(original[1]), "replay__fraction": 0.2}
    return settings(base, data, out, **options | values)


@pytest.mark.parametrize(
    ("own", "others", "fraction"), [(80, 7, 0.1), (80, 100, 0.5), (3, 1, 0.01), (5, 2, 0.9)]
)
def test_replayed_samples_take_turns_and_make_their_share(own, others, fraction):
    mixture = Mixture(own, others, fraction)
    epochs = [mixture.order(0, epoch) for epoch in range(7)]
    drawn = [[i for i in epoch if i >= own] for epoch in epochs]
    for epoch, replayed in zip(epochs, drawn, strict=True):
        assert len(epoch) == len(mixture)
        assert sorted(i for i in epoch if i < own) == list(range(own))
        assert abs(len(replayed) - fraction * len(epoch)) <= 1
    seen = [sum(part.count(own + i) for part in drawn) for i in range(others)]
    assert max(seen) - min(seen) <= 1
    assert mixture.order(0, 3) == epochs[3]
    assert mixture.order(1, 3) != epochs[3] or len(mixture) < 8


def test_without_replay_the_order_is_as_ever():
    assert Mixture(8).order(0, 0) == [0, 6, 4, 3, 1, 7, 2, 5]
    assert len(Mixture(8)) == 8


def test_a_run_replays_resumes_and_scores_the_original_task(base, data, original, tmp_path):
    told = Recorder()
    result = tune(with_original(base, data, tmp_path / "run", original), listener=told)
    assert "10 of 40 rows to replay are held back, so left out" in told.notes
    assert "20 samples of the original task in each epoch of 100" in told.notes
    assert result.summary["steps"] == 2 * 13
    (event,) = of_kind(tmp_path / "run", "original")
    assert event["base"] == result.original["base"]
    assert event["tuned"]["accuracy"] == result.original["tuned"]["accuracy"]
    assert sum(map(sum, event["tuned"]["confusion"])) == 30

    with pytest.raises(CrashError):
        tune(with_original(base, data, tmp_path / "again", original), listener=At(17, crash))
    with pytest.raises(ValueError, match=r"replay.fraction \(was 0.2, now 0.3\)"):
        tune(with_original(base, data, tmp_path / "again", original, replay__fraction=0.3), resume=True)
    tune(with_original(base, data, tmp_path / "again", original), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")

    plain = tune(settings(base, data, tmp_path / "plain"))
    assert plain.original is None
    assert plain.baseline == result.baseline


def test_other_rows_to_replay_are_refused_by_resume(base, data, original, tmp_path):
    replay = write_csv(tmp_path / "replay.csv", sentiment_rows(20, seed=3), ("old", "mood"))
    with pytest.raises(CrashError):
        tune(with_original(base, data, tmp_path / "run", (replay, original[1])), listener=At(8, crash))
    write_csv(replay, sentiment_rows(20, seed=4), ("old", "mood"))
    with pytest.raises(ValueError, match="resume: the data to replay is not what the run began with"):
        tune(with_original(base, data, tmp_path / "run", (replay, original[1])), resume=True)


def test_the_command_prints_and_reports_both(base, data, original, tmp_path):
    own = {"path": original[1], "text": "old", "label": "mood"}
    flags = [f"--set=original.{key}={value}" for key, value in own.items()]
    flags += ["--set=data.max_length=32", "--set=train.epochs=1"]
    command = [
        "tune",
        "--data",
        data,
        "--model",
        base,
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
        *flags,
    ]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert done.stdout.index("Test split") < done.stdout.index("Original task, held back")


def test_the_report_has_the_original_task(tmp_path):
    from superfine.report import _comparison

    rows = _comparison({"loss": 1.0, "accuracy": 0.9}, {"loss": 2.0, "accuracy": 0.6})
    assert rows == [("loss", "1", "2", "+1"), ("accuracy", "0.9", "0.6", "-0.3")]
    assert _comparison(None, None) == []


def test_a_language_model_replays_plain_text(tmp_path):
    llama = tiny_llama(tmp_path / "base")
    texts = []
    for name, paragraphs in (("new", 30), ("old", 12), ("held_back", 6)):
        texts.append(tmp_path / f"{name}.txt")
        texts[-1].write_text(story(paragraphs, seed=paragraphs))
    options = {"model__task": "causal-lm", "select__parameters": ["last:1"], "train__epochs": 1}
    options |= {"replay__path": str(texts[1]), "original__path": str(texts[2]), "replay__fraction": 0.25}
    result = tune(settings(llama, texts[0], tmp_path / "run", **options))
    assert result.original["tuned"]["perplexity"] < result.original["base"]["perplexity"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"replay__path": "no.csv"}, FileNotFoundError, "replay: path is no.csv; expected a .csv"),
        ({"replay__text": "new"}, ValueError, r"\[replay\] .*has no column 'new'"),
        (
            {"original__label": "old"},
            ValueError,
            r"\[original\] .*expected one of 'negative', 'positive'",
        ),
        ({"replay__fraction": 1.0}, ValueError, "replay.fraction is 1.0; expected less than 1"),
        ({"replay__share": 0.1}, ValueError, "replay.share is not a known key"),
    ],
)
def test_what_cannot_be_replayed_is_an_error_that_names_it(
    values, error, message, base, data, original, tmp_path
):
    with pytest.raises(error, match=message):
        tune(with_original(base, data, tmp_path / "run", original, **values))
    assert not (tmp_path / "run").exists()


def test_nothing_left_to_replay_is_an_error(base, data, original, tmp_path):
    with pytest.raises(
        ValueError, match="every row is in the validation, test or original data; expected others"
    ):
        tune(with_original(base, data, tmp_path / "run", (original[1], original[1])))
