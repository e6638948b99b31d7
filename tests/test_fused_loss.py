"""use_fused_loss: the model's own loss and gradients, without logits, and a way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import small_models
import torch
import transformers
from small_models import TOKENS, VOCAB
from superfine.fused_loss import FusedLoss, use_fused_loss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")


def masked(name: str) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 20}
    bert = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "distilbert":
        config = transformers.DistilBertConfig(**sizes, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
        return transformers.DistilBertForMaskedLM(config)
    if name == "roberta":
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, **bert))
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **bert))
    nn.init.normal_(model.cls.predictions.bias)
    return model


def llama_classifier() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def mixtral() -> nn.Module:
    """Its forward adds the loss of its router to that of the tokens."""
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, num_local_experts=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def modernbert() -> nn.Module:
    """With labels, it sends only the tokens that have one through its head."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
        sparse_prediction=True,
    )  # fmt: skip
    return transformers.ModernBertForMaskedLM(config)


LANGUAGE_MODELS = {
    "gpt2": small_models.gpt2,
    "llama": small_models.llama,
    "llama, tied": lambda: small_models.llama(tied=True),
    "bert": lambda: masked("bert"),
    "distilbert": lambda: masked("distilbert"),
    "roberta": lambda: masked("roberta"),
    "t5": small_models.t5,
}
CLASSIFIERS = {
    "bert, sequences": small_models.bert,
    "bert, tokens": lambda: small_models.bert("BertForTokenClassification"),
    "llama, sequences": llama_classifier,
    "gpt2, sequences": lambda: small_models.gpt2("GPT2ForSequenceClassification", num_labels=3),
}
MODELS = LANGUAGE_MODELS | CLASSIFIERS


def labels_of(model: nn.Module) -> torch.Tensor:
    if model.loss_type == "ForSequenceClassification":
        return torch.tensor([2, 0])
    labels = TOKENS % 3 if model.loss_type == "ForTokenClassification" else TOKENS.clone()
    labels[0, :3] = -100
    return labels


def outcome(model: nn.Module, **kwargs) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=labels_of(model), **kwargs)
    output.loss.backward()
    return [output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# --- the same loss --------------------------------------------------------------------------------------------


SPECIAL = {"mixtral": mixtral, "modernbert": modernbert}


@pytest.mark.parametrize("name", MODELS | SPECIAL)
@pytest.mark.parametrize("logits", [False, True])
def test_loss_and_gradients_are_the_model_s_own(name, logits):
    model = (MODELS | SPECIAL)[name]().eval()
    other = copy.deepcopy(model)
    fused = use_fused_loss(model)
    torch.testing.assert_close(outcome(model, output_logits=logits), outcome(other))
    fused.remove()
    torch.testing.assert_close(outcome(model), outcome(other), rtol=0, atol=0)
    assert type(model) is type(other)
    assert vars(model).keys() == vars(other).keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]
    fused.remove()  # again: nothing


@pytest.mark.parametrize("num_items", [5, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_num_items_divides_the_sum(name, logits, num_items):
    # Not compared with the model: BERT's, for one, ignores num_items_in_batch.
    model = MODELS[name]().eval()
    count = int((labels_of(model) != -100).sum())
    if name in ("gpt2", "llama", "llama, tied"):
        count = int((labels_of(model)[:, 1:] != -100).sum())
    use_fused_loss(model)
    mean = outcome(model, output_logits=logits)
    found = outcome(model, output_logits=logits, num_items_in_batch=num_items)
    torch.testing.assert_close(found, [value * (count / int(num_items)) for value in mean])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "bert", "bert, sequences"])
def test_other_dtypes(name, dtype):
    model = MODELS[name]().to(dtype).eval()
    exact = copy.deepcopy(model).double()
    use_fused_loss(model)
    loss = model(input_ids=TOKENS, labels=labels_of(model), output_logits=False).loss
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}[dtype]  # eager's is float32
    expected = exact(input_ids=TOKENS, labels=labels_of(model)).loss.double()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)


