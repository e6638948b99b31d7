"""superfine tune on translations and regression: loss, what is written, its scores, and runs to the merged folder."""

from __future__ import annotations

import sys

import pytest
import sacrebleu
import torch
from superfine import hf
from superfine.data import Rows
from superfine.evaluate import evaluate, evaluate_saved
from superfine.tasks import Regression, Run, Translation, of_config, of_dict
from superfine.tune import tune
from tiny_models import tiny_t5, translation_rows, write_csv
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
from tune_runs import At, CrashError, Recorder, assert_same_run, crash, of_kind, settings
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5"), dropout=0.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_csv(
        tmp_path_factory.mktemp("pairs") / "pairs.csv", translation_rows(120), ("source", "target")
    )


def translation_settings(base, data, out, **values):
    options = {
        "model__task": "translation",
        "translation__prefix": "de: ",
        "translation__max_target_length": 10,
        "select__parameters": ["all"],
        **values,
    }
    return settings(base, data, out, **options)


def encoded_pairs(t5, pairs, **options):
    task = Translation(max_length=32, max_target_length=10, **options)
    rows = task.read(pairs).take(range(9))
    model, _ = hf.load_model(str(t5), task, seed=0)
    return task, model, hf.encode(rows, hf.load_tokenizer(str(t5)), task)


# --- translation --------------------------------------------------------------------------------------------------


