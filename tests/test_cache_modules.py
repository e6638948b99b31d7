"""superfine.PrefixCache: modules of the prefix that change, and adapters in it."""

from __future__ import annotations

import pytest
import small_models
import superfine
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
IDS = torch.arange(5, 17).view(2, 6)


def adapted(alpha=4):
    """Frozen LoRA in all blocks, of which that of the last one trains."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_models.llama(), config).requires_grad_(False).eval()
    last = max(
        name.split("layers.")[1].split(".")[0] for name, _ in model.named_parameters() if "layers." in name
    )
    return model, superfine.select(model, f"*layers.{last}*lora_*")


def first_adapter(model):
    return next(module for module in model.modules() if hasattr(module, "_disable_adapters"))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_the_scale_of_an_adapter_is_part_of_the_key(tmp_path):
    for alpha in (4, 64):  # the same weights in one directory
        model, plan = adapted(alpha)
        expected = logits(model)
        with superfine.PrefixCache(model, plan, tmp_path) as cache:
            for _ in range(2):
                torch.testing.assert_close(logits(model), expected)
            assert (cache.hits, cache.misses) == (2, 2)
    with cache:
        first_adapter(model).scaling["default"] *= 3
        actual = logits(model)
    torch.testing.assert_close(actual, logits(model))


def test_adapters_and_modules_that_come_later_are_noticed():
    model, plan = adapted()
    cache = superfine.PrefixCache(model, plan)
    with cache:
        logits(model)
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="has changed since"):
            logits(model)
        model.delete_adapter("two")
        model.requires_grad_(False)
        logits(model)
        assert cache.hits == 2
        adapter = first_adapter(model)
        with (
            adapter.register_forward_pre_hook(lambda module, args: None),
            pytest.raises(ValueError, match="adapter_n"),
        ):
            logits(model)
        adapter.base_layer = nn.Linear(*adapter.base_layer.weight.shape[::-1], bias=False).requires_grad_(
            False
        )
        with pytest.raises(ValueError, match=r"q_proj' has changed since"):
            logits(model)


def test_settings_that_change_are_noticed_when_it_is_attached():
    model = small_models.llama().eval()
    cache = superfine.PrefixCache(model, superfine.select(model, "last:1"))
    norm = model.model.layers[0].input_layernorm
    norm.variance_epsilon *= 100
    with pytest.raises(ValueError, match="a frozen tensor or setting has changed"):
        cache.attach()
    norm.variance_epsilon /= 100
    superfine.prepare(model, cache_plan := superfine.select(model, "last:1"), checkpointing=True)
    with cache:  # preparing is no change
        logits(model)
    assert cache_plan.num_trainable