def test_labels_that_are_shifted_already_and_tuples():
    model = small_models.llama()
    labels = labels_of(model)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    expected = model(input_ids=TOKENS, labels=labels).loss
    use_fused_loss(model)
    loss = model(input_ids=TOKENS, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(loss, expected)
    as_tuple = model(input_ids=TOKENS, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)
    assert as_tuple[1] is None
    assert model(input_ids=TOKENS, labels=labels, return_dict=False, output_logits=True)[1].shape[-1] == VOCAB


@pytest.mark.parametrize("name", ["bert", "bert, tokens"])
def test_tuples_of_models_that_make_their_loss_themselves(name):
    model = MODELS[name]().eval()
    expected = model(input_ids=TOKENS, labels=labels_of(model), return_dict=False)
    use_fused_loss(model, logits=True)
    torch.testing.assert_close(model(input_ids=TOKENS, labels=labels_of(model), return_dict=False), expected)


def test_labels_by_position():
    model = small_models.llama()
    expected = model(TOKENS, None, None, None, None, labels_of(model)).loss
    use_fused_loss(model)
    output = model(TOKENS, None, None, None, None, labels_of(model))
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    with pytest.raises(TypeError, match="input_ids"):
        model(TOKENS, input_ids=TOKENS, labels=labels_of(model))


def test_a_frozen_part_stays_without_gradients():
    model = small_models.llama()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    use_fused_loss(model)
    assert len(outcome(model)) == 2
    assert model.training


@pytest.mark.parametrize("name", ["regression", "several labels"])
def test_regression_and_several_labels_stay_as_they_are(name):
    model = small_models.bert(labels=1 if name == "regression" else 3).eval()
    labels = torch.tensor([0.5, -1.0]) if name == "regression" else torch.eye(3)[:2]
    expected = model(input_ids=TOKENS, labels=labels).loss
    model.config.problem_type = None
    use_fused_loss(model)
    assert model.config.problem_type is None, "the check must not decide what the model is for"
    torch.testing.assert_close(model(input_ids=TOKENS, labels=labels).loss, expected, rtol=0, atol=0)


# --- logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_there_where_they_are_asked_for(name):
    model = LANGUAGE_MODELS[name]().eval()
    labels = labels_of(model)
    expected = model(input_ids=TOKENS, labels=labels).logits
    fused = use_fused_loss(model)
    for training, wanted, there in (
        (True, None, False), (True, True, True), (True, False, False),
        (False, None, True), (False, True, True), (False, False, False),
    ):  # fmt: skip
        output = model.train(training)(input_ids=TOKENS, labels=labels, output_logits=wanted)
        assert (output.logits is not None) == there
        assert ("logits" in output) == there, "an output's keys are what Trainer reads"
    assert torch.equal(model(input_ids=TOKENS, labels=labels).logits, expected)
    fused.remove()
    for always in (False, True):
        fused = use_fused_loss(model, logits=always)
        assert (model(input_ids=TOKENS, labels=labels).logits is not None) == always
        assert (model.train()(input_ids=TOKENS, labels=labels).logits is not None) == always
        model.eval()
        fused.remove()


def test_gradients_flow_through_logits_that_were_asked_for():
    model = small_models.llama().eval()
    other = copy.deepcopy(model)
    use_fused_loss(model)
    for each, more in ((model, {"output_logits": True}), (other, {})):
        output = each(input_ids=TOKENS, labels=TOKENS, **more)
        (output.loss + output.logits.square().mean()).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, tied"])
def test_without_labels_nothing_changes(name):
    model = LANGUAGE_MODELS[name]().eval()
    expected = model(input_ids=TOKENS).logits
    generated = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    use_fused_loss(model)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    again = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(again, generated)


class Largest(TorchDispatchMode):
    """The most elements that any op returned in one tensor of its own."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


def large(kind: str) -> nn.Module:
    sizes = {
        "vocab_size": 8192, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    return capped("gemma2", **sizes)


@pytest.mark.parametrize("kind", ["llama", "bert", "gemma2"])
def test_no_tensor_is_as_large_as_the_logits(kind):
    model = large(kind).requires_grad_(False)
    next(p for name, p in model.named_parameters() if "mlp" in name or "attention" in name).requires_grad_(
        True
    )
    tokens = torch.arange(256)[None]
    with Largest() as eager:
        model(input_ids=tokens, labels=tokens).loss.backward()
    use_fused_loss(model)
    with Largest() as fused:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert eager.elements >= 256 * 8192
    assert fused.elements <= 256 * 4096


# --- models that change their logits ------------------------------------------------------------------------


def capped(name: str, **sizes) -> nn.Module:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0,
    } | sizes  # fmt: skip
    if name == "gemma2":
        config = transformers.Gemma2Config(**sizes, head_dim=4, final_logit_softcapping=0.1)
        return transformers.Gemma2ForCausalLM(config)
    if name == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, logit_scale=0.5))
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=4.0))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_caps_and_scales_of_the_configuration_are_computed(name):
    model = capped(name).eval()
    other = copy.deepcopy(model)
    use_fused_loss(model)
    torch.testing.assert_close(outcome(model, output_logits=False), outcome(other))


class Doubled(transformers.LlamaForCausalLM):
    """Its configuration does not say that it changes its logits."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        if labels is not None:
            output = type(output)(
                loss=self.loss_function(output.logits, labels, VOCAB),
                logits=output.logits,
                past_key_values=None,
            )
        return output


def test_logits_that_are_changed_unsaid_are_refused():
    model = Doubled(small_models.llama().config)
    with pytest.raises(ValueError, match=r"use_fused_loss: logits are changed .* \(nothing\); expected"):
        use_fused_loss(model)


def test_a_loss_that_is_changed_unsaid_is_refused():
    class Regularised(transformers.LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, **kwargs)
            if labels is not None:
                output.loss = 1 + nn.functional.cross_entropy(output.logits[0], labels[0])
            return output

    with pytest.raises(ValueError, match="use_fused_loss: the loss of a few tokens is"):
        use_fused_loss(Regularised(small_models.llama().config))


def vision() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (small_models.mlp, TypeError, "model is 'Sequential'"),
        (vision, ValueError, "the model's input is 'pixel_values'"),
        (lambda: small_models.bert("BertModel"), ValueError, "the model's head is 'NoneType'"),
        (lambda: small_models.bert("BertForNextSentencePrediction"), ValueError, "the model's head is"),
        (
            lambda: small_models.bert("BertForPreTraining"),
            ValueError,
            "the loss for input_ids and labels is None",
        ),
    ],
)
def test_other_models_are_refused_and_left_as_they_are(make, error, message):
    model = make()
    attributes = {key: value for key, value in vars(model).items() if key != "config"}
    with pytest.raises(error, match=f"use_fused_loss: .*{message}"):
        use_fused_loss(model)
    assert {key: value for key, value in vars(model).items() if key != "config"} == attributes
    assert model.training


