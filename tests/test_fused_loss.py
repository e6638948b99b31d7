"""use_fused_loss: the model's own loss and gradients, without logits, and a way back."""

from __future__ import annotations

import copy

import pytest
import small_models
import torch
import transformers
from small_models import TOKENS
from superfine.fused_loss import use_fused_loss
from torch import nn

MODELS = {
    "gpt2": small_models.gpt2,
    "llama": small_models.llama,
    "llama, tied": lambda: small_models.llama(tied=True),
}


def labels() -> torch.Tensor:
    found = TOKENS.clone()
    found[0, :3] = -100
    return found


def outcome(model: nn.Module, **kwargs) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=labels(), **kwargs)
    output.loss.backward()
    return [output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "more", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_model_s_own_and_logits_are_not_there(name, more):
    model = MODELS[name]().eval()
    other = copy.deepcopy(model)
    fused = use_fused_loss(model)
    assert model(input_ids=TOKENS, labels=labels()).logits is None
    torch.testing.assert_close(outcome(model, **more), outcome(other, **more))
    fused.remove()
    output = model(input_ids=TOKENS, labels=labels())
    assert output.logits.shape == (*TOKENS.shape, small_models.VOCAB)
    torch.testing.assert_close(outcome(model, **more), outcome(other, **more), rtol=0, atol=0)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", MODELS)
def test_without_labels_there_are_logits(name):
    model = MODELS[name]().eval()
    expected = model(input_ids=TOKENS).logits
    generated = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    use_fused_loss(model)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    again = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(again, generated)


def test_labels_that_are_shifted_already_and_tuples():
    model = small_models.llama().eval()
    shifted = nn.functional.pad(labels(), (0, 1), value=-100)[..., 1:]
    expected = model(input_ids=TOKENS, labels=labels()).loss
    use_fused_loss(model)
    loss = model(input_ids=TOKENS, labels=labels(), shift_labels=shifted).loss
    torch.testing.assert_close(loss, expected)
    as_tuple = model(input_ids=TOKENS, labels=labels(), return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)
    assert as_tuple[1] is None


def test_a_frozen_part_stays_without_gradients():
    model = small_models.llama()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    use_fused_loss(model)
    assert len(outcome(model)) == 2
    assert model.training


def softcapped() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=16, final_logit_softcapping=0.1,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (small_models.mlp, TypeError, "model is 'Sequential'"),
        (small_models.bert, ValueError, "the model's head is 'NoneType'"),
        (small_models.t5, ValueError, "expected a model that changes nothing between head and loss"),
        (softcapped, ValueError, "expected a model that changes nothing between head and loss"),
    ],
)
def test_other_models_are_refused_and_left_as_they_are(make, error, message):
    model = make()
    attributes = set(vars(model))
    with pytest.raises(error, match=f"use_fused_loss: .*{message}"):
        use_fused_loss(model)
    assert set(vars(model)) == attributes


def test_twice_is_refused():
    model = small_models.llama()
    use_fused_loss(model)
    with pytest.raises(ValueError, match="is replaced already"):
        use_fused_loss(model)
