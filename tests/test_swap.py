import copy
import inspect
import pickle

import pytest
import torch
from small_models import TOKENS, bert
from superfine._prefix import frozen_prefix
from superfine._swap import Part, add_part, has_part, remove_part
from torch import nn


class Doubled(Part):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class PlusOne(Part):
    def forward(self, *args, **kwargs):
        return 1 + super().forward(*args, **kwargs)


def test_parts_stack_and_come_off_in_any_order():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = module(x)
    add_part(module, Doubled)
    add_part(module, PlusOne)
    assert torch.equal(module(x), 1 + 2 * plain)
    assert type(module).__name__ == "Linear"
    assert isinstance(module, nn.Linear)
    remove_part(module, Doubled)
    assert torch.equal(module(x), 1 + plain)
    assert has_part(module, PlusOne)
    assert not has_part(module, Doubled)
    remove_part(module, PlusOne)
    assert type(module) is nn.Linear


def test_the_signature_stays():
    module = bert()
    before = inspect.signature(module.forward)
    add_part(module, Doubled)
    assert inspect.signature(module.forward) == before


def test_checkpointing_of_transformers_still_finds_a_layer():
    model = bert(layers=1)
    layer = model.bert.encoder.layer[0]
    calls = []

    class Counted(Part):
        def forward(self, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return super().forward(*args, **kwargs)

    add_part(layer, Counted)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()(TOKENS).logits.sum().backward()
    assert len(calls) == 2  # forward, and once more in backward


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_parts_and_parameters_of_its_own(again):
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    add_part(module, Doubled)
    made = again(module)
    assert torch.equal(made(x), module(x))
    with torch.no_grad():
        module.weight.zero_()
    assert not torch.equal(made(x), module(x))
    remove_part(made, Doubled)
    assert type(made) is nn.Linear


def test_a_part_twice_and_a_replaced_forward_are_refused():
    module = nn.Linear(3, 2)
    add_part(module, Doubled)
    with pytest.raises(ValueError, match="has Doubled already"):
        add_part(module, Doubled)
    other = nn.Linear(3, 2)
    other.forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward was replaced"):
        add_part(other, Doubled)


def test_the_frozen_prefix_ends_before_what_trains():
    model = bert("BertForMaskedLM")
    names = {name for name, _ in model.named_parameters()}
    for trained, blocks in (
        ([name for name in names if ".layer.2." in name], 2),
        ([name for name in names if ".layer.0." in name], 0),
        (["cls.predictions.transform.dense.weight"], 4),
        (["bert.embeddings.position_embeddings.weight"], 0),
        (["cls.predictions.decoder.weight"], 0),  # tied to the word embeddings
        ([], 4),
    ):
        assert frozen_prefix(model, trained).blocks == blocks, trained
    assert model(TOKENS).logits.shape[:2] == TOKENS.shape