def test_a_run_learns_resumes_evaluates_and_merges(t5, pairs, tmp_path):
    options = {"train__epochs": 4, "optimizer__lr": 1e-2}
    result = tune(translation_settings(t5, pairs, tmp_path / "run", **options))
    assert result.test["loss"] < 0.7 * result.baseline["loss"]
    assert result.test["chrf"] > result.baseline["chrf"]
    assert 0 <= result.test["bleu"] <= 100
    validation = of_kind(tmp_path / "run", "validation")[0]
    assert "perplexity" in validation
    assert "bleu" not in validation

    with pytest.raises(CrashError):
        tune(translation_settings(t5, pairs, tmp_path / "again", **options), listener=At(8, crash))
    tune(translation_settings(t5, pairs, tmp_path / "again", **options), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")

    from superfine.cli import app

    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    scores = [
        evaluate_saved(tmp_path / name, pairs, batch_size=size) for name, size in (("run", 7), ("merged", 32))
    ]
    assert scores[0]["rows"] == 120
    for key in ("loss", "chrf", "bleu"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-5)

    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = model.generate(**tokenizer("de: the film is", return_tensors="pt"), max_new_tokens=10)
    assert ids.shape[0] == 1
    assert of_config(model.config) == Translation(max_length=32, prefix="de: ", max_target_length=10)


def test_fused_and_eager_losses_agree_and_weigh_every_token(t5, pairs):
    task, model, encoded = encoded_pairs(t5, pairs)
    total = count = 0.0
    with torch.no_grad():
        for i in range(len(encoded)):
            inputs, targets = encoded.batch([i], "cpu")
            logits = model(**inputs, labels=targets).logits.double()
            total += torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum").item()
            count += targets.numel()
    eager = evaluate(model, encoded, task, batch_size=4)
    assert task.fuse(model, True) == ""
    fused = evaluate(model, encoded, task, batch_size=2)
    assert eager["loss"] == pytest.approx(total / count, rel=1e-5)
    assert fused["loss"] == pytest.approx(total / count, rel=1e-5)
    assert eager["bleu"] == fused["bleu"]
    assert encoded.tokens() == count


def test_targets_end_and_are_padded_with_what_is_ignored(t5, pairs):
    _, _, encoded = encoded_pairs(t5, pairs, prefix="de: ")
    tokenizer = hf.load_tokenizer(str(t5))
    inputs, targets = encoded.batch([0, 1, 2], "cpu")
    assert (inputs["input_ids"][:, 0] == tokenizer.convert_tokens_to_ids("de:")).all()
    for row, target in enumerate(encoded.targets[:3]):
        assert target[-1] == tokenizer.eos_token_id
        assert targets[row].tolist() == target + [-100] * (targets.shape[1] - len(target))


def test_written_texts_are_in_the_order_of_the_rows_and_scored_by_sacrebleu(t5, pairs):
    task, model, encoded = encoded_pairs(t5, pairs)
    written = [task.predict(model, encoded, Run(batch_size=size)) for size in (1, 4)]
    assert written[0] == written[1]
    assert len(written[0]) == 9
    scores = evaluate(model, encoded, task)
    assert scores["bleu"] == sacrebleu.corpus_bleu(written[0], [encoded.references]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(written[0], [encoded.references]).score


def test_text_is_written_when_it_is_asked_for(t5, pairs):
    for generate, expected in (
        ("never", [False, False]),
        ("test", [False, True]),
        ("validation", [True, True]),
    ):
        task, model, encoded = encoded_pairs(t5, pairs, generate=generate)
        scores = [evaluate(model, encoded, task, final=final) for final in (False, True)]
        assert ["chrf" in found for found in scores] == expected


def test_without_sacrebleu_the_error_comes_first_and_says_what_to_do(t5, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        ImportError, match=r"superfine\[translation\]'?, or set translation.generate = 'never'"
    ):
        tune(translation_settings(t5, pairs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    options = {"translation__generate": "never", "train__epochs": 1}
    assert "bleu" not in tune(translation_settings(t5, pairs, tmp_path / "run", **options)).test


def test_another_kind_of_model_and_a_model_that_cannot_be_fused(base, t5, pairs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is a BertModel; expected an encoder-decoder with a head"):
        tune(translation_settings(base, pairs, tmp_path / "run"))

    def refuse(model, logits):
        raise ValueError("the head is odd")

    monkeypatch.setattr("superfine.tasks.translation.use_fused_loss", refuse)
    told = Recorder()
    options = {"train__epochs": 1, "translation__generate": "never"}
    tune(translation_settings(t5, pairs, tmp_path / "run", **options), listener=told)
    assert "the loss is the model's own, with logits: the head is odd" in told.notes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__text": ["a", "b"]}, "expected one column with translation"),
        ({"data__label": "source"}, "label and text are both 'source'"),
        ({"data__pack": False}, "data.pack is false; expected it with model.task = 'causal-lm' only"),
        ({"translation__generate": "often"}, "translation.generate is 'often'; expected 'never', 'test' or"),
    ],
)
def test_settings_that_do_not_fit_are_errors(values, message, t5, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        translation_settings(t5, pairs, tmp_path, **values)


# --- regression -----------------------------------------------------------------------------------------------------


def test_regression_by_name_and_by_loss_is_the_same_run(base, tmp_path):
    rows = [(f"the film is {'good' if i % 3 else 'bad'} {i}", str(1.5 if i % 3 else -1.0)) for i in range(60)]
    data = write_csv(tmp_path / "d.csv", rows)
    named = tune(settings(base, data, tmp_path / "a", model__task="regression"))
    by_loss = tune(settings(base, data, tmp_path / "b", train__loss="mse"))
    assert named.test == by_loss.test
    assert set(named.test) == {"loss", "mse", "mae", "pearson", "spearman"}
    assert named.test["loss"] == pytest.approx(named.test["mse"], rel=1e-5)
    assert named.test["mse"] < named.baseline["mse"]

    from superfine.cli import app

    assert CliRunner().invoke(app, ["merge", str(tmp_path / "a"), str(tmp_path / "merged")]).exit_code == 0
    merged = evaluate_saved(tmp_path / "merged", data)
    assert merged["mse"] == pytest.approx(evaluate_saved(tmp_path / "a", data)["mse"], rel=1e-5)
    (found,) = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")("the film is good 3")
    task = of_config(hf.load_config(str(tmp_path / "merged")))
    encoded = hf.encode(
        Rows([("the film is good 3",)], [0.0]), hf.load_tokenizer(str(tmp_path / "merged")), task
    )
    model, _ = hf.load_model(str(tmp_path / "merged"), task, seed=0)
    inputs, _ = encoded.batch([0], "cpu")
    assert found["score"] == pytest.approx(model(**inputs).logits.item(), rel=1e-4)


def test_spearman_by_hand():
    x, y = torch.tensor([[1.0], [2.0], [2.0], [9.0]]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    scores = Regression().metrics(x, y)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 of 4.5 and 5.
    assert scores["spearman"] == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert Regression().metrics(x**3, y)["spearman"] == scores["spearman"]
    assert Regression().metrics(torch.ones(4, 1), y)["spearman"] is None


# --- descriptions ---------------------------------------------------------------------------------------------------


def test_descriptions_of_the_first_version_are_read():
    old = {"loss": "mse", "labels": [], "text": ["t"], "label": "y", "max_length": 9, "pack": True}
    old["kind"] = "classification"
    assert of_dict(old) == Regression(text=("t",), label="y", max_length=9)
    with pytest.raises(ValueError, match="kind is 'poetry'; expected one of classification, regression"):
        of_dict({"loss": "mse", "labels": [], "kind": "poetry"})
    with pytest.raises(ValueError, match="task: description is"):
        of_dict({"loss": "mse", "labels": [], "weird": 1})
