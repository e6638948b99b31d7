"""Selections in models of PEFT's: adapters, blocks and heads within the wrapper, and what of it does not run."""

from __future__ import annotations

import pytest
import torch
from small_models import TOKENS, bert, gpt2, llama, trained
from superfine._prefix import frozen_prefix
from superfine.plan_table import plan_costs
from superfine.select import select
from superfine.selectors import match

peft = pytest.importorskip("peft")

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def lora(**settings):
    return peft.LoraConfig(r=2, **settings)


def classifier():
    return peft.get_peft_model(bert(), lora(task_type="SEQ_CLS", target_modules=["query"]))


def test_adapters_are_what_peft_trains():
    model = classifier()
    before = trained(model)
    assert match(model, "adapters") == before
    plan = select(model, "adapters")
    assert trained(model) == before == set(plan.names)
    assert sum("lora_" in name for name in before) == 8
    assert sum("classifier.modules_to_save.default" in name for name in before) == 2


def test_words_mean_what_they_mean_in_the_wrapped_model():
    model = classifier()
    block = f"{PREFIX}bert.encoder.layer.3."
    assert match(model, "last:1") == {name for name, _ in model.named_parameters() if name.startswith(block)}
    assert match(model, "adapters&last:1") == {name for name in match(model, "last:1") if "lora_" in name}
    assert match(model, "head") == {
        *(f"{PREFIX}classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")),
        *(f"{PREFIX}bert.pooler.dense.{kind}" for kind in ("weight", "bias")),
    }
    assert len(match(model, "norms&last:1")) == 4
    assert not any("original_module" in name for name in match(model, "all"))
    assert match(model, "embeddings") == {PREFIX + name for name in match(bert(), "embeddings")}


def test_adapters_of_the_last_blocks_train_behind_a_frozen_prefix():
    model = classifier()
    plan = select(model, "adapters&last:2", "adapters&head")
    assert frozen_prefix(model, plan.names).blocks == 2
    costs = plan_costs(plan, tokens=32, rows=2).plan
    blocks = [costs.activations[f"{PREFIX}bert.encoder.layer.{number}"] > 0 for number in range(4)]
    assert blocks == [False, False, True, True]
    optimizer = plan.optimizer("adamw", lr=0.1, weight_decay=0.1)
    model.train()
    model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in plan.names}
    with pytest.warns(UserWarning, match="lora_A.* is zero everywhere"):  # lora_B begins with zeros
        optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_adapters_that_are_not_active_are_not_selected():
    model = classifier()
    model.add_adapter("second", lora(task_type="SEQ_CLS", target_modules=["query"]))
    assert all("second" not in name for name in match(model, "all"))
    assert match(model, "adapters:default") == match(model, "adapters")
    with pytest.raises(ValueError, match=r"adapter is 'second'; expected an active one \(default\)"):
        match(model, "adapters:second")
    model.set_adapter("second")
    assert all("second" in name for name in match(model, "adapters"))
    with pytest.raises(ValueError, match="adapter is 'none'"):
        select(model, "adapters:none")


def test_other_kinds_of_adapters():
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(gpt2(), prompts)
    assert match(model, "adapters") == {"prompt_encoder.default.embedding.weight"}
    assert all(name.startswith("base_model.transformer.h.2.") for name in match(model, "last:1"))
    for config in (
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        lora(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1, 2]),
    ):
        model = peft.get_peft_model(llama(), config)
        assert match(model, "adapters") == trained(model)
        assert match(model, "head") == {f"{PREFIX}lm_head.weight"}
