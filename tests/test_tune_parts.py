"""superfine tune with single rows and columns, and with elastic weight consolidation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from superfine import hf
from superfine.config import differing_keys, load_config, to_toml
from superfine.data import Rows
from superfine.delta import merge
from superfine.evaluate import load_run
from superfine.tasks import Translation
from superfine.tune import tune
from tiny_models import sentiment_rows, story, tiny_llama, tiny_t5, translation_rows, write_csv
from tune_runs import At, CrashError, Recorder, assert_same_run, crash, of_kind, settings

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")

EMBEDDING, QUERY = (
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.1.attention.self.query.weight",
)


def slices_of(base, data, out, **values):
    options = {
        "select__parameters": ["head"],
        "select__rows": {"word_embeddings": "tokens"},
        "select__cols": {"*.layer.1.*.query": 0.25, "*.layer.1.*.key": "random:0.25"},
        "select__seed": 3,
        "train__epochs": 1,
    }
    return settings(base, data, out, **options | values)


def test_rows_and_columns_train_resume_and_are_saved_alone(base, data, tmp_path):
    told = Recorder()
    result = tune(slices_of(base, data, tmp_path / "run"), listener=told)
    delta = load_file(tmp_path / "run" / "delta.safetensors")
    start = load_file(base / "model.safetensors")
    rows = delta[f"{EMBEDDING}_rows.indices"]
    assert {2, 3} <= set(rows.tolist())  # [CLS] and [SEP] are in every text, [MASK] in none
    assert 4 not in rows.tolist()
    assert delta[f"{QUERY}_cols"].shape == (32, 8)
    assert EMBEDDING not in delta

    with pytest.raises(CrashError):
        tune(slices_of(base, data, tmp_path / "again"), listener=At(8, crash))
    with pytest.raises(ValueError, match=r"select\.seed \(was 3, now 4\)"):
        tune(slices_of(base, data, tmp_path / "again", select__seed=4), resume=True)
    tune(slices_of(base, data, tmp_path / "again"), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")

    merge(base, tmp_path / "run" / "delta.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    tuned, was = merged[EMBEDDING], start[EMBEDDING.removeprefix("bert.")]
    assert torch.equal(tuned[rows], delta[f"{EMBEDDING}_rows"])
    moved = (tuned != was).any(1).nonzero().flatten()
    assert set(moved.tolist()) <= set(rows.tolist())
    assert len(moved) > len(rows) // 2
    chosen = delta[f"{QUERY}_cols.indices"]
    assert (
        chosen.tolist()
        == start[QUERY.removeprefix("bert.")].norm(dim=0).topk(8).indices.sort().values.tolist()
    )
    model, _, _ = load_run(tmp_path / "run")
    assert torch.equal(model.state_dict()[EMBEDDING], tuned)
    assert result.summary["num_trainable"] == sum(
        v.numel() for name, v in delta.items() if not name.endswith("indices") and "position_ids" not in name
    )


def test_rows_of_a_tied_head_get_a_weight_of_their_own(tmp_path):
    llama = tiny_llama(tmp_path / "base", tied=True)
    (tmp_path / "text.txt").write_text(story(20))
    options = {"model__task": "causal-lm", "select__parameters": ["last:1"], "train__epochs": 1}
    options |= {"select__rows": {"lm_head": "norm:0.25"}, "select__tied": "head"}
    result = tune(settings(llama, tmp_path / "text.txt", tmp_path / "run", **options))
    assert result.test["loss"] < result.baseline["loss"]
    model, _, _ = load_run(tmp_path / "run")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tokens_of_a_translation_are_those_of_both_sides(tmp_path):
    base = tiny_t5(tmp_path / "base")
    pairs = translation_rows(5)
    rows = Rows([(source,) for source, _ in pairs], [target for _, target in pairs])
    tokenizer = hf.load_tokenizer(str(base))
    encoded = hf.encode(rows, tokenizer, Translation(max_length=32), hf.load_config(str(base)))
    words = {word for pair in pairs for text in pair for word in text.split()}
    assert encoded.vocabulary() == {1, *tokenizer.convert_tokens_to_ids(sorted(words))}


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    """A model that knows a task, and held-back samples of it."""
    folder = tmp_path_factory.mktemp("tuned")
    tune(settings(base, data, folder / "run", select__parameters=["all"], train__epochs=5))
    merge(base, folder / "run" / "delta.safetensors", folder / "merged")
    return folder / "merged", write_csv(folder / "old.csv", sentiment_rows(30, seed=9))


def consolidated(tuned, out, new, **values):
    options = {
        "original__path": str(tuned[1]),
        "ewc__strength": 1e5,
        "ewc__samples": 20,
        "train__epochs": 1,
    }
    return settings(tuned[0], new, out, **options | values)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """The other way round: what was positive is negative."""
    other = {"positive": "negative", "negative": "positive"}
    rows = [(text, other[label]) for text, label in sentiment_rows(100, seed=5)]
    return write_csv(tmp_path_factory.mktemp("new") / "new.csv", rows)


def test_a_consolidated_run_forgets_less_and_resumes(tuned, new, tmp_path):
    told = Recorder()
    kept = tune(consolidated(tuned, tmp_path / "run", new), listener=told)
    assert any(
        note.startswith("EWC: strength 100000.0, Fisher information of 20 samples") for note in told.notes
    )
    assert "the Fisher information is of the same rows: ewc.path keeps it apart from the score" in told.notes
    penalties = [event["ewc_penalty"] for event in of_kind(tmp_path / "run", "train")]
    assert penalties[0] == 0
    assert penalties[-1] > 0
    plain = tune(settings(tuned[0], new, tmp_path / "plain", train__epochs=1, original__path=str(tuned[1])))
    assert kept.original["base"] == plain.original["base"]
    assert kept.original["tuned"]["loss"] < plain.original["tuned"]["loss"] - 0.1

    with pytest.raises(CrashError):
        tune(consolidated(tuned, tmp_path / "again", new), listener=At(5, crash))
    tune(consolidated(tuned, tmp_path / "again", new), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_other_original_data_are_refused_by_resume(tuned, new, tmp_path):
    old = write_csv(tmp_path / "old.csv", sentiment_rows(20, seed=1))
    fisher = write_csv(tmp_path / "fisher.csv", sentiment_rows(40, seed=1))
    config = consolidated((tuned[0], old), tmp_path / "run", new, ewc__path=str(fisher))
    told = Recorder()
    told.on_step = At(4, crash).on_step
    with pytest.raises(CrashError):
        tune(config, listener=told)
    assert "20 of 40 rows for the Fisher information are held back, so left out" in told.notes
    write_csv(old, sentiment_rows(20, seed=2))
    with pytest.raises(ValueError, match="the original data is not what the run began with"):
        tune(config, resume=True)


def test_a_new_head_cannot_be_consolidated(base, data, tuned, tmp_path):
    with pytest.raises(
        ValueError, match=r"ewc: classifier.* is new and untrained; expected a model that knows"
    ):
        tune(consolidated((base, tuned[1]), tmp_path / "run", data))
    assert not (tmp_path / "run").exists()


def test_tokens_are_of_the_embedding_of_tokens_alone(base, data, tmp_path):
    rows = {"*.position_embeddings": "tokens"}
    with pytest.raises(
        ValueError, match=r"is 'tokens' and matches .*position_embeddings.weight'; expected the emb"
    ):
        tune(slices_of(base, data, tmp_path / "run", select__rows=rows))
    assert not (tmp_path / "run").exists()


def test_slices_survive_the_round_trip_through_toml(base, data, tmp_path):
    config = slices_of(base, data, tmp_path / "run", select__cols={"*.key": [3, 1], 'odd "name"': 0.1})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config
    assert differing_keys(config, slices_of(base, data, tmp_path / "run")) == ["select.cols"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"select__parameters": [], "select__rows": {}, "select__cols": {}},
            "select: parameters is []; expected at",
        ),
        (
            {"select__rows": {"a": [1.5]}},
            "select: rows['a'] is [1.5]; expected a list of indices, a fraction",
        ),
        ({"select__rows": {"a": True}}, "select: rows['a'] is True; expected"),
        ({"select__cols": {"a": "tokens"}}, "select: cols['a'] is 'tokens'; expected a list of indices"),
        ({"select__rows": ["a"]}, "select.rows is ['a']; expected dictionary"),
        ({"select__tied": "none"}, "select.tied is 'none'; expected 'both' or 'head'"),
        ({"train__prepare": False}, "train.prepare is false; expected true with select.rows and select.cols"),
        ({"ewc__strength": 1.0}, "ewc.path is missing; expected it, or a section [original]"),
        ({"ewc__strength": 0.0}, "ewc.strength is 0.0; expected greater than 0"),
        ({"ewc__text": "a", "original__path": "b"}, "ewc: text or label is given without path"),
        (
            {"ewc__zzz": 1.0},
            "ewc.zzz is not a known key; expected one of text, label, path, strength, samples",
        ),
    ],
)
def test_an_error_names_the_key(values, message, base, data, tmp_path):
    with pytest.raises(ValueError) as caught:
        slices_of(base, data, tmp_path / "run", **values)
    assert message in str(caught.value)
