"""What ``superfine.select`` trains, what it refuses, and what its plan says."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from small_models import (
    bert,
    distilbert,
    gemma,
    gpt2,
    llama,
    mistral,
    mlp,
    qwen,
    roberta,
    starting,
    step,
    t5,
    trained,
)
from superfine.optim import LAMB, Adam
from superfine.select import select
from superfine.selectors import WORDS, layer_stacks, match
from torch import nn

transformers = pytest.importorskip("transformers")


# ---- selectors ----


@pytest.mark.parametrize(
    ("build", "selector", "prefixes"),
    [
        (bert, "last:2", ("bert.encoder.layer.2.", "bert.encoder.layer.3.")),
        (bert, "first:1", ("bert.encoder.layer.0.",)),
        (bert, "layers:0, 2-3", ("bert.encoder.layer.0.", "bert.encoder.layer.2.", "bert.encoder.layer.3.")),
        (bert, "head", ("bert.pooler.", "classifier.")),
        (roberta, "last:1", ("roberta.encoder.layer.2.",)),
        (roberta, "head", ("classifier.",)),  # two linears, and no pooler below
        (qwen, "last:1", ("model.layers.2.",)),
        (mistral, "head", ("lm_head.",)),
        (gemma, "layers:0", ("model.layers.0.",)),
        (bert, "norms&last:1", None),
        (distilbert, "last:1", ("distilbert.transformer.layer.2.",)),
        (distilbert, "head", ("pre_classifier.", "classifier.")),
        (gpt2, "last:2", ("transformer.h.1.", "transformer.h.2.")),
        (llama, "first:2", ("model.layers.0.", "model.layers.1.")),
        (llama, "head", ("lm_head.",)),
        (llama, "embeddings", ("model.embed_tokens.",)),
        (t5, "last:1", ("decoder.block.1.",)),  # numbers count the decoder, though the encoder is longer
        (t5, "encoder.block.2.*", ("encoder.block.2.",)),
        (mlp, "last:1", ("4.",)),
        (mlp, "layers:1", ("2.",)),  # blocks without parameters do not count
        (mlp, "head", ("4.",)),
        (bert, "*.attention.self.*", None),
        (bert, r"re:layer\.[13]\..*\.(weight|bias)$", ("bert.encoder.layer.1.", "bert.encoder.layer.3.")),
    ],
)
def test_selector_trains_exactly(build, selector, prefixes):
    model = build()
    plan = select(model, selector)
    if prefixes is None:
        part = ".attention.self." if "*" in selector else ".3.attention.output.LayerNorm."
        other = part.replace("attention.output", "output")
        expected = {name for name, _ in model.named_parameters() if part in name or other in name}
    else:
        expected = starting(model, *prefixes)
    assert expected
    assert trained(model) == expected == set(plan.names)
    assert plan.selectors == (selector,)


def test_union_keeps_model_order_and_counts():
    model = bert()
    plan = select(model, "head", "last:1", "classifier.*")
    order = [name for name, _ in model.named_parameters()]
    assert list(plan.names) == [name for name in order if name in set(plan.names)]
    assert set(plan.names) == starting(model, "bert.encoder.layer.3.", "bert.pooler.", "classifier.")
    assert [name for name, _ in plan.named_parameters()] == list(plan.names)
    assert plan.num_trainable == sum(parameter.numel() for parameter in plan.parameters())
    assert plan.num_total == sum(parameter.numel() for parameter in model.parameters())


def test_all_norms_biases_embeddings_of_bert():
    model = bert()
    names = {name for name, _ in model.named_parameters()}
    assert match(model, "all") == names
    assert match(model, "norms") == {name for name in names if "LayerNorm" in name}
    assert match(model, "biases") == {name for name in names if name.endswith(".bias")}
    assert match(model, "embeddings") == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def test_norms_of_models_with_their_own_norm_classes():
    assert match(llama(), "norms") == {
        *(
            f"model.layers.{i}.{norm}_layernorm.weight"
            for i in range(3)
            for norm in ("input", "post_attention")
        ),
        "model.norm.weight",
    }
    assert "decoder.final_layer_norm.weight" in match(t5(), "norms")


def test_t5_attention_bias_is_no_embedding():
    assert match(t5(), "embeddings") == {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }


def test_biases_of_an_lstm_and_of_attention():
    assert match(nn.LSTM(2, 3), "biases") == {"bias_ih_l0", "bias_hh_l0"}
    assert match(nn.MultiheadAttention(4, 2), "biases") == {"in_proj_bias", "out_proj.bias"}


def test_head_of_a_plain_module_is_its_last_child_with_parameters():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.out = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
            self.loss = nn.CrossEntropyLoss()

    assert match(Classifier(), "head") == {"out.1.weight", "out.1.bias"}
    wrapped = nn.Sequential(Classifier())
    assert match(wrapped, "head") == {"0.out.1.weight", "0.out.1.bias"}


def test_a_bare_encoder_has_its_pooler_as_head_and_without_one_none():
    assert match(bert("BertModel"), "head") == {"pooler.dense.weight", "pooler.dense.bias"}
    with pytest.raises(ValueError, match="'head' matches no parameter"):
        match(transformers.LlamaModel(llama().config), "head")


def test_head_of_a_token_classifier_has_no_pooler():
    assert match(bert("BertForTokenClassification"), "head") == {"classifier.weight", "classifier.bias"}


def test_blocks_inside_blocks_do_not_count_as_layers():
    class Stage(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = nn.ModuleList(mlp() for _ in range(depth))

    # As in Swin: the inner lists are longer than the list of stages.
    model = nn.ModuleList([Stage(2), Stage(6)])
    assert [stack.path for stack in layer_stacks(model)] == [""]
    assert {name.split(".")[0] for name in match(model, "last:1")} == {"1"}


def test_several_equal_stacks_are_an_error_and_not_a_guess():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.Sequential(mlp(), mlp())
            self.layer2 = nn.Sequential(mlp(), mlp(), mlp())

    with pytest.raises(
        ValueError, match=r"layer1 \(2\), layer2 \(3\); expected a pattern such as 'layer2.2.\*'"
    ):
        select(Stages(), "last:1")


def test_hybrid_stack_of_alternating_blocks_counts():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(2, 2), nn.GRUCell(2, 2), nn.Linear(2, 2), nn.GRUCell(2, 2)])}
    )
    assert match(model, "last:1") == {
        name for name, _ in model.named_parameters() if name.startswith("layers.3.")
    }


# ---- errors ----


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("last:5", r"'last:5'; expected last:N with N from 1 to 4 \(the model has 4 layers"),
        ("last:0", "expected last:N with N from 1 to 4"),
        ("last:-1", "expected last:N with N from 1 to 4"),
        ("first:x", "expected first:N"),
        ("layers:4", "from 0 to 3.*the model has 4 layers"),
        ("layers:-1", "from 0 to 3.*last:N counts from the end"),
        ("layers:3-1", "from 0 to 3"),
        ("layers:", "from 0 to 3"),
        ("norm", "did you mean 'norms'"),
        ("heads", "did you mean 'head'"),
        ("lst:2", "did you mean 'last:2'"),
        ("classifer.*", r"did you mean 'classifier.\*'"),
        ("encoder.layer.2.*", r"did you mean 'bert.encoder.layer.2.\*'"),
        ("bert.pooler", r"did you mean 'bert.pooler.\*'"),
        ("qqq", r"expected one of all, head, .*\(bert.\*, classifier.\*\)"),
        ("", "matches no parameter"),
        ("re:layer[", "expected a regular expression"),
        ("re:nothing", "matches no parameter"),
        ("norms&classifier.*", "the parts of selector 'norms&classifier.\\*' have no parameter in common"),
        ("norms&heads", "did you mean 'head'"),
        ("last:1&", "selector '' matches no parameter"),
        ("adapters", "BertForSequenceClassification has no adapters; expected a model of PEFT's"),
    ],
)
def test_bad_selector_is_an_error_that_helps_and_changes_nothing(selector, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        select(model, "head", selector)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model is dict; expected a torch.nn.Module"):
        select({}, "all")
    with pytest.raises(ValueError, match="no selector given"):
        select(mlp())
    with pytest.raises(TypeError, match=r"\['all'\], a list; expected a string"):
        select(mlp(), ["all"])
    with pytest.raises(ValueError, match="matches no parameter"):
        select(nn.ReLU(), "all")
    with pytest.raises(TypeError, match="before it is wrapped"):
        select(nn.DataParallel(mlp()), "all")
    with pytest.raises(ValueError, match="no stack of repeated layers"):
        select(nn.Bilinear(2, 2, 2), "last:1")
    with pytest.raises(ValueError, match=r"count: no nn.ModuleList .* such as 'body.\*' or 'out.\*'"):
        select(nn.ModuleDict({"body": nn.Bilinear(2, 2, 2), "out": nn.Linear(2, 2)}), "last:1")


@pytest.mark.parametrize("selector", ["head", "embeddings", "lm_head.weight"])
def test_one_side_of_a_tied_weight_is_an_error_with_both_names(selector):
    model = gpt2()
    with pytest.raises(
        ValueError, match=r"'(lm_head|transformer.wte).weight' is tied to '(lm_head|transformer.wte)"
    ):
        select(model, selector)
    assert len(trained(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("selectors", [("all",), ("head", "embeddings"), ("lm_head.*", "transformer.wte.*")])
def test_both_sides_of_a_tied_weight_train_once(selectors):
    plan = select(gpt2(), *selectors)
    assert "transformer.wte.weight" in plan.names
    assert "lm_head.weight" not in plan.names


def test_error_lists_every_name_of_a_shared_parameter():
    with pytest.raises(
        ValueError, match=r"add .*'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'"
    ):
        select(t5(), "shared.weight")


def test_untied_model_trains_its_head_alone():
    assert select(llama(tied=False), "head").names == ("lm_head.weight",)
    with pytest.raises(ValueError, match="is tied to"):
        select(llama(tied=True), "head")


def test_overlapping_views_are_an_error():
    model = nn.Module()
    memory = torch.zeros(4, 6)
    model.a = nn.Parameter(memory[:, :4])
    model.b = nn.Parameter(memory[:, 3:])
    model.c = nn.Parameter(torch.zeros(2))
    for selector in ("a", "b", "all"):
        with pytest.raises(ValueError, match="'a' and 'b' are overlapping views"):
            select(model, selector)
    assert select(model, "c").names == ("c",)  # frozen views may overlap


def test_interleaved_views_that_share_no_element_are_fine():
    model = nn.Module()
    memory = torch.zeros(4, 6)
    model.a = nn.Parameter(memory[:, :3])
    model.b = nn.Parameter(memory[:, 3:])
    assert select(model, "all").names == ("a", "b")


def test_expanded_parameter_is_an_error():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(1).expand(3))
    with pytest.raises(ValueError, match="'a' is an expanded view"):
        select(model, "all")
    model.b = nn.Parameter(model.a.detach()[:1])
    with pytest.raises(ValueError, match="'a' and 'b' are overlapping views"):
        select(model, "b")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tensors_that_cannot_train_are_named(dtype):
    model = nn.ModuleDict({"quantised": nn.Module(), "head": nn.Linear(2, 2)})
    model["quantised"].weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=f"'quantised.weight' is {str(dtype)[6:]}; expected a floating-point"
    ):
        select(model, "all")
    assert select(model, "head").names == ("head.weight", "head.bias")


def test_uninitialised_and_inference_parameters_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases call lazy modules experimental
        lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="'weight' is not initialised yet"):
        select(lazy, "all")
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' is an inference tensor"):
        select(model, "all")


# ---- the plan ----


def test_selecting_again_replaces_the_selection_and_drops_stale_gradients():
    model = mlp()
    first = select(model, "all")
    model(torch.ones(1, 4)).sum().backward()
    second = select(model, "last:1")
    assert trained(model) == {"4.weight", "4.bias"} == set(second.names)
    assert model[0].weight.grad is None
    assert model[4].weight.grad is not None
    with pytest.raises(
        ValueError, match=r"'0.weight' is frozen; expected .*a later select replaces the plan"
    ):
        first.optimizer("sgd", lr=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # raised while torch imports its compiler
def test_compiled_model_gets_plain_names():
    model = mlp()
    assert select(torch.compile(model), "last:1").names == ("4.weight", "4.bias")


def test_param_groups_decay_matrices_only_in_model_order():
    model = bert()
    plan = select(model, "last:1", "head")
    decay, plain = plan.param_groups(0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decay["params"]] == [
        name for name in plan.names if name.endswith("weight") and "LayerNorm" not in name
    ]
    assert len(decay["params"]) + len(plain["params"]) == len(plan.names)
    assert [group["weight_decay"] for group in select(model, "biases").param_groups(0.1)] == [0.0]


def test_table_shows_blocks_totals_and_cost():
    model = bert()
    text = str(select(model, "last:2", "head"))
    lines = [line.split() for line in text.splitlines()]
    layer = sum(parameter.numel() for parameter in model.bert.encoder.layer[0].parameters())
    assert ["bert.encoder.layer.0-1", "-", f"{2 * layer:,}", "0"] in [line[:4] for line in lines]
    assert ["bert.encoder.layer.2-3", "yes", f"{2 * layer:,}", f"{2 * layer:,}"] in [
        line[:4] for line in lines
    ]
    total, chosen = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in select(model, "all").parameters()),
    )
    assert total == chosen
    assert ["total", f"{total:,}"] in [line[:2] for line in lines]
    assert "of 16 tensors" in str(select(model, "biases"))
    gradients = sum(p.numel() * 4 for p in select(model, "head").parameters())
    assert f"gradients    {gradients} B, full" in str(select(model, "head"))
    assert f"AdamW state  {2 * gradients} B" in str(select(model, "head"))


def test_table_of_a_single_layer_and_of_a_meta_model():
    assert "weight" in str(select(nn.Linear(2, 2), "weight"))
    with torch.device("meta"):
        model = mlp()
    assert "4" in str(select(model, "last:1"))


@pytest.mark.parametrize(("name", "kind"), [("adam", Adam), ("lamb", LAMB), ("sgd", torch.optim.SGD)])
def test_optimizer_passes_arguments_on(name, kind):
    plan = select(mlp(), "last:1")
    extra = {"momentum": 0.9} if name == "sgd" else {"betas": (0.8, 0.9)}
    optimizer = plan.optimizer(name, lr=0.5, weight_decay=0.2, **extra)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    for key, value in extra.items():
        assert optimizer.param_groups[0][key] == value


def test_default_optimizer_is_superfines_adamw():
    from superfine.optim import AdamW

    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer(lr=0.5)
    assert type(optimizer) is AdamW
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step(model, plan, optimizer)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(plan.names)


def test_unknown_optimizer_is_an_error_with_a_near_miss():
    plan = select(mlp(), "last:1")
    with pytest.raises(
        ValueError, match="'adamW'; expected one of adamw, adam, lamb, sgd; did you mean 'adamw'"
    ):
        plan.optimizer("adamW", lr=0.1)
    with pytest.raises(TypeError):
        plan.optimizer("sgd", lr=0.1, beta=3)


def test_selector_words_are_documented():
    from superfine import selectors

    assert all(f"``{word}``" in (selectors.__doc__ or "") for word in WORDS)


def test_select_stays_a_function_whatever_is_imported_first():
    # A submodule of the same name must not shadow the function on the package.
    script = (
        "import superfine.delta, superfine, torch\n"
        "print(superfine.select(torch.nn.Linear(2, 2), 'all').names)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "('weight', 'bias')\n", done.stderr


def test_the_head_of_a_t5_that_answers_questions():
    from transformers import T5Config, T5ForQuestionAnswering

    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    plan = select(T5ForQuestionAnswering(config), "head")
    assert set(plan.names) == {"qa_outputs.weight", "qa_outputs.bias"}
