"""prepare: the gradients of eager autograd, without the prefix's graph, and everything taken back."""

from __future__ import annotations

import copy
import pickle

import pytest
import superfine
import torch
import transformers
from prepare_cases import (
    MODELS,
    assert_same_gradients,
    gradients,
    loss,
    make,
)
from small_models import TOKENS, VOCAB, checkpoint_activations, starting
from superfine._activations import saved_bytes
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = [
    *((name, ("last:1",) if name == "t5" else ("last:1", "head")) for name in MODELS),
    *((name, ("last:2",)) for name in ("bert", "gpt2", "llama", "mlp")),
    *((name, ("head",)) for name in ("bert", "roberta", "gpt2", "qwen")),
    ("bert", ("embeddings",)),
    ("llama", ("norms",)),
    ("gpt2", ("biases",)),
    ("bert", ("layers:1",)),
    ("t5", ("encoder.block.1.*", "encoder.block.2.*")),
    ("t5", ("decoder.final_layer_norm.weight",)),
]


def ids(case):
    return f"{case[0]}, {'+'.join(case[1])}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", PLANS, ids=ids)
def test_gradients_are_those_of_eager_autograd(case, dtype):
    name, selectors = case
    model = make(name, dtype)
    plan = superfine.select(model, *selectors)
    expected = gradients(model)
    assert expected.keys() == set(plan.names)
    checkpointing = name != "mlp"  # whose blocks are single layers
    # The short-cut alone rounds otherwise: tests/test_gradient_accuracy.py has it in float32.
    shortcut = dtype == torch.float64
    prepared = superfine.prepare(model, plan, checkpointing=checkpointing, fuse=False, shortcut=shortcut)
    for _ in range(2):  # the first forward looks at the graph, later ones do not
        found = gradients(model)
        if "shortcut" in prepared.done:
            assert_same_gradients(found, expected, 1e-10)
        else:
            assert all(torch.equal(found[name], expected[name]) for name in plan.names)
    superfine.restore(model)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in plan.names)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_all_parts_together(name, recompute):
    model = make(name)
    plan = superfine.select(model, "last:2")
    expected = gradients(model)
    superfine.prepare(model, plan, checkpointing="every:2", eval_prefix=True, recompute=recompute)
    for _ in range(2):
        assert_same_gradients(gradients(model), expected, 1e-10)
    superfine.restore(model)
    assert_same_gradients(gradients(model), expected, 1e-12)


# --- the prefix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "selectors"),
    [("bert", ("last:2", "head")), ("gpt2", ("head",)), ("llama", ("last:1", "head")), ("t5", ("last:1",))],
)
def test_the_prefix_has_no_graph_even_where_its_inputs_require_gradients(name, selectors):
    model = make(name, torch.float32)
    plan = superfine.select(model, *selectors)
    least = saved_bytes(lambda: loss(model), model.parameters())
    model.enable_input_require_grads()
    forced = saved_bytes(lambda: loss(model), model.parameters())
    expected = gradients(model)
    superfine.prepare(model, plan, fuse=False, shortcut=False)
    first = saved_bytes(lambda: loss(model), model.parameters())
    later = saved_bytes(lambda: loss(model), model.parameters())
    assert first <= least * 1.02 < forced
    assert later <= least * 1.02
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_a_frozen_encoder_is_a_prefix_too():
    model = make("t5")
    prepared = superfine.prepare(model, superfine.select(model, "last:1"))
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].requires_grad))
    model.enable_input_require_grads()
    loss(model).backward()
    loss(model).backward()
    assert seen == [False, False]
    assert "decoder.block.1" in prepared.done["truncate"]


