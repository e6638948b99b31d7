"""Rows and columns of a model's weights that train alone: installed, trained, saved, and taken back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from small_models import TOKENS, VOCAB, bert, gpt2, llama, logits, mlp, t5
from superfine import slices
from superfine.fused_loss import use_fused_loss
from superfine.select import select
from superfine.slices import Slice
from torch import nn
from torch.nn import functional as F


def prepared(model, *selectors, **more):
    plan = select(model, *selectors, **more)
    slices.install(model, plan.slices)
    return plan


def loss_of(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    return model(**inputs).logits.float().square().mean()


def train(model, plan, steps=2, loss_of=loss_of, **options):
    optimizer = plan.optimizer("adamw", lr=1e-2, **options)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


MODELS = [
    (llama, {"rows": {"lm_head": [30, 3], "embed_tokens": range(4, 8)}, "cols": {"*.down_proj": 0.2}}),
    (lambda: llama(tied=True), {"rows": {"embed_tokens": [3, 4, 5]}}),
    (gpt2, {"rows": {"*.c_attn": "norm:0.1", "wte": [3, 7]}, "cols": {"*.mlp.c_proj": [0, 3]}}),
    (t5, {"rows": {"shared": [3, 4]}, "cols": {"decoder.*.wo": slice(0, 2)}}),
    (lambda: bert(layers=1), {"rows": {"word_embeddings": [0, 3]}, "cols": {"*": "random:0.3"}}),
]


@pytest.mark.parametrize(("build", "chosen"), MODELS)
def test_a_model_trains_its_slices_and_nothing_else(build, chosen):
    model = build().eval()
    before, outputs, whole = tensors(model), logits(model), copy.deepcopy(model).requires_grad_(True)
    plan = prepared(model, **chosen)
    assert torch.equal(logits(model), outputs)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        piece.parameter_name for piece in plan.slices
    }

    # Gradients are those of full training, in the slice.
    loss_of(model).backward()
    loss_of(whole).backward()
    for piece in plan.slices:
        module, _ = slices.region(whole, piece)
        grad = module.weight.grad.t() if slices.is_conv1d(module) else module.weight.grad
        found = model.get_parameter(piece.parameter_name).grad
        torch.testing.assert_close(found, grad.index_select(piece.dim, piece.indices))
    model.zero_grad()

    train(model, plan)
    outputs = logits(model)
    slices.remove(model)
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=0)
    assert not any(hasattr(module, "weight_slice") for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {piece.name for piece in plan.slices} <= moved
    for piece in plan.slices:
        layer, weight = slices.region(model, piece)
        old = before[piece.name].t() if slices.is_conv1d(layer) else before[piece.name]
        changed = (weight != old).any(1 - piece.dim).nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(piece.indices.tolist())


@pytest.mark.parametrize("cls", [nn.Linear, nn.Embedding])
def test_what_does_not_train_keeps_its_bits_for_ever(cls):
    # A mask on the gradient would not do: weight decay moves what the mask hides.
    model = nn.Sequential(cls(16, 16))
    plan = prepared(model, rows={"0": [2, 5]})
    before = model[0].weight.detach().clone()
    x = torch.randn(4, 16) if cls is nn.Linear else torch.arange(16)
    train(model, plan, 100, lambda m: m(x).square().sum(), weight_decay=0.1)
    slices.remove(model)
    rest = [row for row in range(16) if row not in (2, 5)]
    assert torch.equal(model[0].weight[rest].view(torch.int32), before[rest].view(torch.int32))
    assert not torch.isclose(model[0].weight[[2, 5]], before[[2, 5]]).any()


def test_the_plan_knows_the_slices():
    model = mlp()
    plan = select(model, "4.bias", rows={"0": [1]}, cols={"2": [0, 3]})
    assert plan.slices == (
        Slice("0.weight", 0, torch.tensor([1])),
        Slice("2.weight", 1, torch.tensor([0, 3])),
    )
    assert plan.slices[0] != Slice("0.weight", 0, torch.tensor([2]))
    assert plan.trained_names == ("4.bias", "0.weight", "2.weight")
    assert "Slice(2 columns of 2.weight)" in repr(plan)
    total = sum(p.numel() for p in model.parameters())
    assert (plan.num_trainable, plan.num_total) == (2 + 4 + 8, total)
    with pytest.raises(ValueError, match=r"no parameters yet; expected superfine\.prepare"):
        plan.optimizer("adamw", lr=1e-3)
    slices.install(model, plan.slices)
    assert [name for name, _ in plan.named_parameters()] == ["0.weight_rows", "2.weight_cols", "4.bias"]
    assert (plan.num_trainable, plan.num_total) == (2 + 4 + 8, total)
    with pytest.raises(ValueError, match="has slices already"):
        slices.install(model, plan.slices)
    with pytest.raises(ValueError, match=r"expected superfine\.restore\(model\) before"):
        select(model, "all")
    optimizer = plan.optimizer("adamw", lr=1e-3)
    model(torch.randn(3, 4)).sum().backward()
    model[0].weight_rows.grad = None
    with pytest.raises(ValueError, match=r"'0\.weight_rows' has no gradient"):
        optimizer.step()


# --- which rows and columns ----


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        ([2, 0], [0, 2]),
        (torch.tensor([3, 1]), [1, 3]),
        (range(1, 4), [1, 2, 3]),
        (slice(-2, None), [2, 3]),
        ("new:2", [2, 3]),
        (0.5, [0, 3]),
        ("norm:0.25", [3]),
        (0.01, [3]),  # at least one
    ],
)
def test_values(value, indices):
    model = mlp()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1, 2, 4])[:, None].expand(4, 4))
    assert select(model, rows={"0": value}).slices[0].indices.tolist() == indices
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.t().clone())
    assert select(model, cols={"0.weight": value}).slices[0].indices.tolist() == indices


def test_random_ones_follow_the_seed_and_the_layer():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))

    def drawn(seed):
        return [piece.indices.tolist() for piece in select(model, rows={"*": "random:0.1"}, seed=seed).slices]

    first, second = drawn(0)
    assert len(first) == len(set(first)) == 10
    assert first != second
    assert drawn(0) == [first, second]
    assert drawn(1)[0] != first


def test_globs_take_layers_of_a_kind_that_do_not_train_whole():
    plan = select(llama(), "last:1", cols={"*.down_proj": 0.2})
    assert [piece.name for piece in plan.slices] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert {piece.name for piece in select(llama(), rows={"*embed*": [1]}).slices} == {
        "model.embed_tokens.weight"
    }
    assert all("norm" not in piece.name for piece in select(llama(), cols={"*": 0.2}).slices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": {"0": []}}, r"rows\['0'\] is empty; expected at least one of 4 rows"),
        ({"rows": {"0": [4]}}, r"rows\['0'\] holds 4; expected rows from 0 to 3"),
        ({"cols": {"0": [-1]}}, r"cols\['0'\] holds -1; expected columns from 0 to 3"),
        ({"rows": {"0": [1, 2, 1]}}, r"rows\['0'\] holds 1 more than once"),
        ({"rows": {"0": 1.0}}, r"rows\['0'\] is 'norm:1.0'; expected integers.* a fraction between 0 and 1"),
        ({"rows": {"0": "some:0.1"}}, r"rows\['0'\] is 'some:0.1'; expected"),
        ({"rows": {"0": "norm:x"}}, r"rows\['0'\] is 'norm:x'; expected"),
        ({"rows": {"0": "new:4"}}, r"rows\['0'\] is 'new:4'; expected new:N with N below 4"),
        ({"rows": {"0": 3}}, r"rows\['0'\] is 3, a int; expected integers, a range"),
        ({"rows": {"0": True}}, r"rows\['0'\] is True, a bool"),
        ({"rows": {"0": [1.5]}}, r"rows\['0'\] holds 1.5, a float; expected integers"),
        ({"rows": {"0": torch.ones(2)}}, r"rows\['0'\] is a tensor torch.float32 \(2,\); expected integers"),
        ({"rows": {"1": [1]}}, r"rows\['1'\] matches no embedding or linear layer"),
        ({"rows": {"lay": [1]}}, r"rows\['lay'\] matches no .*expected a name or glob of one"),
        ({"rows": [1]}, r"rows is a list; expected a dict"),
        ({"rows": {0: [1]}}, r"a key of rows is 0; expected a string"),
        ({"rows": {"0": [1]}, "cols": {"0": [1]}}, r"cols\['0'\] matches '0.weight', of which .*already"),
        ({"rows": {"0": [1]}, "tied": "no"}, r"tied is 'no'; expected 'both' or 'head'"),
        ({"rows": {"0": [1]}, "seed": 0.5}, r"seed is 0.5, a float; expected an integer"),
    ],
)
def test_bad_slices_are_refused_before_anything_changes(arguments, message):
    model = mlp()
    with pytest.raises((ValueError, TypeError), match=f"select: {message}"):
        select(model, "4.bias", **arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_slice_of_what_trains_whole_is_refused():
    with pytest.raises(
        ValueError, match=r"'0\.weight' is selected whole, and rows\['0'\] chooses a slice of it"
    ):
        select(mlp(), "all", rows={"0": [1]})
    with pytest.raises(ValueError, match="selected whole"):
        select(llama(tied=True), "embeddings", "head", rows={"embed_tokens": [1]})
    with pytest.raises(ValueError, match=r"cols\['word_embeddings'\] matches no linear layer"):
        select(bert(), cols={"word_embeddings": [1]})
    model = nn.Sequential(nn.Embedding(4, 2, max_norm=1.0))
    with pytest.raises(ValueError, match="embedding with max_norm; expected one without"):
        select(model, rows={"0": [1]})
    with pytest.raises(ValueError, match=r"did you mean 'model\.embed_tokens'"):
        select(llama(), rows={"embed_token": [1]})
    with pytest.raises(ValueError, match="no selector given"):
        select(mlp(), rows={})


def test_rows_that_resizing_added():
    model = llama()
    model.resize_token_embeddings(VOCAB + 3)
    plan = prepared(model, rows={"embed_tokens": f"new:{VOCAB}", "lm_head": f"new:{VOCAB}"})
    assert [piece.indices.tolist() for piece in plan.slices] == [[VOCAB, VOCAB + 1, VOCAB + 2]] * 2


# --- weights that are shared ----


def test_rows_of_a_tied_weight_train_on_both_sides_as_one_parameter():
    model, whole = llama(tied=True), None
    whole = copy.deepcopy(model)
    plan = prepared(model, rows={"embed_tokens": [3, 5]})
    assert model.lm_head.weight_rows is model.model.embed_tokens.weight_rows
    assert [name for name, _ in plan.named_parameters()] == ["model.embed_tokens.weight_rows"]
    assert plan.num_trainable == 16
    loss_of(model).backward()
    loss_of(whole).backward()
    torch.testing.assert_close(model.lm_head.weight_rows.grad, whole.lm_head.weight.grad[[3, 5]])
    again = copy.deepcopy(model)
    assert again.lm_head.weight_rows is again.model.embed_tokens.weight_rows


def test_a_head_alone_is_asked_for_and_untied(tmp_path):
    model = llama(tied=True)
    with pytest.raises(
        ValueError, match=r"tied to 'model\.embed_tokens\.weight'; expected .* or tied='head'"
    ):
        select(model, rows={"lm_head": [3]})
    with pytest.raises(ValueError, match=r"tied is 'head'; expected the name of the head, 'lm_head\.weight'"):
        select(model, rows={"embed_tokens": [3]}, tied="head")
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration an encoder-decoder, which computes otherwise"
    ):
        select(t5(), rows={"lm_head": [3]}, tied="head")
    before = model.model.embed_tokens.weight.detach().clone()
    plan = prepared(model, rows={"lm_head": [3, 5]}, tied="head")
    train(model, plan, weight_decay=0.1)
    assert torch.equal(model.model.embed_tokens.weight, before)
    slices.remove(model)
    assert not model.config.tie_word_embeddings
    assert (model.lm_head.weight != before).any(1).nonzero().squeeze(1).tolist() == [3, 5]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# --- what others see of the model ----


def test_state_dict_and_saved_folder_are_those_of_the_model_without(tmp_path):
    model = llama()
    names = list(model.state_dict())
    plan = prepared(model, rows={"lm_head": [3, 5]}, cols={"*.down_proj": 0.2})
    train(model, plan)
    saved = model.state_dict()
    assert list(saved) == names
    plain = llama()
    plain.load_state_dict(saved)
    assert torch.equal(logits(plain), logits(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_load_state_dict_puts_values_into_the_slice():
    model, other = llama(), llama()
    prepared(model, rows={"lm_head": [3, 5]}, cols={"*.down_proj": 0.2})
    assert model.load_state_dict(other.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(model.lm_head.weight_rows, other.lm_head.weight[[3, 5]])
    assert torch.equal(logits(model), logits(other))
    kept = model.lm_head.weight_rows.detach().clone()
    missing = model.load_state_dict({"model.norm.weight": torch.ones(8)}, strict=False).missing_keys
    assert "lm_head.weight" in missing
    assert not [name for name in missing if name.endswith(("_rows", "_cols"))]
    assert torch.equal(model.lm_head.weight_rows, kept)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict() | {"lm_head.weight": torch.ones(2, 2)})
    assigned = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    model.load_state_dict(assigned, assign=True)
    assert torch.equal(model.lm_head.weight_rows, assigned["lm_head.weight"][[3, 5]])
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_slices_of_their_own(again):
    model = gpt2()
    plan = prepared(model, rows={"wte": [3]}, cols={"*.c_fc": [1]})
    outputs = logits(model)
    made = again(model)
    train(model, plan)
    assert torch.equal(logits(made), outputs)
    slices.remove(made)
    assert torch.equal(logits(made), outputs)
    assert type(made.transformer.wte) is nn.Embedding


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_a_compiled_model_trains_the_same():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    plan = prepared(model, rows={"0": [1, 2], "1": [0]}, cols={"3": [5]})
    twin, x = copy.deepcopy(model), torch.arange(8)
    other = select(nn.Linear(1, 1), "all").__class__(twin, plan.names, plan.selectors, plan.slices)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, plan, 3, lambda m: m(x).square().sum())
    train(twin, other, 3, lambda m: m(x).square().sum())
    for mine, theirs in zip(plan.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(model(x), compiled(x))


def test_what_an_embedding_does_to_its_rows_afterwards_it_still_does():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 3

    model = nn.Sequential(Scaled(6, 4))
    plan = prepared(model, rows={"0": [2, 4]})
    ids = torch.tensor([2, 1, 2])
    model(ids).sum().backward()
    assert torch.equal(model[0].weight_rows.grad, torch.tensor([[6.0], [0.0]]).expand(2, 4))
    assert torch.equal(model(ids), 3 * F.embedding(ids, model[0].weight))
    assert plan.num_trainable == 8
    assert type(model[0]).__name__ == "Scaled"
    slices.remove(model)
    assert type(model[0]) is Scaled


def test_layers_whose_forward_would_not_be_reached_are_refused():
    class Own(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight) * 2

    with pytest.raises(
        ValueError, match=r"'0', a Own with a forward of its own; expected one that calls super\(\)"
    ):
        select(nn.Sequential(Own(2, 2)), rows={"0": [1]})
    with pytest.raises(ValueError, match=r"'out_proj', which nn\.MultiheadAttention reads itself"):
        select(nn.MultiheadAttention(4, 2), rows={"out_proj": [1]})
    model = mlp()
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"'0', whose forward was replaced on the module itself"):
        select(model, rows={"0": [1]})


def test_a_weight_that_others_read_is_up_to_date_in_eval_mode():
    # TransformerEncoderLayer's fast path takes linear1.weight without its forward.
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    prepared(layer, rows={"linear1": [0, 5]}, cols={"linear2": [1]})
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        layer.linear1.weight_rows.add_(1)
        layer.linear2.weight_cols.add_(1)
        wanted = layer.train()(x)
        layer.linear1.weight_rows.add_(1)
        layer.linear1.weight_rows.sub_(1)
        torch.testing.assert_close(layer.eval()(x), wanted)


def test_checkpointed_layers_and_autocast():
    model = llama()
    plan = prepared(model, rows={"embed_tokens": [3, 5]}, cols={"*.down_proj": 0.2})
    model.train()
    loss_of(model).backward()
    wanted = [parameter.grad.clone() for parameter in plan.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss_of(model).backward()
    for parameter, grad in zip(plan.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    for parameter, grad in zip(plan.parameters(), wanted, strict=True):
        assert (parameter.grad - grad).norm() < 0.1 * grad.norm()


@pytest.mark.parametrize("loss_first", [False, True])
@pytest.mark.parametrize("chosen", [{"rows": {"lm_head": [3, 5]}}, {"cols": {"lm_head": [1, 2]}}])
def test_the_fused_loss_trains_the_slices_of_a_head(chosen, loss_first):
    model = llama().train()
    plan = select(model, **chosen)
    fused = use_fused_loss(model) if loss_first else None
    slices.install(model, plan.slices)
    own = copy.deepcopy(model)
    if loss_first:
        own = llama().train()
        own.load_state_dict(model.state_dict())
        slices.install(own, plan.slices)
    own.requires_grad_(False).lm_head.get_parameter(plan.slices[0].parameter_name[8:]).requires_grad_(True)
    fused = fused or use_fused_loss(model)
    with torch.no_grad():
        for each in (model, own):
            each.get_parameter(plan.slices[0].parameter_name).mul_(3)  # the weight still holds what was there
    found, wanted = model(TOKENS, labels=TOKENS), own(TOKENS, labels=TOKENS)
    assert found.logits is None
    torch.testing.assert_close(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    name = plan.slices[0].parameter_name
    torch.testing.assert_close(model.get_parameter(name).grad, own.get_parameter(name).grad)
    assert model.lm_head.weight.grad is None
    outputs = logits(model)
    fused.remove()
    slices.remove(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(logits(model), outputs)


def test_trainer(tmp_path):
    model = llama()
    plan = prepared(model, rows={"embed_tokens": [3, 5]})
    before = model.model.embed_tokens.weight_rows.detach().clone()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            tmp_path,
            max_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=2,
            learning_rate=1e-2,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        optimizers=(plan.optimizer("adamw", lr=1e-2), None),
    )
    trainer.train()
    assert not torch.equal(model.model.embed_tokens.weight_rows, before)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(logits(saved), logits(model))
