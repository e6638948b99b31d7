"""What ``superfine.select`` trains, what it refuses, and what the first step of its optimizer notices."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from superfine.select import Plan, select
from superfine.selectors import WORDS, layer_stacks, match
from torch import nn

transformers = pytest.importorskip("transformers")

# Widths of 8 and 2 to 4 layers: the smallest with several heads and a first, an inner and a last layer.
VOCAB = 32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bert(cls="BertForSequenceClassification", layers=4):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    return getattr(transformers, cls)(config)


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
    )
    return transformers.RobertaForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=8, n_layers=3, n_heads=2, hidden_dim=16, max_position_embeddings=16
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(cls="GPT2LMHeadModel", **settings):
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=8,
        n_layer=3,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    return getattr(transformers, cls)(config)


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def starting(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def step(model, plan, optimizer, inputs=None):
    """One backward and step of a small model on a fixed input."""
    model(torch.linspace(-1, 1, 8).view(2, 4) if inputs is None else inputs).square().sum().backward()
    optimizer.step()


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
        expected = {name for name, _ in model.named_parameters() if ".attention.self." in name}
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


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning"
)  # raised while torch imports its compiler
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


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
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
    with pytest.raises(ValueError, match="'adamW'; expected one of adamw, adam, sgd; did you mean 'adamw'"):
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


# ---- the first step ----


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_check_passes_once_and_removes_itself_beside_other_hooks():
    model = mlp()
    plan = select(model, "last:2")
    optimizer = plan.optimizer("sgd", lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("first"))
    optimizer.register_step_post_hook(lambda *_: calls.append("second"))
    step(model, plan, optimizer)
    assert calls == ["first", "second"]
    assert hooks(optimizer) == 2
    model[0].weight.requires_grad_(True)  # no longer watched
    optimizer.zero_grad()
    step(model, plan, optimizer)


def test_check_can_be_left_out():
    assert hooks(select(mlp(), "all").optimizer("sgd", lr=0.1, first_step_check=False)) == 0


def test_missing_gradient_is_an_error_before_anything_moves():
    model = mlp()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    plan = select(model, "4.*", "unused.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    before = model[4].weight.clone()
    for _ in range(2):  # the check stays until a step passes
        with pytest.raises(
            ValueError, match=r"selected parameter 'unused.weight' \(and 1 other\) has no gradient"
        ):
            step(model, plan, optimizer)
    assert torch.equal(model[4].weight, before)


def test_step_before_backward_is_an_error():
    plan = select(mlp(), "all")
    with pytest.raises(ValueError, match=r"backward\(\) before step\(\)"):
        plan.optimizer("sgd", lr=0.1).step()


def test_all_zero_gradients_are_an_error():
    model = mlp()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    (model(torch.ones(1, 4)).sum() * 0).backward()
    with pytest.raises(ValueError, match=r"gradient of '0.weight' .* is zero everywhere, as is every other"):
        optimizer.step()


def test_tiny_gradients_are_not_zero():
    model = mlp()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    (model(torch.ones(1, 4)).sum() * 1e-30).backward()  # the squares of these vanish in fp32
    optimizer.step()
    assert hooks(optimizer) == 0


def test_one_zero_gradient_is_a_warning():
    class LoRA(nn.Module):  # the gradient of a is zero while b is
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2, bias=False)
            self.b = nn.Linear(2, 4, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return x + self.b(self.a(x))

    model = LoRA()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    with pytest.warns(UserWarning, match="gradient of 'a.weight' is zero everywhere"):
        step(model, plan, optimizer)
    assert hooks(optimizer) == 0


def test_parameter_unfrozen_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.bias' requires a gradient but is not selected"):
        step(model, plan, optimizer)


def test_parameter_added_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model.append(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"'5.weight' \(and 1 other\) requires a gradient but is not selected"
    ):
        step(model, plan, optimizer)


def test_parameter_frozen_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[4].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'4.bias' was frozen after select"):
        step(model, plan, optimizer)


def test_gradient_of_a_frozen_parameter_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=r"frozen parameter '0.weight' has a gradient"):
        step(model, plan, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", [0, 8, -1])  # both ends, and the middle, of the 64-bit words
def test_frozen_parameter_that_moves_is_an_error(dtype, index):
    # 17 elements: bytes beyond whole words; as a slice, so that words are not aligned either.
    model = nn.ModuleDict({"frozen": nn.Module(), "out": nn.Linear(4, 2)})
    model["frozen"].weight = nn.Parameter(torch.ones(18, dtype=dtype)[1:])
    plan = select(model, "out.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model["out"](torch.ones(1, 4)).sum().backward()

    def disturb(optimizer, args, kwargs):
        # numpy writes past autograd and its version counters, as a native kernel can
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        model["frozen"].weight.data.view(bits).numpy()[index] ^= 1

    optimizer.register_step_post_hook(disturb)
    with pytest.raises(ValueError, match=r"frozen parameter 'frozen.weight' moved in the first step"):
        optimizer.step()


def test_frozen_parameter_that_is_not_contiguous_is_watched():
    model = nn.ModuleDict({"frozen": nn.Module(), "out": nn.Linear(4, 2)})
    model["frozen"].weight = nn.Parameter(torch.zeros(3, 5).t())
    plan = select(model, "out.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model["out"](torch.ones(1, 4)).sum().backward()
    optimizer.register_step_post_hook(lambda *_: model["frozen"].weight.data[4, 2].add_(1))
    with pytest.raises(ValueError, match="moved in the first step"):
        optimizer.step()


def test_accumulated_gradients_pass():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("adam", lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    step(model, plan, optimizer)
    assert hooks(optimizer) == 0


def test_closure_is_checked_after_its_backward():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert hooks(optimizer) == 0

    blind = select(model, "last:1").optimizer("sgd", lr=0.1)
    blind.zero_grad()
    with pytest.raises(ValueError, match="has no gradient"):
        blind.step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    "fused", [False, True]
)  # fused optimizers skip inside step(), the others are not called
def test_step_skipped_by_grad_scaler_does_not_count(fused):
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("adam", lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watched = hooks(optimizer)
    for factor, remaining in ((float("inf"), watched), (1.0, 0)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum() * factor).backward()
        before = model[4].weight.clone()
        scaler.step(optimizer)
        scaler.update()
        assert hooks(optimizer) == remaining
        assert torch.equal(model[4].weight, before) == (remaining > 0)


def test_sparse_gradients_pass():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    plan = select(model, "embeddings")
    optimizer = plan.optimizer("sgd", lr=0.1, weight_decay=0.0)
    step(model, plan, optimizer, torch.tensor([1, 2]))
    assert hooks(optimizer) == 0


def test_failed_step_leaves_the_check_in_place():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    fail = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, plan, optimizer)
    fail.remove()
    step(model, plan, optimizer)
    assert hooks(optimizer) == 0


@pytest.mark.parametrize("build", [bert, roberta, distilbert])
def test_classifiers_train_their_last_layer_and_head(build):
    model = build()
    plan = select(model, "last:1", "head")
    assert isinstance(plan, Plan)
    optimizer = plan.optimizer("adam", lr=1e-3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.arange(2, 14).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(plan.names)


@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_language_models_train_their_last_layer(build):
    model = build()
    plan = select(model, "last:1", "norms")
    optimizer = plan.optimizer("adam", lr=1e-3)
    tokens = torch.arange(1, 13).view(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert hooks(optimizer) == 0