class Early(nn.Module):
    """Registered after the layers, used before them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(Early):
    """Layers that are gone through twice."""

    def forward(self, x):
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize(
    ("model", "selectors", "named"),
    [
        (Early(), ["norm.*"], "norm"),
        (Early(), ["layers:2", "norm.*"], "norm"),
        (Twice(), ["layers:1"], "layers.1"),
        (Twice(), ["layers:2"], "layers.2"),
    ],
)
def test_what_trains_before_the_end_of_the_prefix_is_named_in_the_first_forward(model, selectors, named):
    model = copy.deepcopy(model)
    plan = superfine.select(model, *selectors)
    expected = gradients(model)
    superfine.prepare(model, plan)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'{named}[\w.]*' trains and is used before .*truncate=False"):
            loss(model)
    superfine.restore(model)
    superfine.prepare(model, plan, truncate=False, fuse=False)
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_the_norm_of_bart_that_is_registered_after_the_layers():
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).train()
    superfine.prepare(model, superfine.select(model, "model.decoder.layernorm_embedding.*"))
    with pytest.raises(ValueError, match=r"layernorm_embedding\.\w+' trains and is used before"):
        loss(model)


def test_a_module_that_serves_before_and_after_keeps_its_gradients():
    act = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    plan = superfine.select(model, "2.*", "4.*")
    expected = gradients(model)
    superfine.prepare(model, plan)
    for _ in range(2):
        assert_same_gradients(gradients(model), expected, 1e-6)


def test_eval_prefix_keeps_dropout_off_there_and_only_there():
    model = make("gpt2", dropout=True)
    plan = superfine.select(model, "last:1", "head")
    model.transformer.h[0].attn.eval()  # a mode of its own
    before = {path: module.training for path, module in model.named_modules()}
    superfine.prepare(model, plan, eval_prefix=True)
    model.eval().train()
    off = {path for path, module in model.named_modules() if not module.training}
    assert {"transformer.drop", "transformer.h.0.attn", "transformer.h.1.mlp.dropout"} <= off
    assert not any(path.startswith(("transformer.h.2", "transformer.ln_f", "lm_head")) for path in off)
    seen = []
    model.transformer.h[2].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    loss(model), loss(model)
    assert torch.equal(*seen)
    model.eval()
    superfine.restore(model)
    assert not any(module.training for module in model.modules())

    model.train()
    model.transformer.h[0].attn.eval()
    superfine.prepare(model, plan, eval_prefix=True)
    superfine.restore(model)
    assert {path: module.training for path, module in model.named_modules()} == before


# --- everything comes back ----------------------------------------------------------------------------------


def snapshot(model):
    return {
        path: (
            type(module),
            module.training,
            {key: id(value) for key, value in vars(module).items() if key != "training"},
        )
        for path, module in model.named_modules()
    }


def test_restore_gives_back_classes_attributes_and_modes():
    model = make("bert", dropout=True)
    checkpoint_activations(model)
    plan = superfine.select(model, "last:2", "head")
    before = snapshot(model)
    superfine.prepare(model, plan, eval_prefix=True, checkpointing="every:2")
    prepared = snapshot(model)
    assert any(prepared[path][0] is not before[path][0] for path in before)
    assert [type(module).__name__ for module in model.modules()] == [
        kind.__name__ for kind, *_ in before.values()
    ]
    superfine.restore(model)
    assert snapshot(model) == before


def test_a_prepare_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = make("bert")
    plan = superfine.select(model, "last:2", "head")
    model.bert.encoder.layer[3].forward = model.bert.encoder.layer[3].forward
    before = snapshot(model)
    with pytest.raises(ValueError, match="forward was replaced"):
        superfine.prepare(model, plan, checkpointing=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_prepared_and_on_their_own(again):
    model = make("bert")
    plan = superfine.select(model, "last:2", "head")
    expected = gradients(model)
    superfine.prepare(model, plan, checkpointing=True, eval_prefix=True, fuse=False)
    other = again(model)
    assert_same_gradients(gradients(other), expected, 1e-10)
    other.bert.pooler.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'bert\.pooler\.dense\.weight' is planned, and is frozen"):
        loss(other)
    other.bert.pooler.dense.weight.requires_grad_(True)
    assert_same_gradients(gradients(model), expected, 1e-10)
    superfine.restore(other)
    assert type(other) is transformers.BertForSequenceClassification
    assert_same_gradients(gradients(other), expected, 1e-10)
    assert_same_gradients(gradients(model), expected, 1e-10)  # still prepared
    superfine.restore(model)


def test_files_hold_the_model_alone(tmp_path):
    model = make("bert", torch.float32)
    names = set(model.state_dict())
    superfine.prepare(model, superfine.select(model, "last:1", "head"), checkpointing=True)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is transformers.BertForSequenceClassification
    torch.testing.assert_close(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


# --- training -----------------------------------------------------------------------------------------------


def test_frozen_parameters_keep_their_bits_and_the_run_is_the_eager_one():
    losses, models = [], []
    for prepare in (False, True):
        model = make("bert")
        plan = superfine.select(model, "last:2", "head")
        if prepare:
            superfine.prepare(model, plan, checkpointing=True)
        optimizer = plan.optimizer("adamw", lr=1e-3, weight_decay=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(100):
            value = loss(model)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in plan.names), name
        losses.append(value.item())
        models.append(model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# --- checkpointing ------------------------------------------------------------------------------------------


def count_runs(model, blocks):
    runs = dict.fromkeys(range(len(blocks)), 0)
    for number, block in enumerate(blocks):
        block.intermediate.register_forward_pre_hook(
            lambda module, args, number=number: runs.update({number: runs[number] + 1})
        )
    return runs


@pytest.mark.parametrize(
    ("checkpointing", "expected"),
    [(False, [1, 1, 1, 1]), (True, [1, 2, 2, 2]), ("every:2", [1, 2, 1, 2]), ("every:9", [1, 2, 1, 1])],
)
def test_only_blocks_from_the_first_trained_one_on_run_again(checkpointing, expected):
    model = make("bert", dropout=True)
    plan = superfine.select(model, "last:3", "head")
    checkpoint_activations(model)
    if checkpointing:
        superfine.prepare(model, plan, checkpointing=checkpointing, fuse=False)
    else:
        checkpoint_activations(model, False)
        superfine.prepare(model, plan, fuse=False)
    runs = count_runs(model, model.bert.encoder.layer)
    loss(model).backward()
    assert list(runs.values()) == expected
    model.eval()
    loss(model).backward()
    assert list(runs.values()) == [each + 1 for each in expected]


def test_checkpointing_keeps_inputs_alone_and_dropout_draws_again_what_it_drew():
    kept, found = [], []
    for checkpointing in (False, True, "every:2"):
        model = make("gpt2", dropout=True)
        superfine.prepare(model, superfine.select(model, "all"), checkpointing=checkpointing, fuse=False)
        torch.manual_seed(1)
        found.append(gradients(model))
        kept.append(saved_bytes(lambda model=model: loss(model), model.parameters()))
    assert kept[1] < kept[2] < kept[0]
    assert_same_gradients(found[1], found[0], 1e-12)
    assert_same_gradients(found[2], found[0], 1e-12)


def test_caches_are_off_in_checkpointed_training_alone():
    model = make("llama")
    superfine.prepare(model, superfine.select(model, "last:2"), checkpointing=True)
    assert model(TOKENS).past_key_values is None
    assert model(TOKENS, use_cache=True).past_key_values is None
    assert model.eval()(TOKENS).past_key_values is not None
    with torch.no_grad():
        assert model.train()(TOKENS).past_key_values is not None
    cache = transformers.DynamicCache()
    with pytest.raises(ValueError, match="given a cache of keys and values"):
        model(TOKENS, past_key_values=cache)
    assert model.eval().generate(TOKENS[:, :2], max_new_tokens=3, do_sample=False).shape == (2, 5)


def test_checkpointing_by_transformers_afterwards_is_refused():
    model = make("bert")
    superfine.prepare(model, superfine.select(model, "last:2", "head"), checkpointing=True)
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="gradient checkpointing was enabled in the model after prepare"):
        loss(model)


def test_batch_norm_is_not_checkpointed():
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
    model = nn.Sequential(*blocks)
    plan = superfine.select(model, "last:2")
    with pytest.raises(ValueError, match=r"1\.1 is a BatchNorm1d, whose statistics"):
        superfine.prepare(model, plan, checkpointing=True)
    assert type(model) is nn.Sequential


def test_without_layers_it_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
    prepared = superfine.prepare(model, superfine.select(model, "2.*"), checkpointing=True)
    assert prepared.not_done["truncate"] == "no stack of repeated layers was found"
    assert "no block" in prepared.not_done["checkpointing"]
    assert "checkpointing - (no block" in " ".join(str(prepared).split())
    assert starting(model, "2.") == set(gradients(model))
