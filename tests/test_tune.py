"""superfine tune as a library: whole runs of a tiny BERT, every task and optimizer, and bad settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from superfine import hf, trainer
from superfine.evaluate import evaluate, load_run
from superfine.tasks import Classification
from superfine.tune import tune
from tiny_models import sentiment_rows, tiny_bert, write_csv
from tune_runs import Recorder, assert_same_run, events, of_kind, settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def still_base(tmp_path_factory) -> Path:
    """Without dropout, so that batches of different shapes can be compared."""
    return tiny_bert(tmp_path_factory.mktemp("still"), dropout=0.0)


def test_a_run_learns_and_leaves_everything_in_its_directory(base, data, tmp_path, monkeypatch):
    monkeypatch.undo()  # with its report
    told = Recorder()
    run = tmp_path / "run"
    result = tune(
        settings(base, data, run, select__parameters=["all"], train__epochs=6, optimizer__lr=5e-3),
        listener=told,
    )

    assert told.stages == [1, 2, 3, 4, 5, 6]
    assert told.steps == [(step, 60) for step in range(1, 61)]
    assert result.test["accuracy"] >= result.baseline["accuracy"] + 0.3
    assert result.test["loss"] < 0.5 * result.baseline["loss"]
    for name in ("config.toml", "metrics.jsonl", "curves.png", "report.html", "delta.safetensors"):
        assert (run / name).stat().st_size > 0, name
    assert not list(run.rglob(".*tmp*"))

    assert [event["event"] for event in events(run) if event["event"] != "train"] == [
        "start",
        *["validation"] * 6,
        "baseline",
        "test",
        "summary",
    ]
    train = of_kind(run, "train")
    assert [event["step"] for event in train] == list(range(1, 61))
    assert set(train[0]) == {"event", "step", "epoch", "loss", "lr", "grad_norm"}
    assert train[9]["epoch"] == 1.0
    assert max(event["lr"] for event in train) == 5e-3
    summary = of_kind(run, "summary")[0]
    best = min(of_kind(run, "validation"), key=lambda event: event["loss"])
    assert (summary["best_step"], summary["best_validation_loss"]) == (best["step"], best["loss"])
    assert sum(map(sum, result.test["confusion"])) == 10


def test_the_saved_delta_is_the_model_with_the_lowest_validation_loss(base, data, tmp_path, monkeypatch):
    losses, weights = iter([0.5, 0.3, 0.4, 0.3]), []

    def scripted(model, *arguments, **options):
        weights.append(model.classifier.weight.detach().clone())
        return evaluate(model, *arguments, **options) | {"loss": next(losses)}

    monkeypatch.setattr(trainer, "evaluate", scripted)
    result = tune(settings(base, data, tmp_path / "run", train__epochs=4))
    saved = load_file(tmp_path / "run" / "delta.safetensors")["classifier.weight"]
    assert result.summary["best_step"] == 20
    assert torch.equal(saved, weights[1])
    assert not torch.equal(saved, weights[3])  # an equal loss later is no improvement
    assert torch.equal(load_run(tmp_path / "run")[0].classifier.weight, weights[1])


def test_the_run_is_the_same_twice(base, data, tmp_path):
    for name in ("a", "b"):
        tune(settings(base, data, tmp_path / name))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(base, data, tmp_path):
    results = [tune(settings(base, data, tmp_path / str(seed), train__seed=seed)) for seed in (0, 1)]
    assert results[0].test["loss"] != results[1].test["loss"]


@pytest.mark.parametrize("optimizer", ["adam", "lamb", "sgd"])
def test_every_optimizer(base, data, tmp_path, optimizer):
    options = {"optimizer__momentum": 0.9} if optimizer == "sgd" else {"optimizer__betas": [0.9, 0.99]}
    run = tmp_path / "run"
    tune(settings(base, data, run, optimizer__name=optimizer, optimizer__lr=1e-2, train__epochs=1, **options))
    losses = [event["loss"] for event in of_kind(run, "train")]
    assert len(set(losses)) == len(losses)
    assert all(event["loss"] < 1 for event in of_kind(run, "validation"))


def test_binary_cross_entropy_has_one_output_for_the_second_class(base, data, tmp_path):
    config = settings(
        base,
        data,
        tmp_path / "run",
        select__parameters=["all"],
        train__loss="binary_cross_entropy",
        train__epochs=6,
        optimizer__lr=5e-3,
    )
    result = tune(config)
    assert result.test["labels"] == ["negative", "positive"]
    assert result.test["accuracy"] >= 0.9
    model, task, _ = load_run(tmp_path / "run")
    assert task.loss == "binary_cross_entropy"
    assert model.config.num_labels == 1
    assert model.config.id2label == {0: "positive"}


def test_mse_is_regression(base, tmp_path):
    rows = [(text, "1.5" if label == "positive" else "-0.5") for text, label in sentiment_rows(100)]
    data = write_csv(tmp_path / "numbers.csv", rows)
    config = settings(
        base,
        data,
        tmp_path / "run",
        select__parameters=["all"],
        train__loss="mse",
        train__epochs=6,
        optimizer__lr=5e-3,
    )
    result = tune(config)
    assert set(result.test) == {"loss", "mse", "mae", "pearson", "spearman"}
    assert result.test["mse"] == pytest.approx(result.test["loss"], rel=1e-5)
    assert result.test["mse"] < 0.3 * result.baseline["mse"]
    assert result.test["pearson"] > 0.8


def test_pairs_of_texts(base, tmp_path):
    path = tmp_path / "pairs.csv"
    lines = [f"{text},saw it,{label}" for text, label in sentiment_rows(40)]
    path.write_text("\n".join(["first,second,label", *lines]))
    tune(settings(base, path, tmp_path / "run", data__text=["first", "second"], train__epochs=1))
    _, task, _ = load_run(tmp_path / "run")
    assert task.text == ("first", "second")


def test_bf16_autocast_keeps_fp32_parameters(base, data, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        tune(settings(base, data, run, train__precision=precision, train__epochs=1))
        losses[precision] = [event["loss"] for event in of_kind(run, "train")]
        assert {t.dtype for t in load_file(run / "delta.safetensors").values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


# Of 80 samples, groups of 24 leave a last group of 8 (a part of 12 that is not full; one full part of 8;
# 8 parts of 1), and groups of 30 one of 20 (a full part of 15 and one of 5).
@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 2), (8, 3), (15, 2), (1, 24)])
def test_accumulation_equals_one_batch_of_the_same_samples(
    still_base, data, tmp_path, batch_size, accumulation
):
    whole = batch_size * accumulation
    common = {
        "optimizer__name": "sgd",
        "optimizer__lr": 0.1,
        "train__epochs": 1,
        "select__parameters": ["all"],
    }
    one, many = tmp_path / "one", tmp_path / "many"
    tune(settings(still_base, data, one, train__batch_size=whole, **common))
    tune(
        settings(
            still_base, data, many, train__batch_size=batch_size, train__accumulation=accumulation, **common
        )
    )
    for a, b in zip(of_kind(one, "train"), of_kind(many, "train"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    left, right = load_file(one / "delta.safetensors"), load_file(many / "delta.safetensors")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def test_no_clipping_reports_the_norm_all_the_same(base, data, tmp_path):
    norms = {}
    for limit in (0.0, 1e-3):
        run = tmp_path / str(limit)
        tune(settings(base, data, run, optimizer__max_grad_norm=limit, train__epochs=1))
        norms[limit] = [event["grad_norm"] for event in of_kind(run, "train")]
    assert norms[0.0][0] == norms[1e-3][0] > 1e-3  # the norm before clipping
    assert norms[0.0][5] != norms[1e-3][5]


def test_early_stopping_counts_validations_without_improvement(base, data, tmp_path):
    run = tmp_path / "run"
    # A rate that changes no bit of the model: the second validation cannot be better than the first.
    config = settings(
        base,
        data,
        run,
        optimizer__name="sgd",
        optimizer__lr=1e-30,
        train__eval_every=2,
        train__patience=2,
        train__epochs=3,
    )
    tune(config)
    assert [event["step"] for event in of_kind(run, "validation")] == [2, 4, 6]
    summary = of_kind(run, "summary")[0]
    assert (summary["stopped_early"], summary["best_step"], summary["steps"]) == (True, 2, 6)


def test_labels_keep_the_order_of_a_base_that_has_them(base, data, tmp_path):
    model, _ = hf.load_model(str(base), Classification("cross_entropy", ("positive", "negative")), seed=3)
    model.save_pretrained(tmp_path / "classifier")
    hf.load_tokenizer(str(base)).save_pretrained(tmp_path / "classifier")
    result = tune(settings(tmp_path / "classifier", data, tmp_path / "run", train__epochs=1))
    assert result.test["labels"] == ["positive", "negative"]


def test_a_head_of_another_size_is_replaced(base, data, tmp_path):
    model, _ = hf.load_model(str(base), Classification("cross_entropy", ("a", "b", "c")), seed=3)
    model.save_pretrained(tmp_path / "classifier")
    hf.load_tokenizer(str(base)).save_pretrained(tmp_path / "classifier")
    told = Recorder()
    result = tune(settings(tmp_path / "classifier", data, tmp_path / "run", train__epochs=1), listener=told)
    assert result.test["labels"] == ["negative", "positive"]
    assert "new, drawn under seed 0: classifier.bias, classifier.weight" in told.notes


# ---------------------------------------------------------------- bad input


def test_a_directory_with_other_files_is_refused_and_an_empty_one_is_used(base, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        tune(settings(base, data, tmp_path / "full"))
    (tmp_path / "empty").mkdir()
    tune(settings(base, data, tmp_path / "empty", train__epochs=1))
    assert (tmp_path / "empty" / "delta.safetensors").is_file()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model__name": "./no/such/folder"}, FileNotFoundError, "is not a folder; expected a Hugging Face"),
        ({"data__path": "none.csv"}, FileNotFoundError, "data: path is none.csv"),
        ({"data__test": "none.csv"}, FileNotFoundError, "data: test is none.csv"),
        ({"data__max_length": 65}, ValueError, "max_length is 65; expected at most 64"),
        ({"select__parameters": ["lats:1"]}, ValueError, "last"),
        ({"select__parameters": ["last:3"]}, ValueError, "2"),
        (
            {"select__parameters": ["last:1"]},
            ValueError,
            "is new, untrained and not selected; expected 'head'",
        ),
        ({"optimizer__lr": 1e30}, FloatingPointError, "(loss|gradient norm) is (nan|inf) at step"),
    ],
)
def test_bad_settings_are_errors(base, data, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        tune(settings(base, data, tmp_path / "run", **values))
    if error is not FloatingPointError:
        assert not (tmp_path / "run").exists(), "a run that never began must not block the next"


def test_a_folder_without_a_model_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; expected a Hugging Face model folder"):
        tune(settings(tmp_path, data, tmp_path / "run"))


def test_cuda_where_there_is_none_is_an_error(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda'; expected 'cpu' or 'auto'"):
        tune(settings(base, data, tmp_path / "run", train__device="cuda"))
