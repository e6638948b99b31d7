"""Parts that meet in one prepared model: fused losses, slices, adapters, recomputation, checkpoints, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import superfine
import torch
import transformers
from prepare_cases import assert_same_gradients, gradients, make
from small_models import TOKENS, gpt2, llama
from superfine import _recompute
from superfine.fused_loss import use_fused_loss
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's


def step(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused_first", [True, False])
def test_use_fused_loss_and_prepare_in_any_order(fused_first):
    model = make("llama")
    plan = superfine.select(model, "last:1", rows={"lm_head": [1, 3]})
    fused = use_fused_loss(model) if fused_first else None
    prepared = superfine.prepare(model, plan, checkpointing=True, recompute=True)
    fused = fused or use_fused_loss(model)
    expected = step(model)
    assert "lm_head.weight_rows" in expected
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_gradients(step(same), expected, 1e-12)
        superfine.restore(same)
        assert same(TOKENS, labels=TOKENS).logits is None
    if fused_first:  # what was done first is taken back first
        fused.remove()
        model.train()
        assert_same_gradients(step(model), expected, 1e-6)  # transformers' own loss is of float32 logits
        plan.model.lm_head.weight_rows.requires_grad_(False)
        with pytest.raises(ValueError, match=r"'lm_head.weight_rows' is planned, and is frozen"):
            model(TOKENS)
        superfine.restore(model)
    else:
        superfine.restore(model)
        prepared = superfine.prepare(model, superfine.select(model, "last:1"))
        prepared.update(superfine.select(model, "last:2"))
        assert model(TOKENS, labels=TOKENS).logits is None
        superfine.restore(model)
        fused.remove()
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.lm_head) is nn.Linear


def test_rows_below_an_adapter_train_also_in_a_conv1d():
    peft = pytest.importorskip("peft")
    model = gpt2(tie_word_embeddings=False).train()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, config)
    plan = superfine.select(model, "*lora_*", rows={"*.c_attn.base_layer": [1, 2]})
    superfine.prepare(model, plan)
    assert step(model).keys() == {name for name, _ in plan.named_parameters()}


def test_adapters_may_be_disabled_in_a_forward_without_gradients():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama().train(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    superfine.prepare(model, superfine.select(model, "*lora_*"))
    with model.disable_adapter():
        with torch.no_grad():  # of a reference, as in preference optimisation
            model(TOKENS)
        with pytest.raises(ValueError, match=r"is planned, and is frozen"):
            model(TOKENS)
    step(model)


def test_a_checkpointed_block_keeps_nothing_that_its_input_follows_from():
    model = make("bert")
    plan = superfine.select(model, "norms")
    expected = gradients(model)
    superfine.prepare(model, plan, checkpointing=True, recompute=True, shortcut=False)
    before = len(_recompute._origins)
    output = model(TOKENS).logits
    assert len(_recompute._origins) == before
    del output
    assert_same_gradients(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norms_of_any_pair_of_dtypes(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for input_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        norm, x = LlamaRMSNorm(8).to(dtype), torch.linspace(-2, 3, 16).view(2, 8).to(input_dtype)
        expected = norm(x)
        superfine.fused_modules.install(nn.Sequential(norm))
        torch.testing.assert_close(norm(x), expected)


class GatedMLP(nn.Module):
    def __init__(self, approximate):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.GELU(approximate=approximate)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_mlps_that_differ_in_a_setting_of_their_activation_alone():
    model, x = nn.Sequential(GatedMLP("none"), GatedMLP("tanh")).double(), torch.randn(5, 4).double() * 9
    expected = model(x)
    assert {"0", "1"} <= superfine.fused_modules.install(model).changed.keys()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_slices_are_installed_all_or_none():
    model = llama()
    plan = superfine.select(model, rows={"layers.0.*.q_proj": [1]}, cols={"layers.1.*.q_proj": [1]})
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    names = set(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"layers.1.*forward was replaced on the module itself"):
        superfine.prepare(model, plan)
    assert set(dict(model.named_parameters())) == names


def test_a_share_of_the_rows_of_a_float64_weight():
    assert len(superfine.select(llama().double(), rows={"lm_head": 0.25}).slices[0]) == 8
