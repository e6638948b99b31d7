"""use_fused_loss: models that add to their logits, and what happens to a model around and after it."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import small_models
import torch
import transformers
from small_models import TOKENS, VOCAB
from superfine.fused_loss import FusedLoss, use_fused_loss
from torch import nn

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")

BART = {
    "vocab_size": VOCAB, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3, "num_labels": 3,
}  # fmt: skip


def bart(cls: str = "BartForConditionalGeneration") -> nn.Module:
    return getattr(transformers, cls)(transformers.BartConfig(**BART)).eval()


def mbart() -> nn.Module:
    return transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART))


def m2m100() -> nn.Module:
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**BART))


def esm() -> nn.Module:
    config = transformers.EsmConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, pad_token_id=1, mask_token_id=3,
    )  # fmt: skip
    return transformers.EsmForMaskedLM(config)


def prophetnet() -> nn.Module:
    config = transformers.ProphetNetConfig(
        vocab_size=VOCAB, hidden_size=8, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.ProphetNetForConditionalGeneration(config)


class Cropped(transformers.LlamaForCausalLM):
    """Its loss is of fewer classes than its head has."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :-1]
        if labels is not None:
            loss = self.loss_function(output.logits, labels, VOCAB - 1)
            output = type(output)(loss=loss, logits=output.logits)
        return output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bart, "expected .* nothing added to the logits"),  # a buffer, which is zero
        (mbart, "expected .* nothing added to the logits"),
        (esm, "expected .* nothing added to the logits"),  # a parameter, which is zero
        (m2m100, "the encoder-decoder is 'M2M100ForConditionalGeneration'"),
        (prophetnet, "labels is of shape"),
        (lambda: Cropped(small_models.llama().config), "logits are changed between head and loss"),
    ],
    ids=["bart", "mbart", "esm", "m2m100", "prophetnet", "cropped"],
)
def test_other_models_are_refused_and_left_as_they_are(make, message):
    model = make()
    kind, attributes = type(model), set(vars(model))
    with pytest.raises(ValueError, match=f"^use_fused_loss: .*{message}"):
        use_fused_loss(model)
    assert (type(model), set(vars(model))) == (kind, attributes)


def test_every_module_keeps_its_mode():
    for model in (small_models.llama(), small_models.bert()):
        model.train()
        frozen = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        frozen.eval()
        modes = [module.training for module in model.modules()]
        use_fused_loss(model)
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_on_the_head_that_come_afterwards_are_not_passed_over(kind):
    model = small_models.llama().eval()
    use_fused_loss(model)
    if kind == "forward":
        handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    else:
        handle = model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(RuntimeError, match="use_fused_loss: the model's head has hooks"):
        model(input_ids=TOKENS, labels=TOKENS, output_logits=False)
    output = model(input_ids=TOKENS, labels=TOKENS)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    handle.remove()
    torch.testing.assert_close(
        model(input_ids=TOKENS, labels=TOKENS, output_logits=False).loss,
        model(input_ids=TOKENS, labels=TOKENS).loss,
    )


@pytest.mark.parametrize("name", ["bart", "t5", "t5, language model"])
def test_outputs_have_the_caches_of_the_model_s_own(name):
    tokens, labels = TOKENS.clone(), torch.tensor([0, 2])
    if name == "bart":
        model = bart("BartForSequenceClassification")
        tokens[tokens == 3] = 4
        tokens[:, -1] = 3  # its class is read at the end token
    elif name == "t5":
        config = small_models.t5().config
        config.num_labels = 3
        config.eos_token_id = 1
        tokens[:, -1] = 1
        model = transformers.T5ForSequenceClassification(config).eval()
    else:
        model, labels = small_models.t5().eval(), tokens
    other = copy.deepcopy(model)
    use_fused_loss(model)
    found, expected = (each(input_ids=tokens, labels=labels) for each in (model, other))
    assert list(found.keys()) == list(expected.keys())
    assert ("past_key_values" in found) == (name == "t5, language model")
    found, expected = (each(input_ids=tokens, labels=labels, return_dict=False) for each in (model, other))
    assert [type(value) for value in found] == [type(value) for value in expected]


def test_remove_after_the_forward_was_kept():
    model = small_models.llama()
    expected = model(input_ids=TOKENS, labels=TOKENS)
    fused = use_fused_loss(model)
    # What accelerate does for mixed precision, and Trainer thus.
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__), model)
    assert model(input_ids=TOKENS, labels=TOKENS).logits is None
    fused.remove()
    output = model(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)
    assert output.logits.shape == expected.logits.shape


def test_replicas_of_data_parallel_are_refused():
    model = small_models.llama()
    use_fused_loss(model)
    replica = model._replicate_for_data_parallel()  # what DataParallel makes of the model on every GPU
    with pytest.raises(RuntimeError, match=r"replica of torch.nn.DataParallel, .*; expected DistributedData"):
        replica(input_ids=TOKENS, labels=TOKENS)
    FusedLoss(model).remove()


@pytest.mark.parametrize("logits", [False, True])
def test_labels_of_another_shape_are_named(logits):
    model = small_models.llama()
    use_fused_loss(model)
    with pytest.raises(ValueError, match=r"labels is of shape \(2, 3\); expected \(2, 6\), a label for each"):
        model(input_ids=TOKENS, labels=TOKENS[:, :3], output_logits=logits)


def test_a_batch_without_labels_has_no_mean():
    model = small_models.llama()
    use_fused_loss(model)
    assert model(input_ids=TOKENS, labels=torch.full_like(TOKENS, -100)).loss.isnan()
    with pytest.raises(ValueError, match="cross_entropy: num_items is 0"):
        model(input_ids=TOKENS, labels=TOKENS, num_items_in_batch=0)
