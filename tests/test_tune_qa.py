"""superfine tune on questions: windows, spans, scores, and a run from the file to the merged folder."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from superfine import hf
from superfine.data import Rows, load_splits
from superfine.evaluate import evaluate, evaluate_saved
from superfine.tasks.qa import QuestionAnswering, best_span, exact_match, f1
from superfine.tune import tune
from tiny_models import question_rows, tiny_bert, write_csv, write_jsonl
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from tune_runs import At, CrashError, assert_same_run, crash, of_kind, settings
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("qa") / "qa.jsonl", question_rows(100))


def qa_settings(base, data, out, **values):
    options = {"model__task": "qa", "select__parameters": ["all"], "qa__stride": 4, **values}
    return settings(base, data, out, **options)


def label(value, context="one two three", **record):
    return QuestionAnswering(impossible=record.pop("impossible", False)).parse_label(
        {"context": context, "answers": value, **record}, "answers"
    )


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "record"),
    [
        ({"text": ["two"], "answer_start": [4]}, {}),
        ({"text": ["two"]}, {}),
        ({"text": "two", "answer_start": 4}, {}),
        (["two"], {}),
        ("two", {}),
        ("two", {"answer_start": "4"}),  # of a .csv file
        ("two", {"answer_start": ""}),
    ],
)
def test_every_way_to_write_an_answer(value, record):
    assert label(value, **record) == (((4, "two"),), "")


def test_several_answers_and_none():
    assert label(["one", "three"]) == (((0, "one"), (8, "three")), "")
    for nothing in ("", [], {"text": [], "answer_start": []}, None):
        assert label(nothing, impossible=True) == ((), "")
        assert "expected an answer, or qa.impossible = true" in label(nothing)[1]
    assert label("two", impossible=True, is_impossible=True) == ((), "")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("four", "'four', which is not in the context"),
        ({"text": ["two"], "answer_start": [5]}, "'two', which the context has not at character 5"),
        ({"text": ["two"], "answer_start": [-9]}, "at character -9"),
        ({"text": ["one", "two"], "answer_start": [0]}, "2 texts and 1 starts"),
        ([3], "expected a text, a list of texts"),
        (3, "expected a text, a list of texts"),
    ],
)
def test_wrong_answers_say_what_is_wrong(value, message):
    assert message in label(value)[1]


def test_questions_of_a_context_stay_together(tmp_path):
    rows = [{"question": f"q {i}", "context": f"context {i // 4} 1", "answers": "1"} for i in range(80)]
    config = qa_settings("base", write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "out")
    splits = load_splits(config.data, QuestionAnswering())
    contexts = [
        {context for _, context in part.texts} for part in (splits.train, splits.validation, splits.test)
    ]
    assert [len(part) for part in contexts] == [16, 2, 2]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]
    assert not contexts[1] & contexts[2]


# --- windows --------------------------------------------------------------------------------------------------


def windows(base, context, answer, *, max_length=16, stride=3, question="film is"):
    task = QuestionAnswering(max_length=max_length, stride=stride)
    rows = Rows([(question, context)], [((context.index(answer), answer),)])
    return hf.encode(rows, hf.load_tokenizer(str(base)), task)


def test_a_short_context_is_one_window_and_targets_are_its_tokens(base):
    encoded = windows(base, "the day was 5", "5")
    # [CLS] film is [SEP] the day was 5 [SEP]
    assert encoded.lengths() == [9]
    assert encoded.targets.tolist() == [[7, 7]]
    assert encoded.offsets[0][7] == (12, 13)
    assert encoded.offsets[0][:4] == [None] * 4
    assert windows(base, "the day was 5  ", " 5  ").targets.tolist() == [[7, 7]]  # spaces are in no token


def test_windows_overlap_and_every_token_is_in_one(base):
    context = " ".join(str(i % 10) for i in range(30)) + " good"
    encoded = windows(base, context, "good")
    assert max(encoded.lengths()) == 16
    places = [[place for place in offsets if place is not None] for offsets in encoded.offsets]
    assert {place for window in places for place in window} == {
        (i, i + len(word)) for i, word in zip(range(0, 2 * 31, 2), context.split(), strict=True)
    }
    for left, right in itertools.pairwise(places):
        assert len(set(left) & set(right)) == 3
    # The answer is in the last window alone; the others point to [CLS].
    assert [row.tolist() != [0, 0] for row in encoded.targets] == [False] * (len(encoded) - 1) + [True]
    first, last = encoded.targets[-1].tolist()
    assert encoded.offsets[-1][first] == encoded.offsets[-1][last] == (60, 64)


def test_an_answer_cut_by_the_window_is_not_in_it(base):
    context = " ".join("the" for _ in range(10)) + " good great lovely"
    encoded = windows(base, context, "good great lovely", stride=1)
    # 11 tokens of context fit: the first window ends within the answer.
    assert encoded.targets[0].tolist() == [0, 0]


def test_a_long_question_leaves_room_for_the_context(base):
    encoded = windows(base, "the day was 5", "5", question="very " * 40)
    assert max(encoded.lengths()) <= 16
    assert encoded.targets.any()


# --- spans and scores -----------------------------------------------------------------------------------------


def test_the_best_span_is_in_order_inside_and_short():
    start = torch.tensor([9.0, 1.0, 5.0, 0.0, 4.0])
    end = torch.tensor([9.0, 6.0, 0.0, 3.0, 2.0])
    inside = torch.tensor([False, True, True, True, True])
    # 5 + 3 of tokens 2 to 3; 5 + 6 would end before it begins, 9 + 9 is outside.
    assert best_span(start, end, inside, 20, 30) == (8.0, 2, 3)
    assert best_span(start, end, inside, 20, 1) == (7.0, 1, 1)
    assert best_span(start, end, inside, 1, 30) is None  # the largest of each are no span
    assert best_span(start, end, torch.zeros(5, dtype=torch.bool), 20, 30) is None


def test_the_best_window_of_a_row_answers_and_nothing_may(base):
    context = " ".join(str(i % 10) for i in range(20))
    encoded = windows(base, context, "0")
    n, longest = len(encoded), max(encoded.lengths())
    assert n > 1
    outputs = torch.zeros(n, 2, longest)
    token = next(i for i, place in enumerate(encoded.offsets[1]) if place is not None)
    outputs[1, :, token] = 2.0
    outputs[:, :, 0] = 3.0  # [CLS] is no answer
    at = encoded.offsets[1][token]
    order = list(reversed(range(n)))
    for impossible, expected in ((False, context[slice(*at)]), (True, "")):
        task = QuestionAnswering(impossible=impossible)
        assert task.predict(encoded, order, [outputs[order]]) == [expected]
    outputs[0, :, 0] = 1.0  # one window that scores "no answer" lower is enough
    assert QuestionAnswering(impossible=True).predict(encoded, order, [outputs[order]]) == [
        context[slice(*at)]
    ]


def test_exact_match_and_f1_by_hand():
    assert exact_match("The  Cat!", "cat") == 1
    assert exact_match("a cat", "cats") == 0
    assert f1("the big cat", "a cat sat") == pytest.approx(0.5)  # big cat, cat sat: 1 of 2 each
    assert f1("", "") == 1
    assert f1("the", "cat") == 0
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)


# --- runs -----------------------------------------------------------------------------------------------------


def test_a_run_learns_resumes_evaluates_and_merges(questions, tmp_path):
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    options = {"train__epochs": 5, "optimizer__lr": 1e-2, "train__patience": 0}
    result = tune(qa_settings(base, questions, tmp_path / "run", **options))
    assert result.test["loss"] < 0.7 * result.baseline["loss"]
    assert {"exact_match", "f1"} <= set(of_kind(tmp_path / "run", "validation")[0])

    with pytest.raises(CrashError):
        tune(qa_settings(base, questions, tmp_path / "again", **options), listener=At(5, crash))
    tune(qa_settings(base, questions, tmp_path / "again", **options), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")

    from superfine.cli import app

    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    scores = [
        evaluate_saved(tmp_path / name, questions, batch_size=size)
        for name, size in (("run", 3), ("merged", 32))
    ]
    assert scores[0]["rows"] == 100
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)
    assert {k: scores[0][k] for k in ("exact_match", "f1")} == {
        k: scores[1][k] for k in ("exact_match", "f1")
    }

    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("good is", "good is 3", return_tensors="pt")
    assert model(**tokens).start_logits.shape == tokens.input_ids.shape


def test_impossible_questions_and_long_contexts(tmp_path):
    base = tiny_bert(tmp_path / "base")
    rows = question_rows(40)
    for row in rows[::4]:
        row["answers"] = {"text": [], "answer_start": []}
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    options = {"qa__impossible": True, "data__max_length": 16, "train__epochs": 1}
    result = tune(qa_settings(base, data, tmp_path / "run", **options))
    assert 0 <= result.test["exact_match"] <= result.test["f1"] <= 1
    with pytest.raises(
        ValueError, match=r"10 unreadable lines, the first is line 1 \(answers is empty; expected an"
    ):
        tune(qa_settings(base, data, tmp_path / "no", **options | {"qa__impossible": False}))


def test_scores_do_not_depend_on_the_batch_size(base, questions):
    task = QuestionAnswering(max_length=16, stride=4)
    rows = task.read(questions).take(range(9))
    encoded = hf.encode(rows, hf.load_tokenizer(str(base)), task)
    model, _ = hf.load_model(str(base), task, seed=0)
    scores = [evaluate(model, encoded, task, batch_size=size) for size in (1, 5, 64)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__text": "question"}, "expected two columns, question and context, with qa"),
        ({"data__max_length": 8}, "max_length is 8; expected at least 16 with qa"),
        ({"train__loss": "mse"}, "train.loss is 'mse'; expected 'cross_entropy' with qa"),
        ({"train__label_smoothing": 0.1}, "label_smoothing is 0.1; expected 0.0 with qa"),
        ({"qa__strde": 4}, "qa.strde is not a known key; did you mean 'stride'"),
        (
            {"translation__prefix": "x"},
            r"\[translation\] is given; expected it with model.task = 'translation' only",
        ),
        ({"model__task": "classification"}, r"\[qa\] is given; expected it with model.task = 'qa' only"),
    ],
)
def test_settings_that_do_not_fit_are_errors(values, message, questions, tmp_path):
    with pytest.raises(ValueError, match=message):
        qa_settings("base", questions, tmp_path, **values)


def test_csv_and_a_model_of_another_kind(base, tmp_path):
    rows = [(row["question"], row["context"], row["answers"]["text"][0]) for row in question_rows(4)]
    read = QuestionAnswering().read(write_csv(tmp_path / "a.csv", rows, ("question", "context", "answers")))
    assert json.loads(json.dumps(read.labels[0])) == [[read.texts[0][1].index(rows[0][2]), rows[0][2]]]
    config = hf.load_config(str(base))
    config.model_type = "clip"
    with pytest.raises(
        ValueError, match="of the type 'clip'; expected one that transformers' AutoModelForQuest"
    ):
        QuestionAnswering().check_config("x", config)
