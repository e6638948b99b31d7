import copy
import pickle

import pytest
import small_models
import superfine
import torch
import transformers
from small_models import TOKENS, VOCAB, causal
from superfine import fused_modules
from superfine._activations import saved_bytes
from superfine._recompute import origin
from torch import nn

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft's
]


def lora(model, **settings):
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def scramble(model):
    """Random norms and biases: fresh ones are ones and zeros, which hide what is done with them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def loss_of(model):
    config = getattr(model, "config", None)
    if config.is_encoder_decoder:
        return model(input_ids=TOKENS, labels=TOKENS.flip(1)).loss
    if "Classification" in type(model).__name__:
        return model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(model, loss=loss_of):
    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted, tolerance):
    assert found[0] == pytest.approx(wanted[0].item(), rel=10 * tolerance)
    assert found[1].keys() == wanted[1].keys()
    largest = max(g.double().norm() for g in wanted[1].values())
    for name, gradient in wanted[1].items():
        error = (found[1][name].double() - gradient.double()).norm()
        assert error <= tolerance * (gradient.double().norm() + 1e-2 * largest), name


FAMILIES = {
    "bert": small_models.bert,
    "roberta": small_models.roberta,
    "distilbert": small_models.distilbert,
    "gpt2": small_models.gpt2,
    "llama": lambda: causal("Llama"),
    "qwen": lambda: causal("Qwen2"),
    "phi3": lambda: causal("Phi3"),
    "gemma": lambda: causal("Gemma", hidden_activation="gelu_pytorch_tanh"),
    "t5": small_models.t5,
    "t5 gated": lambda: small_models.t5(feed_forward_proj="gated-gelu"),
}
BECOMES = {
    "bert": {"layer_norm", "layer_norm with residual"},
    "roberta": {"layer_norm", "layer_norm with residual"},
    "distilbert": {"layer_norm"},
    "gpt2": {"layer_norm", "gelu"},
    "llama": {"rms_norm", "swiglu"},
    "qwen": {"rms_norm", "swiglu"},
    "phi3": {"rms_norm", "swiglu"},
    "gemma": {"rms_norm", "geglu", "gelu"},
    "t5": {"rms_norm"},
    "t5 gated": {"rms_norm", "geglu", "gelu"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_stay(family):
    model = scramble(FAMILIES[family]()).train()  # with dropout where the family has it by default
    small = ["norms", "biases"] if family in ("bert", "roberta", "distilbert", "gpt2", "qwen") else ["norms"]
    model.double()  # the formulas; tests/test_gradient_accuracy.py has float32's rounding
    for selectors in (small, ["all"]):
        superfine.select(model, *selectors)
        wanted = gradients(model)
        for recompute in (False, True):
            report = fused_modules.install(model, recompute=recompute)
            kinds = {what.removesuffix(", recomputed") for what in report.changed.values()} - {"MLP"}
            assert kinds == BECOMES[family]
            recomputes = any("recomputed" in what for what in report.changed.values())
            assert recomputes == (recompute and selectors != ["all"])
            found = gradients(model)
            fused_modules.remove(model)
            assert_close(found, wanted, 1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5 gated"])
def test_gradients_of_lora_are_those_of_peft(family, dropout):
    settings = {"fan_in_fan_out": True} if family == "gpt2" else {}
    model = lora(scramble(FAMILIES[family]()), lora_dropout=dropout, **settings).train().double()
    wanted = gradients(model)
    for recompute in (False, True):
        report = fused_modules.install(model, recompute=recompute)
        assert list(report.changed.values()).count("LoRA linear as one node") >= 8
        found = gradients(model)
        fused_modules.remove(model)
        assert_close(found, wanted, 1e-10)


# --- memory ---------------------------------------------------------------------------------------------------


def saved(model, loss):
    return saved_bytes(lambda: loss(model), model.buffers())


def test_bert_with_norms_or_biases_keeps_a_third_less():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=256,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(VOCAB, (4, 64))

    def loss(model):
        return model(input_ids=tokens, labels=torch.zeros(4, dtype=torch.long)).loss

    for selector in ("norms", "biases"):
        superfine.select(model, selector)
        eager, wanted = saved(model, loss), gradients(model, loss)
        fused_modules.install(model, recompute=True)
        # q, k, v, attention's output and the sums before two norms: 6 H of 10 H.
        assert saved(model, loss) < 0.65 * eager
        assert_close(gradients(model, loss), wanted, 1e-6)
        fused_modules.remove(model)
        assert saved(model, loss) == eager


def test_llama_with_lora_in_bfloat16_keeps_a_third_less():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = lora(transformers.LlamaForCausalLM(config).bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    tokens = torch.randint(VOCAB, (4, 64))

    def loss(model):
        return model(input_ids=tokens, labels=tokens).loss

    eager, wanted = saved(model, loss), gradients(model, loss)
    exact = gradients(copy.deepcopy(model).double(), loss)
    bytes_of = {}
    for recompute in (False, True):
        fused_modules.install(model, recompute=recompute)
        bytes_of[recompute] = saved(model, loss)
        found = gradients(model, loss)
        fused_modules.remove(model)
        for name, gradient in exact[1].items():  # both round in bfloat16, at other places
            errors = [(g[1][name].double() - gradient).norm() / gradient.norm() for g in (found, wanted)]
            assert errors[0] < 1.5 * errors[1] + 1e-3, name
    assert bytes_of[False] < 0.65 * eager
    assert bytes_of[True] < 0.6 * bytes_of[False]


def test_gate_and_up_of_one_product_keep_that_alone():
    mlp, x = causal("Phi3").model.layers[0].mlp, torch.randn(40, 8, requires_grad=True)
    wanted = gradients(mlp, lambda mlp: mlp(x).square().sum())
    mlp.requires_grad_(False)
    eager = saved(mlp, lambda mlp: mlp(x))
    assert fused_modules.install(mlp).changed == {"": "swiglu"}
    assert (
        eager - saved(mlp, lambda mlp: mlp(x)) >= 40 * 16 * 4
    )  # the activated gate; 16 is intermediate_size
    mlp.requires_grad_(True)
    assert_close(gradients(mlp, lambda mlp: mlp(x).square().sum()), wanted, 1e-6)


def test_a_frozen_model_keeps_nothing():
    model = small_models.bert()
    model.requires_grad_(False)
    fused_modules.install(model, recompute=True)
    assert saved(model, loss_of) == 0


# --- in the company of others ---------------------------------------------------------------------------------


def test_removed_as_if_never_there():
    model = lora(causal("Llama"))
    before = {path: (type(m), sorted(vars(m))) for path, m in model.named_modules()}
    state, loss = copy.deepcopy(model.state_dict()), loss_of(model)
    report = fused_modules.install(model, recompute=True)
    assert all(type(model.get_submodule(path)) is not before[path][0] for path in report.changed)
    assert all(isinstance(model.get_submodule(path), before[path][0]) for path in report.changed)
    assert model.state_dict().keys() == state.keys()
    fused_modules.remove(model)
    fused_modules.remove(model)  # nothing is left to remove
    assert {path: (type(m), sorted(vars(m))) for path, m in model.named_modules()} == before
    assert torch.equal(loss_of(model), loss)


def test_copies_and_pickles():
    model = small_models.bert().eval()
    superfine.select(model, "norms")
    fused_modules.install(model, recompute=True)
    wanted = gradients(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(gradients(made), wanted, 1e-12)
        with torch.no_grad():
            made.bert.encoder.layer[0].output.LayerNorm.weight.zero_()  # not the original's
        fused_modules.remove(made)
        assert type(made.bert.encoder.layer[0].intermediate).__mro__[1] is not type(
            model.bert.encoder.layer[0]
        )
        assert not any("_superfine_fused" in vars(m) for m in made.modules())
    assert_close(gradients(model), wanted, 1e-12)


def test_outputs_are_saved_without_what_they_follow_from(tmp_path):
    model = small_models.bert("BertModel")
    fused_modules.install(model, recompute=True)
    output = model(TOKENS).last_hidden_state
    assert origin(output) is not None
    torch.save(output.detach(), tmp_path / "output.pt")
    assert (tmp_path / "output.pt").stat().st_size < 2000 + output.nbytes
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), output)


def test_checkpointed_blocks():
    model = lora(causal("Llama")).train()
    model.enable_input_require_grads()
    wanted = gradients(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fused_modules.install(model, recompute=True)
        assert_close(gradients(model), wanted, 2e-6)
        fused_modules.remove(model)
        model.gradient_checkpointing_disable()


def test_autocast():
    for model in (lora(causal("Llama")), small_models.bert(layers=2).eval()):
        if not hasattr(model, "peft_config"):
            superfine.select(model, "norms", "biases")

        def loss(model):
            with torch.autocast("cpu", torch.bfloat16):  # twice: casts are cached within
                return loss_of(model) + loss_of(model)

        exact = gradients(model, lambda model: 2 * loss_of(model))[1]
        wanted = gradients(model, loss)[1]
        for recompute in (False, True):
            fused_modules.install(model, recompute=recompute)
            found = gradients(model, loss)[1]
            fused_modules.remove(model)
            total = torch.cat([g.flatten() for g in exact.values()])
            errors = [torch.cat([g.flatten() for g in f.values()]) - total for f in (found, wanted)]
            assert errors[0].norm() < 1.5 * errors[1].norm()


def test_compiled():
    block = causal("Llama").model.layers[0]
    model = lora(nn.Sequential(block.post_attention_layernorm, block.mlp))
    x = torch.randn(3, 8)
    wanted = gradients(model, lambda model: model(x).square().sum())
    fused_modules.install(model, recompute=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(model, lambda _: compiled(x).square().sum()), wanted, 2e-6)


def test_states_of_an_adapter():
    model = lora(causal("Llama")).eval()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    fused_modules.install(model)

    def same():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits)

    same()
    with model.disable_adapter(), plain.disable_adapter():
        same()
    for each in (model, plain):
        each.set_adapter("other")
    same()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
    same()
    for each in (model, plain):
        each.merge_adapter()
    same()


@pytest.mark.filterwarnings("default")  # Trainer and accelerate give warnings of their own
def test_trainer(tmp_path):
    def trained(recompute):
        torch.manual_seed(0)
        model = small_models.bert(layers=2)
        superfine.select(model, "norms", "biases")
        if recompute is not None:
            fused_modules.install(model, recompute=recompute)
        data = [{"input_ids": row, "labels": i} for i, row in enumerate(TOKENS)]
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-2,
            seed=0,
        )
        transformers.Trainer(model, arguments, train_dataset=data).train()
        return model.state_dict()

    wanted = trained(None)
    for recompute in (False, True):
        torch.testing.assert_close(trained(recompute), wanted, rtol=1e-4, atol=1e-5)


# --- what is left alone ---------------------------------------------------------------------------------------


class CubedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + self.eps)


class SwappedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def test_lookalikes_stay_with_the_reason():
    model = nn.ModuleDict(
        {
            "norm": CubedRMSNorm(),
            "mlp": SwappedMLP(),
            "image": nn.LayerNorm((2, 4)),
            "patched": nn.LayerNorm(4),
            "relu": nn.ReLU(),
            "erf": nn.GELU(),
        }
    )
    model["patched"].forward = lambda x: x
    state = torch.get_rng_state()
    report = fused_modules.install(model, recompute=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.changed == {}
    assert report.skipped == {
        "norm": "CubedRMSNorm computes something else than an RMS norm",
        "mlp": "SwappedMLP computes something else than its parts suggest",
        "image": "it is over more than one dimension",
        "patched": "its forward was replaced on the module itself",
        "erf": "torch's own gelu keeps no more than its input either, and is not slower",
    }
    assert "left: norm: CubedRMSNorm" in str(report)


@pytest.mark.parametrize(
    "name", ["gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"]
)
def test_every_other_form_of_gelu(name):
    model = nn.Sequential(copy.deepcopy(transformers.activations.ACT2FN[name]))
    x = torch.randn(5, 7, dtype=torch.float64)
    expected = model(x)
    assert fused_modules.install(model).changed == {"0": "gelu"}
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-9)
    with pytest.raises(TypeError):  # what is no tensor reaches the module's own forward
        model("x")


def test_adapters_that_are_no_pair_of_matrices_stay():
    model = lora(causal("Llama"), use_dora=True)
    report = fused_modules.install(model)
    assert set(report.skipped.values()) == {"its adapter is a variant, such as DoRA"}
    assert "LoRA linear as one node" not in report.changed.values()


def test_hooks_of_a_fused_part_are_called():
    model, calls = small_models.bert(layers=1), []
    fused_modules.install(model)
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    loss_of(model)
    assert calls == [1]


def test_a_mixture_of_dtypes_is_computed_as_before():
    model = causal("Llama").bfloat16()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("layernorm"):
                module.float()
    norm, x = model.model.layers[0].input_layernorm, torch.randn(3, 8, dtype=torch.bfloat16)
    expected = norm(x)
    fused_modules.install(model)
    assert norm(x).dtype == expected.dtype
    torch.testing.assert_close(norm(x), expected)
    assert fused_modules.Report({"a": "gelu", "b": "gelu"}).__str__() == "2 x gelu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model is str; expected a torch.nn.Module"),
        ((nn.Linear(2, 2), "plan"), TypeError, "plan is str; expected a superfine.Plan or None"),
        ((nn.Linear(2, 2), superfine.select(nn.Linear(2, 2), "all")), ValueError, "plan is of another model"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"install: {message}"):
        fused_modules.install(*arguments)


def test_installed_twice():
    model = nn.Sequential(nn.LayerNorm(4))
    fused_modules.install(model, superfine.select(model, "all"))
    with pytest.raises(ValueError, match="'0' is fused already"):
        fused_modules.install(model)


def test_gradients_of_one_adapter_alone():
    model = lora(causal("Llama"))
    weight = model.base_model.model.model.layers[1].mlp.down_proj.lora_A.default.weight
    wanted = torch.autograd.grad(loss_of(model), weight)
    fused_modules.install(model, recompute=True)
    loss = loss_of(model)
    for _ in range(2):  # the node before it does not run, and what was made for it is made again
        torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=True), wanted)
