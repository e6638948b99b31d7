"""The last layer of a classifier computes the position that the head reads, and no other."""

from __future__ import annotations

import pytest
import superfine
import torch
import transformers
from prepare_cases import (
    assert_same_gradients,
    gradients,
    loss,
    make,
    without_dropout,
)
from small_models import TOKENS, VOCAB, bert, gpt2, llama

pytestmark = pytest.mark.usefixtures("one_thread")


def electra():
    config = transformers.ElectraConfig(
        vocab_size=VOCAB, embedding_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    return without_dropout(transformers.ElectraForSequenceClassification(config)).train()


def causal(name, padding=0):
    if name == "gpt2":
        model = gpt2("GPT2ForSequenceClassification")
    else:
        config = transformers.Qwen3Config if name == "qwen" else transformers.LlamaConfig
        config = config(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=16, pad_token_id=0, num_labels=3,
        )  # fmt: skip
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.config.pad_token_id = padding
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.5)
    return without_dropout(model).train()


def widths(model):
    """How many positions the last layer's feed-forward part sees, forward by forward."""
    layer = superfine.selectors.layer_stack(model).blocks[-1]
    inner = model.get_submodule(layer)
    found = []
    part = next(module for name, module in inner.named_children() if name in ("ffn", "intermediate", "mlp"))
    part.register_forward_hook(lambda module, args, output: found.append(args[0].shape[1]))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_logits_and_gradients_are_exact_in_float32(name, attention):
    model = electra() if name == "electra" else make(name, torch.float32)
    model.set_attn_implementation(attention)
    plan = superfine.select(model, "all")
    seen = widths(model)
    mask = torch.ones_like(TOKENS)
    mask[0, 3:] = 0
    with torch.no_grad():
        expected = model(TOKENS, attention_mask=mask).logits
        bare = model(TOKENS).logits
    wanted = gradients(model)
    prepared = superfine.prepare(model, plan, fuse=False)
    assert "first position" in prepared.done["shortcut"]
    del seen[:]
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits, expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(model(TOKENS).logits, bare, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model), wanted, 2e-6)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen"])
def test_causal_classifiers_compute_the_last_token_of_each_row(name, attention):
    model = causal(name)
    model.set_attn_implementation(attention)
    plan = superfine.select(model, "all")
    seen = widths(model)
    right, left = TOKENS.clone(), TOKENS.clone()
    right[1, 3:], left[0, :2] = 0, 0
    batches = [
        {"input_ids": right, "attention_mask": (right != 0).long()},
        {"input_ids": left, "attention_mask": (left != 0).long()},
        {"input_ids": right},
        {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},
        {"input_ids": right, "attention_mask": torch.zeros(2, 1, 1, TOKENS.shape[1])},
        {"inputs_embeds": model.get_input_embeddings()(TOKENS).detach()},
    ]

    def results():
        found = []
        for batch in batches:
            model.zero_grad()
            logits = model(**batch).logits
            logits.square().sum().backward()
            found.append(
                (logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            )
        return found

    expected = results()
    prepared = superfine.prepare(model, plan, fuse=False)
    assert "last token" in prepared.done["shortcut"]
    del seen[:]
    for _ in range(2):
        for (logits, found), (wanted_logits, wanted) in zip(results(), expected, strict=True):
            torch.testing.assert_close(logits, wanted_logits, rtol=5e-6, atol=5e-6)
            # Of tied or unread positions: padding's rows have none but for rounding.
            assert_same_gradients(found, wanted, 1e-5)
    assert set(seen) == {1}
    model.eval()
    output = model(**batches[0], use_cache=True)
    assert output.past_key_values is not None
    assert seen[-1] == TOKENS.shape[1]
    torch.testing.assert_close(output.logits, expected[0][0], rtol=1e-5, atol=1e-5)


def test_a_causal_classifier_with_checkpoints_and_without_padding_token():
    for padding in (0, None):
        model = causal("llama", padding).double()
        plan = superfine.select(model, "last:1", "head")
        tokens = TOKENS if padding is not None else TOKENS[:1]
        expected = torch.autograd.grad(model(tokens).logits.square().sum(), list(plan.parameters()))
        superfine.prepare(model, plan, fuse=False, checkpointing=True)
        seen = widths(model)
        for _ in range(2):
            found = torch.autograd.grad(model(tokens).logits.square().sum(), list(plan.parameters()))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        assert set(seen) == {1}


def test_it_stands_aside_where_all_positions_are_asked_for():
    model = make("bert", torch.float32)
    plan = superfine.select(model, "last:1", "head")
    model.set_attn_implementation("eager")  # the other one has no weights to return
    plain = model.eval()(TOKENS, output_hidden_states=True, output_attentions=True)
    superfine.prepare(model, plan, fuse=False)
    seen = widths(model)
    for name in ("output_hidden_states", "output_attentions"):
        output = model(TOKENS, **{name: True})
        assert torch.equal(output.logits, plain.logits)
        found, expected = (getattr(each, name.removeprefix("output_"))[-1] for each in (output, plain))
        assert torch.equal(found, expected)
    assert model.bert(TOKENS).last_hidden_state.shape[1] == TOKENS.shape[1]
    assert seen == [TOKENS.shape[1]] * 3
    model(TOKENS)  # transformers' listeners are still there, and idle
    model.config.output_attentions = True
    model(TOKENS)
    model.config.output_attentions = False
    heard = []
    handle = model.bert.encoder.layer[-1].attention.self.register_forward_hook(lambda *event: heard.append(1))
    model(TOKENS)
    handle.remove()
    model(TOKENS)
    assert heard == [1]
    assert seen[3:] == [1, TOKENS.shape[1], TOKENS.shape[1], 1]


def test_with_the_head_alone_and_with_checkpoints():
    for selectors in (("head",), ("last:1", "head")):
        model = make("bert")
        plan = superfine.select(model, *selectors)
        expected = gradients(model)
        superfine.prepare(model, plan, checkpointing=True, fuse=False)
        seen = widths(model)
        for _ in range(2):
            assert_same_gradients(gradients(model), expected, 1e-10)
        assert set(seen) == {1}


def test_under_autocast_with_a_mask_of_floats():
    model = make("bert", torch.float32)
    model.set_attn_implementation("eager")
    superfine.prepare(model, superfine.select(model, "last:1", "head"), fuse=False)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    value.backward()
    assert value.isfinite()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_masks_of_the_callers_own(name, attention):
    model = causal(name) if name in ("gpt2", "llama") else make(name, torch.float32)
    model.set_attn_implementation(attention)
    size = TOKENS.shape[1]
    seen = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
    seen[1, 0, :, 1] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    # Booleans say to sdpa what is seen; eager attention adds 1 where they are True, as it would integers.
    masks = [seen, seen[:1].expand(2, -1, -1, -1), seen.float(), added, added.double()]
    masks += [seen.long()] if attention == "eager" else []
    calls = []
    for mask in masks:
        try:
            calls.append((mask, model(TOKENS, attention_mask=mask).logits))
        except RuntimeError:
            assert mask.dtype == torch.float64  # which sdpa does not take
    assert len(calls) >= 4
    superfine.prepare(model, superfine.select(model, "all"), fuse=False)
    widths_seen = widths(model)
    for mask, expected in calls:
        torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    assert set(widths_seen) == {1}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (llama, "nothing is known"),
        (lambda: bert("BertForTokenClassification"), "nothing is known"),
        (lambda: bert("BertForMaskedLM"), "nothing is known"),
    ],
)
def test_models_whose_head_reads_something_else_are_left_alone(model, reason):
    model = model()
    prepared = superfine.prepare(model, superfine.select(model, "last:1"), fuse=False)
    assert reason in prepared.not_done["shortcut"]
    assert "shortcut" not in prepared.done


def test_a_head_that_reads_more_than_the_first_position_is_found_out():
    class Mean(transformers.models.bert.modeling_bert.BertPooler):
        def forward(self, hidden_states):
            return self.activation(self.dense(hidden_states.mean(1)))

    model = make("bert", torch.float32)
    model.bert.pooler = Mean(model.config)
    prepared = superfine.prepare(model, superfine.select(model, "last:1", "head"), fuse=False)
    assert prepared.not_done["shortcut"] == "the head does not read the first position alone"
    assert type(model.bert.encoder.layer[-1]).__mro__[1] is not superfine._shortcut.LastLayer


def test_a_layer_with_other_arithmetic_is_found_out():
    model = make("bert", torch.float32)
    layer = model.bert.encoder.layer[-1]

    class Scaled(type(layer)):
        def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
            return 3 * super().forward(hidden_states, attention_mask, *args, **kwargs)

    layer.__class__ = Scaled
    plan = superfine.select(model, "last:1", "head")
    prepared = superfine.prepare(model, plan, fuse=False, truncate=False)
    assert "logits of a few tokens differ" in prepared.not_done["shortcut"]
    assert type(layer) is Scaled
