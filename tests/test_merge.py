"""Merging a delta into a model folder: it gives the tuned model, and what cannot be merged is refused."""

from __future__ import annotations

import errno
import json

import pytest
import torch
import transformers
from small_models import bert, gpt2, llama, logits, perturb, t5
from superfine import delta as delta_module
from superfine import slices
from superfine.delta import merge, save_delta
from superfine.select import select
from support import contents


@pytest.fixture
def encoder(tmp_path):
    """Folder of a plain encoder without a head, with tokenizer files."""
    folder = tmp_path / "base"
    bert(cls="BertModel").save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    (folder / "README.md").write_text("about the base alone")
    return folder


def tune(folder, path, selectors, labels=3, **extra):
    config = transformers.BertConfig.from_pretrained(folder, num_labels=labels)
    tuned = transformers.BertForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    plan = select(tuned.eval(), *selectors)
    perturb(plan)
    keep = {"id2label": dict(enumerate("abcdefgh"[:labels])), "note": {"text": "column"}}
    save_delta(
        tuned, plan, path, extra={"model_class": type(tuned).__name__, "config": json.dumps(keep), **extra}
    )
    return tuned


def test_merged_folder_gives_the_tuned_models_bits(tmp_path, encoder):
    tuned = tune(encoder, tmp_path / "d.safetensors", ("last:1", "head"))
    merge(encoder, tmp_path / "d.safetensors", tmp_path / "out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(merged) is transformers.BertForSequenceClassification
    assert torch.equal(logits(merged.eval()), logits(tuned))
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert merged.config.note == {"text": "column"}
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (encoder / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 5
    assert contents(tmp_path) == ["base", "d.safetensors", "out"]


def test_head_for_another_number_of_labels_is_replaced(tmp_path):
    bert(labels=2).save_pretrained(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "d.safetensors", ("head",), labels=5)
    merge(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "out")
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(merged), logits(tuned))


@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_language_models_merge_by_the_bases_architecture(tmp_path, build):
    tuned = build()
    tuned.save_pretrained(tmp_path / "base")
    plan = select(tuned, "last:1", "norms")
    perturb(plan)
    save_delta(tuned, plan, tmp_path / "d.safetensors")
    merge(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "out")
    merged = type(tuned).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(merged), logits(tuned))


@pytest.mark.parametrize(
    ("tied", "chosen"),
    [
        (False, {"rows": {"lm_head": [3, 5]}, "cols": {"*.down_proj": 0.2}}),
        (True, {"rows": {"embed_tokens": [3, 5]}}),
        (True, {"rows": {"lm_head": [3, 5]}, "tied": "head"}),
    ],
)
def test_slices_merge_into_whole_weights(tmp_path, tied, chosen):
    tuned = llama(tied=tied)
    tuned.save_pretrained(tmp_path / "base")
    plan = select(tuned, "norms", **chosen)
    slices.install(tuned, plan.slices)
    perturb(plan)
    save_delta(tuned, plan, tmp_path / "d.safetensors")
    merge(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "out")
    merged = type(tuned).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(merged), logits(tuned))
    assert merged.config.tie_word_embeddings == (tied and "tied" not in chosen)


def test_weights_keep_the_dtype_they_were_trained_in(tmp_path):
    bert().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "d.safetensors", ("head",))  # trains in fp32
    merge(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "out")
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert merged.dtype == torch.float32
    assert torch.equal(logits(merged), logits(tuned))


def test_frozen_random_head_is_named(tmp_path, encoder):
    tune(encoder, tmp_path / "d.safetensors", ("last:1",))
    with pytest.raises(
        ValueError, match=r"neither base nor delta holds 'classifier.bias' \(and 1 other\).*'head'"
    ):
        merge(encoder, tmp_path / "d.safetensors", tmp_path / "out")
    assert contents(tmp_path) == ["base", "d.safetensors"]


def test_a_delta_without_its_model_class_is_refused_where_the_bases_does_not_fit(tmp_path, encoder):
    tuned = tune(encoder, tmp_path / "d.safetensors", ("head",))
    save_delta(tuned, select(tuned, "head"), tmp_path / "d.safetensors")  # again, with no extra
    with pytest.raises(
        ValueError,
        match=r"model class is BertModel, from .* has no 'bert.pooler.dense.bias' \(and 3 others\) of the delta; "
        r"expected the class that was trained. Save the delta with extra=\{'model_class'",
    ):
        merge(encoder, tmp_path / "d.safetensors", tmp_path / "out")
    assert contents(tmp_path) == ["base", "d.safetensors"]


def test_merge_refuses_another_base_and_leaves_nothing(tmp_path, encoder):
    tune(encoder, tmp_path / "d.safetensors", ("last:1", "head"))
    torch.manual_seed(1)
    bert(cls="BertModel").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="this delta belongs to another base"):
        merge(tmp_path / "other", tmp_path / "d.safetensors", tmp_path / "out")
    assert contents(tmp_path) == ["base", "d.safetensors", "other"]


def test_merge_refuses_bad_arguments(tmp_path, encoder):
    path = tmp_path / "d.safetensors"
    tune(encoder, path, ("head",))
    with pytest.raises(
        FileExistsError, match=r"out is .*base, which exists; expected a new or an empty folder"
    ):
        merge(encoder, path, encoder)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json"):
        merge(tmp_path / "none", path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="expected a delta file"):
        merge(encoder, tmp_path / "none", tmp_path / "out")
    tune(encoder, path, ("head",), model_class="BertForNothing")
    with pytest.raises(ValueError, match="model class is BertForNothing; expected"):
        merge(encoder, path, tmp_path / "out")
    tune(encoder, path, ("head",), config="[1]")
    with pytest.raises(ValueError, match="the delta's config is no JSON object"):
        merge(encoder, path, tmp_path / "out")
    assert contents(tmp_path) == ["base", "d.safetensors"]


def test_failing_write_of_a_merge_leaves_nothing(tmp_path, encoder, monkeypatch):
    tune(encoder, tmp_path / "d.safetensors", ("head",))

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(delta_module.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge(encoder, tmp_path / "d.safetensors", tmp_path / "out")
    assert contents(tmp_path) == ["base", "d.safetensors"]
