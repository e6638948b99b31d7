"""Scores by hand, batches and their padding, and evaluation that leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from superfine import hf
from superfine.data import Rows, read_rows
from superfine.evaluate import evaluate
from superfine.tasks import Classification, Regression
from tiny_models import sentiment_rows, write_csv

pytestmark = pytest.mark.usefixtures("one_thread")


def test_macro_f1_and_accuracy_by_hand():
    task = Classification("cross_entropy", ("a", "b", "c"))
    predicted = torch.tensor([0, 0, 1, 1, 1])
    scores = task.metrics(torch.eye(3)[predicted], torch.tensor([0, 1, 1, 1, 0]))
    assert scores["confusion"] == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert scores["accuracy"] == 0.6
    assert scores["f1_macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)  # c does not occur


def test_pearson_is_undefined_for_a_constant():
    task = Regression()
    assert task.metrics(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))["pearson"] is None
    scores = task.metrics(torch.tensor([[2.0], [4.0], [6.0]]), torch.tensor([1.0, 2.0, 3.0]))
    assert scores["pearson"] == pytest.approx(1)
    assert scores["mae"] == pytest.approx(2)


def test_evaluation_does_not_depend_on_the_batch_size_and_restores_modes(base):
    task = Classification("cross_entropy", ("negative", "positive"), max_length=32)
    tokenizer = hf.load_tokenizer(str(base))
    model, _ = hf.load_model(str(base), task, seed=0)
    texts, labels = zip(*sentiment_rows(11), strict=True)
    encoded = hf.encode(Rows([(text,) for text in texts], list(labels)), tokenizer, task)
    model.train()
    model.classifier.eval()
    scores = [
        evaluate(model, encoded, task, batch_size=size)["loss"] for size in (1, 4, 11)
    ]  # 4 leaves 3 over
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)
    assert model.bert.training
    assert not model.classifier.training


def test_batches_are_padded_to_their_longest_text(base):
    task = Classification("cross_entropy", ("x",), max_length=6)
    tokenizer = hf.load_tokenizer(str(base))
    encoded = hf.encode(Rows([("good",), ("bad film",), ("a " * 20,)], ["x"] * 3), tokenizer, task)
    assert encoded.lengths() == [3, 4, 6]
    assert encoded.truncated == 1
    inputs, targets = encoded.batch([1, 0], "cpu")
    assert inputs["input_ids"].shape == (2, 4)
    assert inputs["input_ids"][1, 3] == tokenizer.pad_token_id
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert targets.tolist() == [0, 0]
    encoded.padding_side = "left"
    assert encoded.batch([1, 0], "cpu")[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_the_order_of_an_epoch_is_the_same_everywhere():
    # Recorded once: a change here would make old runs resume into another order.
    assert hf.epoch_order(8, seed=0, epoch=0) == [0, 6, 4, 3, 1, 7, 2, 5]
    assert hf.epoch_order(8, seed=0, epoch=1) != hf.epoch_order(8, seed=0, epoch=0)


def test_an_unknown_label_is_an_error(tmp_path):
    rows = read_rows(write_csv(tmp_path / "d.csv", [("a", "positve")]), ("text",), "label")
    with pytest.raises(ValueError, match="label is 'positve'; expected one of 'negative', 'positive'"):
        Classification("cross_entropy", ("negative", "positive")).targets(rows.labels)
