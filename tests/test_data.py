"""Reading, cleaning and splitting labelled text, with every kind of bad input."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import chain
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from superfine.config import DataConfig
from superfine.data import Rows, load_splits, read_rows, remove_duplicates, stratified_split
from superfine.labels import number_label
from superfine.tasks import Classification, Regression
from tiny_models import sentiment_rows, write_csv, write_jsonl


def file(tmp_path, content: str | bytes, name: str = "data.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    return read_rows(path, ("text",), "label", **options)


# ---------------------------------------------------------------- reading


def test_csv_with_quotes_commas_and_line_breaks(tmp_path):
    rows = read(file(tmp_path, 'id,text,label\r\n1,"a, ""b""\nc",x\r\n\r\n2,d,y\r\n'))
    assert rows.texts == [('a, "b"\nc',), ("d",)]
    assert rows.labels == ["x", "y"]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert read(file(tmp_path, b"\xef\xbb\xbftext,label\na,x\n")).labels == ["x"]


def test_tsv(tmp_path):
    assert read(file(tmp_path, "text\tlabel\na, b\tx\n", "data.tsv")).texts == [("a, b",)]


def test_jsonl_labels_may_be_strings_integers_booleans_and_whole_floats(tmp_path):
    labels = ["x", 3, True, 2.0]
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": label} for label in labels])
    assert read(path).labels == ["x", "3", "true", "2"]


def test_line_separators_inside_a_text_do_not_split_a_line(tmp_path):
    path = file(tmp_path, json.dumps({"text": "a\u2028b\x0bc", "label": "x"}, ensure_ascii=False), "d.jsonl")
    assert read(path).texts == [("a\u2028b\x0bc",)]


def test_two_text_columns_make_pairs(tmp_path):
    path = file(tmp_path, "q,a,label\nwhy,so,x\n")
    assert read_rows(path, ("q", "a"), "label").texts == [("why", "so")]


def test_numbers_are_read_for_regression(tmp_path):
    assert read(file(tmp_path, "text,label\na,-0.5\nb,1e3\n"), parse=number_label).labels == [-0.5, 1000.0]


def test_other_encodings_by_name(tmp_path):
    path = file(tmp_path, "text,label\ncafé,x\n".encode("latin-1"))
    assert read(path, encoding="latin-1").texts == [("café",)]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "data.csv", "is empty; expected rows"),
        ("\n \n", "data.csv", "is empty; expected rows"),
        ("text,label\n", "data.csv", "has no usable row"),
        ("text,label\na,x\n", "data.xlsx", "has the suffix '.xlsx'; expected .csv, .tsv or .jsonl"),
        ("texts,label\na,x\n", "data.csv", "has no column 'text'; .*'texts', 'label'; did you mean 'texts'?"),
        ("text,sentiment\na,x\n", "data.csv", "has no column 'label'; expected one of 'text', 'sentiment'"),
        ("text,label,text\na,x,b\n", "data.csv", "has several columns 'text'"),
        (
            "text,label\na,x\nb\n",
            "data.csv",
            r"1 unreadable line, the first is line 3 \(1 fields; expected 2\)",
        ),
        ('text,label\n"a"b,x\nc,y\n', "data.csv", "1 unreadable line, the first is line 2"),
        ("text,label\n ,x\n,y\na,z\n", "data.csv", r"2 unreadable lines, .* line 2 \(text is empty\)"),
        ("text,label\na,\n", "data.csv", r"line 2 \(label is empty\)"),
        ('{"text": "a", "label": "x"}\n{"text": "a"\n', "data.jsonl", r"line 2 \(not JSON"),
        ('{"text": "a", "label": "x"}\n[1]\n', "data.jsonl", r"line 2 \(a JSON list; expected an object\)"),
        ('{"text": "a", "label": "x"}\n{"label": "y"}\n', "data.jsonl", r"line 2 \(no key 'text'\)"),
        ('{"text": 7, "label": "x"}\n', "data.jsonl", r"line 1 \(text is 7; expected text\)"),
        ('{"text": "a", "label": null}\n', "data.jsonl", r"line 1 \(label is empty\)"),
        ('{"text": "a", "label": 0.5}\n', "data.jsonl", "label is 0.5; expected a class name"),
        ("[1]\n[2]\n", "data.jsonl", "no line holds a JSON object; line 1: a JSON list"),
        (
            b"text,label\na,x\ncaf\xe9,y\n",
            "data.csv",
            'is not utf-8: line 3 has the byte 0xe9; expected data.encoding = "latin-1"',
        ),
        ("text,label\na,x\n".encode("utf-16"), "data.csv", 'data.encoding = "utf-16"'),
    ],
)
def test_bad_files_are_errors_that_say_where(tmp_path, content, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(file(tmp_path, content, name))
    assert name in str(caught.value) or "no line holds" in str(caught.value)


@pytest.mark.parametrize("value", ["x", "nan", "inf"])
def test_regression_needs_finite_numbers(tmp_path, value):
    with pytest.raises(ValueError, match=r"line 2 \(label is "):
        read(file(tmp_path, f"text,label\na,{value}\n"), parse=number_label)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv is not a file; expected a .csv, .tsv or .jsonl"):
        read(tmp_path / "none.csv")


def test_bad_lines_can_be_skipped_and_are_counted(tmp_path):
    # A stray quote would swallow the rows after it: reading goes on at the very next line.
    rows = read(file(tmp_path, 'text,label\na,x\n"b,x\nc,y\nd\n,y\ne,z\n'), on_bad_line="skip")
    assert rows.texts == [("a",), ("c",), ("e",)]
    assert rows.skipped == 3


# ---------------------------------------------------------------- duplicates


def test_the_first_of_equal_texts_stays_and_conflicts_are_counted():
    rows = Rows([("a",), ("b",), ("a",), ("a",)], ["x", "y", "x", "y"])
    (kept,), duplicates, conflicts = remove_duplicates([rows])
    assert (kept.texts, kept.labels) == ([("a",), ("b",)], ["x", "y"])
    assert (duplicates, conflicts) == (2, 1)


def test_equal_means_exactly_equal():
    (kept,), duplicates, _ = remove_duplicates([Rows([("a",), ("A",), ("a ",)], ["x"] * 3)])
    assert (len(kept), duplicates) == (3, 0)


def test_a_text_in_two_files_stays_in_the_held_out_one(tmp_path):
    train = write_csv(tmp_path / "train.csv", [*sentiment_rows(30), ("leak", "positive")])
    test = write_csv(tmp_path / "test.csv", [("leak", "positive"), ("other", "negative")])
    splits = load_splits(DataConfig(path=str(train), test=str(test)), Classification())
    assert ("leak",) in splits.test.texts
    assert ("leak",) not in splits.train.texts + splits.validation.texts
    assert splits.duplicates == 1


# ---------------------------------------------------------------- splitting


def test_split_is_stratified_complete_and_reproducible():
    labels = ["a"] * 100 + ["b"] * 40 + ["c"] * 10
    parts = stratified_split(labels, 0.2, 0.1, seed=0)
    assert sorted(chain(*parts)) == list(range(150))
    assert [Counter(labels[i] for i in part) for part in parts] == [
        {"a": 70, "b": 28, "c": 7},
        {"a": 20, "b": 8, "c": 2},
        {"a": 10, "b": 4, "c": 1},
    ]
    assert stratified_split(labels, 0.2, 0.1, seed=0) == parts
    assert stratified_split(labels, 0.2, 0.1, seed=1) != parts


def test_split_is_the_same_on_every_machine():
    # Recorded once: a change here would silently change everybody's splits.
    recorded = ([1, 2, 4, 7, 8, 9], [3, 6], [0, 5])
    assert stratified_split(["a", "b"] * 5, 0.2, 0.2, seed=7) == recorded


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fractions=st.tuples(st.floats(0.01, 0.6), st.floats(0.01, 0.39)),
    seed=st.integers(0, 100),
)
def test_every_class_of_three_or_more_is_in_every_split(sizes, fractions, seed):
    labels = [str(name) for name, size in enumerate(sizes) for _ in range(size)]
    parts = stratified_split(labels, *fractions, seed)
    assert sorted(chain(*parts)) == list(range(len(labels)))
    for name, size in enumerate(sizes):
        counts = [sum(labels[i] == str(name) for i in part) for part in parts]
        assert all(counts) if size >= 3 else counts == [size, 0, 0]


def test_load_splits_reports_what_it_did(tmp_path):
    rows = sentiment_rows(40)
    content = [*rows, rows[0], (rows[1][0], "positive"), ("", "positive"), ("rare one", "mixed")]
    splits = load_splits(
        DataConfig(path=str(write_csv(tmp_path / "d.csv", content)), on_bad_line="skip"), Classification()
    )
    assert (splits.skipped, splits.duplicates, splits.conflicts) == (1, 2, 1)
    assert splits.labels == ("mixed", "negative", "positive")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (33, 4, 4)
    assert splits.notes == ["class 'mixed' has 1 row: too few to split, all in train"]


def test_integer_classes_are_ordered_by_number(tmp_path):
    rows = [(f"text {i}", str(i % 11)) for i in range(66)]
    splits = load_splits(DataConfig(path=str(write_csv(tmp_path / "d.csv", rows))), Classification())
    assert splits.labels == tuple(map(str, range(11)))


def test_limit_draws_by_seed(tmp_path):
    path = str(write_csv(tmp_path / "d.csv", sentiment_rows(60)))
    chosen = [load_splits(DataConfig(path=path, limit=20, seed=seed), Classification()) for seed in (0, 0, 1)]
    sizes = [len(splits.train) + len(splits.validation) + len(splits.test) for splits in chosen]
    assert sizes == [20, 20, 20]
    assert chosen[0].fingerprint() == chosen[1].fingerprint() != chosen[2].fingerprint()


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([("a", "x"), ("b", "x"), ("c", "x")], Classification(), r"only one class \('x'\) to train on"),
        (
            [(f"t{i}", "xyz"[i % 3]) for i in range(9)],
            Classification("binary_cross_entropy"),
            "3 classes; expected two",
        ),
        ([("a", "x"), ("b", "y")], Classification(), "the validation split is empty"),
        ([("a", "1"), ("b", "2")], Regression(), "the validation split is empty"),
    ],
)
def test_data_that_cannot_train_is_an_error(tmp_path, rows, task, message):
    with pytest.raises(ValueError, match=message):
        load_splits(DataConfig(path=str(write_csv(tmp_path / "d.csv", rows))), task)


def test_a_class_that_only_the_test_file_has_is_an_error(tmp_path):
    train = write_csv(tmp_path / "train.csv", sentiment_rows(20))
    test = write_csv(tmp_path / "test.csv", [("odd", "mixed")])
    with pytest.raises(ValueError, match="the test split has the class 'mixed', which no training row has"):
        load_splits(DataConfig(path=str(train), test=str(test)), Classification())


# ---------------------------------------------------------------- datasets


def test_without_the_datasets_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_splits(DataConfig(dataset="imdb"), Classification())


class FakeTable(list):
    """What load_splits uses of a datasets.Dataset."""

    column_names = ("text", "label")

    def __init__(self, rows):
        super().__init__(rows)
        self.features = {"label": type("ClassLabel", (), {"names": ["neg", "pos"]})(), "text": None}


def test_dataset_splits_and_class_names_are_used(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return FakeTable([{"text": f"{split} {i}", "label": i % 2} for i in range(20)])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    splits = load_splits(DataConfig(dataset="imdb", test="test"), Classification())
    assert calls == [("imdb", None, "train"), ("imdb", None, "test")]
    assert splits.labels == ("neg", "pos")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 20)


def test_unlabelled_dataset_rows_are_bad_lines(monkeypatch):
    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: FakeTable([{"text": "a", "label": 1}, {"text": "b", "label": -1}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match=r"imdb \(train\) has 1 unreadable line, the first is line 2"):
        load_splits(DataConfig(dataset="imdb"), Classification())
