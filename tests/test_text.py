"""Text for language models: what is read, where it is cut, and blocks that lose no token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfine.config import DataConfig
from superfine.data import Rows, load_splits
from superfine.tasks import CausalLM
from superfine.text import blocks, cut, read_text
from tiny_models import story, write_csv, write_jsonl


def rows(*texts: str) -> Rows:
    return Rows([(text,) for text in texts], [None] * len(texts))


def joined(part: Rows) -> str:
    return "".join(text for (text,) in part.texts)


# --- reading --------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_text_with_lines_that_end_alike(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo, naïve\rthree\n".encode())
    found = read_text(tmp_path / "a.txt", "text")
    assert found.texts == [("one\n\ntwo, naïve\nthree\n",)]
    assert found.labels == [None]


def test_a_folder_is_read_by_name_with_folders_inside_and_empty_files_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("b.txt", "b"),
        ("a.md", "a"),
        ("sub/c.TXT", "c"),
        ("empty.txt", " \n"),
        ("d.csv", "d"),
    ):
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path, "text").texts == [("a",), ("b",), ("c",)]


def test_tables_have_a_text_column_and_need_no_label(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one", "1"), ("two", "2")], header=("body", "stars"))
    assert read_text(path, "body").texts == [("one",), ("two",)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    with pytest.raises(ValueError, match=r"1 unreadable line, the first is line 2 \(text is empty\)"):
        read_text(path, "text")
    found = read_text(path, "text", on_bad_line="skip")
    assert (found.texts, found.skipped) == ([("one",), ("two",)], 1)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.txt", None, FileNotFoundError, "is not a file; expected a text file"),
        ("none.csv", None, FileNotFoundError, r"is not a file; expected a \.csv"),
        ("a.txt", b" \n\n", ValueError, "is empty; expected text"),
        ("a.txt", b"one\n\xff", ValueError, "is not utf-8: line 2 has the byte 0xff"),
        ("a.csv", b"", ValueError, "is empty; expected rows with text$"),
        ("a.csv", b"body\nx\n", ValueError, "has no column 'text'"),
        ("a.rst", b"x", ValueError, r"suffix '.rst'; expected \.txt, \.text, \.md, \.csv, \.tsv or \.jsonl$"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_text(tmp_path / name, "text")


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without text in \.txt, \.text, \.md files"):
        read_text(tmp_path, "text")


# --- cutting --------------------------------------------------------------------------------------------------


def test_a_text_is_cut_at_blank_lines_in_order():
    text = story(100)
    train, validation, test = cut(rows(text), 0.1, 0.2)
    assert joined(train) + joined(validation) + joined(test) == text
    assert joined(train).endswith("\n\n")
    assert joined(validation).endswith("\n\n")
    assert len(joined(validation)) == pytest.approx(0.1 * len(text), rel=0.2)
    assert len(joined(test)) == pytest.approx(0.2 * len(text), rel=0.1)


def test_lines_of_windows_are_cut_at_blank_lines_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(story(100).replace("\n", "\r\n").encode())
    for part in cut(read_text(tmp_path / "a.txt", "text"), 0.1, 0.1)[:2]:
        assert joined(part).endswith(".\n\n")


@pytest.mark.parametrize(
    "length", range(2000, 2020)
)  # whether the end is within a part's share, rounding decides
def test_the_end_of_a_text_is_no_place_to_cut(length):
    text = ("word " * 500)[: length - 200] + "x" * 199 + "\n"
    train, validation, test = cut(rows(text), 0.1, 0.1)
    assert len(train) == len(validation) == len(test) == 1
    assert joined(train) + joined(validation) + joined(test) == text


@pytest.mark.parametrize("gap", [99, 101])  # a part is 100 characters
def test_a_cut_moves_on_by_no_more_than_a_part(gap):
    text = ("a " * 400 + "b " * (gap // 2) + "b" * (gap % 2) + "\n").ljust(1000, "c")
    train = joined(cut(rows(text), 0.1, 0.1)[0])
    assert train == ("a " * 400 + "b " if gap > 100 else text[: text.index("\n") + 1])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("note number 1: buy flour and milk", ["note number 1: buy flour and ", "", "milk"]),
        ("note number 1: buy some milk", ["note number 1: buy some ", "", "milk"]),
        # As in a script without spaces.
        ("1234567890" * 12, ["1234567890" * 9 + "123456", "789012345678", "901234567890"]),
    ],
)
def test_a_part_shorter_than_a_word_is_cut_before_it(text, parts):
    assert [joined(part) for part in cut(rows(text), 0.1, 0.1)] == parts


def test_of_many_short_files_whole_ones_are_drawn():
    texts = [f"note number {i}: buy some milk\n" for i in range(10)]
    long = story(100)
    parts = cut(rows(*texts[:5], long, *texts[5:]), 0.2, 0.1)
    assert sorted(text for part in parts for (text,) in part.texts if text in texts) == sorted(texts)
    assert [len(part) for part in parts] == [8, 3, 2], "each has its part of the long one, too"
    assert parts == cut(rows(*texts[:5], long, *texts[5:]), 0.2, 0.1)
    assert parts != cut(rows(*texts[:5], long, *texts[5:]), 0.2, 0.1, seed=1)


def test_without_held_out_shares_a_text_stays_whole():
    assert [part.texts for part in cut(rows(story(9)), 0.0, 0.0)] == [[(story(9),)], [], []]


def test_every_file_is_in_every_part():
    parts = cut(rows("a " * 500, "b " * 1000), 0.1, 0.1)
    for part in parts:
        assert [set(text.split()) for (text,) in part.texts] == [{"a"}, {"b"}]


@given(
    st.text(alphabet="ab \n", min_size=1, max_size=80),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_character_is_lost_but_blank_parts(text, validation, test):
    parts = cut(rows(text), validation, test)
    kept = "".join(map(joined, parts))
    assert "".join(kept.split()) == "".join(text.split())
    assert all(value.strip() for part in parts for (value,) in part.texts)


def test_splits_of_plain_text_and_of_files_for_the_held_out_parts(tmp_path):
    (tmp_path / "train.txt").write_text(story(40))
    (tmp_path / "test.txt").write_text("this is the test\n")
    config = DataConfig(path=str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"))
    splits = load_splits(config, CausalLM())
    assert splits.labels == ()
    assert splits.notes == []
    assert joined(splits.test) == "this is the test\n"
    assert joined(splits.train) + joined(splits.validation) == story(40)


def test_splits_of_rows_draw_whole_rows_without_duplicates(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, *texts[:5]]])
    splits = load_splits(DataConfig(path=str(path)), CausalLM())
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.duplicates) == (24, 3, 3, 5)
    found = [text for part in (splits.train, splits.validation, splits.test) for (text,) in part.texts]
    assert sorted(found) == sorted(texts)


def test_a_text_too_short_to_be_cut_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("word\n")
    with pytest.raises(ValueError, match=r"data: the \w+ split is empty; expected more text"):
        load_splits(DataConfig(path=str(tmp_path / "a.txt")), CausalLM())


def test_a_limit_does_not_go_with_one_long_text(tmp_path):
    (tmp_path / "a.txt").write_text(story(40))
    with pytest.raises(ValueError, match="data: limit is 3; expected none with a plain text file"):
        load_splits(DataConfig(path=str(tmp_path / "a.txt"), limit=3), CausalLM())


# --- blocks ---------------------------------------------------------------------------------------------------


def test_packed_documents_follow_each_other_each_closed_once():
    assert blocks([[5, 6, 7], [], [8], [9, 1]], 1, 4, pack=True) == [[5, 6, 7, 1], [8, 1, 9, 1]]
    assert blocks([[5, 6, 7], [8]], None, 3, pack=True) == [[5, 6, 7]], (
        "the last token alone predicts nothing"
    )
    assert blocks([], 1, 4, pack=True) == []


def test_documents_of_their_own_are_cut():
    assert blocks([[5, 6, 7], [8], [], [2, 3]], 1, 2, pack=False) == [[5, 6], [2, 3]]


@given(st.lists(st.lists(st.integers(2, 9), max_size=12), max_size=6), st.integers(2, 7))
def test_packing_keeps_every_token_in_order(documents, max_length):
    found = blocks(documents, 1, max_length, pack=True)
    stream = [token for document in documents if document for token in (*document, 1)]
    assert [token for block in found for token in block] == stream[
        : len(stream) - (len(stream) % max_length == 1)
    ]
    assert all(len(block) == max_length for block in found[:-1])
