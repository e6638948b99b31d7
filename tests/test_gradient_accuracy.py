"""float32 gradients of prepared models are as near to float64's as those of eager torch: docs/numerics.md."""

from __future__ import annotations

import copy

import pytest
import superfine
import torch
from accuracy_cases import FAMILIES, assert_as_exact, exact_gradients, gradients, make
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # PEFT's
]

#: With biases where the family has them; of every parameter; behind a cut prefix and under a classifier's short-cut.
PLANS = [("norms", "biases"), ("all",), ("last:1",)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_models(family):
    for selectors in PLANS:
        model = make(family)
        biases = any(name.endswith("bias") for name, _ in model.named_parameters())
        plan = superfine.select(model, *selectors[: 1 + biases])
        eager, exact = gradients(model), exact_gradients(model)
        prepared = superfine.prepare(model, plan)
        assert "fuse" in prepared.done
        found = gradients(model)
        assert_as_exact(found, eager, exact)
        superfine.restore(model)
        superfine.prepare(model, plan, recompute=True, checkpointing=True)
        again = gradients(model)
        assert all(torch.equal(again[name], found[name]) for name in plan.names)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_adapters(family, dropout):
    peft = pytest.importorskip("peft")
    settings = {"fan_in_fan_out": True} if family == "gpt2" else {}
    # A scale of 1: that of 4, PEFT's for this rank, makes every rounding count more, eager's as well.
    settings |= {"r": 2, "lora_alpha": 2, "lora_dropout": dropout}
    config = peft.LoraConfig(target_modules="all-linear", **settings)
    model = peft.get_peft_model(make(family), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def with_masks(model):
        torch.manual_seed(1)  # float64 draws the same
        return gradients(model)

    plan = superfine.select(model, "*lora_*")
    eager, exact = with_masks(model), exact_gradients(model, with_masks)
    for recompute in (False, True):
        prepared = superfine.prepare(model, plan, recompute=recompute)
        assert "fuse" in prepared.done
        assert_as_exact(with_masks(model), eager, exact)
        superfine.restore(model)


def test_the_rule_finds_a_gradient_that_is_off_by_three_millionths():
    model = make("llama")
    superfine.select(model, "norms")
    eager, exact = gradients(model), exact_gradients(model)
    assert_as_exact(eager, eager, exact)
    for name in exact:
        found = copy.deepcopy(eager)
        found[name] = found[name] * (1 + 3e-6)
        with pytest.raises(AssertionError):
            assert_as_exact(found, eager, exact)
