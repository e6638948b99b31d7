"""PrefixCache of prepared classifiers whose head alone trains: only the token that the head reads is kept."""

from __future__ import annotations

import pytest
import superfine
import torch
import transformers
from prepare_cases import assert_same_gradients, without_dropout
from small_models import VOCAB, bert, distilbert, gpt2
from superfine import PrefixCache

WIDTH = 8


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


BUILDS = {
    "bert": bert,
    "distilbert": distilbert,
    "gpt2": lambda: gpt2("GPT2ForSequenceClassification"),
    "llama": llama,
}
LENGTHS = (6, 4, 1)


def batch(lengths=LENGTHS, width=6):
    ids = torch.arange(2, 2 + len(lengths) * width).view(len(lengths), width) % (VOCAB - 2) + 2
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def prepared(name, *selectors):
    model = without_dropout(BUILDS[name]()).train()
    plan = superfine.select(model, *(selectors or ("head",)))
    assert "shortcut" in superfine.prepare(model, plan).done
    return model, plan


def step(model, inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(("dtype", "nbytes"), [("fp32", 4 * WIDTH), ("int8", WIDTH + 4)])
def test_one_token_of_each_sample_is_kept(name, dtype, nbytes):
    model, plan = prepared(name)
    inputs = batch()
    logits, gradients = step(model, inputs)
    with PrefixCache(model, plan, dtype=dtype) as cache:
        assert cache.fill([inputs]) == 3
        assert cache.nbytes == 3 * nbytes
        cached, found = step(model, inputs)
        shorter, _ = step(
            model,
            batch((4,), width=5)
            | {
                "input_ids": inputs["input_ids"][1:2, :5],
            },
        )
        assert (cache.hits, cache.misses) == (4, 0)
    tolerance = 0.0 if dtype == "fp32" else 0.02
    torch.testing.assert_close(cached, logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(shorter, cached[1:2])
    if dtype == "fp32":
        assert_same_gradients(found, gradients, 1e-6)


def test_the_position_is_a_part_of_the_key():
    model, plan = prepared("gpt2")
    inputs = batch((6,))
    with PrefixCache(model, plan) as cache:
        first = model(**inputs).logits
        model.config.pad_token_id = int(inputs["input_ids"][0, -1])  # the head now reads the token before
        second = model(**inputs).logits
        assert (len(cache), cache.nbytes) == (2, 2 * 4 * WIDTH)
    assert not torch.equal(first, second)
    assert torch.equal(second, model(**inputs).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_who_asks_for_all_tokens_gets_them(name, tmp_path):
    model, plan = prepared(name)
    inputs = batch()
    model(**inputs)  # the check of the first forward
    mask = inputs["attention_mask"].bool()
    expected = model.base_model(**inputs)[0][mask]
    with PrefixCache(model, plan, tmp_path / "states") as cache:
        logits = model(**inputs).logits
        torch.testing.assert_close(model.base_model(**inputs)[0][mask], expected, rtol=1e-5, atol=1e-6)
        assert cache.nbytes >= 4 * WIDTH * (3 + sum(LENGTHS))
        assert torch.equal(model(**inputs).logits, logits)
    superfine.restore(model)
    with PrefixCache(model, plan, tmp_path / "states") as cache:
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-5, atol=1e-6)
        assert (cache.hits, cache.misses) == (3, 0)  # what the call above kept


def test_a_head_that_reads_padding_keeps_all_tokens():
    model, plan = prepared("gpt2")
    inputs = batch()
    inputs["input_ids"][1, 4:] = 9  # not padding for the head
    with PrefixCache(model, plan) as cache:
        model(**inputs)
        assert len(cache) == 3
        assert cache.nbytes == 4 * WIDTH * sum(LENGTHS)


@pytest.mark.parametrize("name", BUILDS)
def test_a_last_layer_that_trains_still_computes_one_position(name):
    model, plan = prepared(name, "last:1", "head")
    inputs = batch()
    logits, gradients = step(model, inputs)
    with PrefixCache(model, plan) as cache:
        for _ in range(2):
            cached, found = step(model, inputs)
        assert cache.nbytes == 4 * WIDTH * sum(LENGTHS)
    assert torch.equal(cached, logits)
    assert_same_gradients(found, gradients, 1e-6)