def test_another_loss_is_refused_and_kept():
    model = small_models.llama()

    def mine(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    model.loss_function = mine
    with pytest.raises(ValueError, match=r"the model's loss is 'mine' .*; expected ForCausalLMLoss"):
        use_fused_loss(model)
    assert model.loss_function is mine


@pytest.mark.parametrize("hooked", ["hook", "forward"])
def test_hooks_on_the_head_are_refused(hooked):
    model = small_models.llama()
    if hooked == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    else:
        model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight) * 2
    with pytest.raises(ValueError, match=r"the model's head is 'Linear' .*; expected .* without hooks"):
        use_fused_loss(model)


def test_twice_is_refused():
    model = small_models.llama()
    use_fused_loss(model)
    with pytest.raises(ValueError, match="is replaced already"):
        use_fused_loss(model)
    with pytest.raises(ValueError, match="FusedLoss: model is 'LlamaForCausalLM'"):
        FusedLoss(small_models.llama())


def test_a_head_that_is_replaced_afterwards_is_noticed():
    model = small_models.llama()
    use_fused_loss(model)
    model.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(RuntimeError, match="the model's head is another one than when it was called"):
        model(input_ids=TOKENS, labels=TOKENS)


def test_logits_of_some_positions_are_refused():
    model = small_models.llama()
    use_fused_loss(model)
    with pytest.raises(ValueError, match=r"labels is of shape \(2, 6\); expected \(2, 2\), a label for each"):
        model(input_ids=TOKENS, labels=TOKENS, logits_to_keep=2)
    torch.testing.assert_close(outcome(model), outcome(copy.deepcopy(model)))  # and it goes on


# --- copies, files, compilers -------------------------------------------------------------------------------


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama, tied", "bert", "bert, sequences"])
def test_copies_are_models_of_their_own(name, copied):
    model = MODELS[name]().eval()
    expected = outcome(model)
    use_fused_loss(model, logits=False)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(outcome(other), expected)
    assert (other(input_ids=TOKENS, labels=labels_of(other)).logits is None) == (name in LANGUAGE_MODELS)
    FusedLoss(other).remove()
    assert type(other) is type(MODELS[name]())
    torch.testing.assert_close(outcome(other), expected)
    assert "_fused_loss" in vars(model)


@pytest.mark.parametrize("name", ["llama", "bert", "bert, sequences"])
def test_saved_folders_are_the_model_s_own(name, tmp_path):
    model = MODELS[name]()
    state = set(model.state_dict())
    use_fused_loss(model)
    assert set(model.state_dict()) == state
    model.save_pretrained(tmp_path)
    kind = type(MODELS[name]())
    assert model.config.architectures == [kind.__name__]
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert isinstance(model, kind)
    assert repr(model) == repr(again)


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
@pytest.mark.parametrize("name", ["llama", "bert", "bert, sequences"])
def test_a_compiled_model_is_one_graph(name):
    model = MODELS[name]()
    model.eval()
    expected = outcome(model)
    use_fused_loss(model, logits=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(
        input_ids=TOKENS, labels=labels_of(model)
    ).loss.backward()  # fullgraph: a break would be an error
    found = [compiled(input_ids=TOKENS, labels=labels_of(model)).loss.detach()]
    torch.testing.assert_close(
        [*found, *(p.grad for p in model.parameters() if p.grad is not None)], expected
    )


def test_gradient_checkpointing():
    model = small_models.llama()
    expected = outcome(model)
    model.gradient_checkpointing_enable()
    use_fused_loss(model)
    torch.testing.assert_close(outcome(model, use_cache=False), expected)
    assert model(input_ids=TOKENS, labels=TOKENS, use_cache=False).logits is None
