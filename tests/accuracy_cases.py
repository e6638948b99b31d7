"""Models, and a rule, for how exact float32 gradients are: docs/numerics.md, "Gradients of a prepared model".

Models are 32 wide: with the 8 of tests/small_models.py the error of a model as a whole is that of a few roundings,
which now and then are three times the usual.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from prepare_cases import without_dropout
from small_models import TOKENS, VOCAB
from torch import Tensor, nn

#: Of a gradient's norm: what a parameter may lose beside eager torch, and what all together may differ from it.
EXACT = 1e-6

_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_CAUSAL = {
    **_WIDTHS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_CONFIGS = {
    "bert": ("Bert", "ForSequenceClassification", _WIDTHS),
    "roberta": ("Roberta", "ForSequenceClassification", _WIDTHS),
    "distilbert": (
        "DistilBert", "ForSequenceClassification", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "gpt2": (
        "GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "llama": ("Llama", "ForCausalLM", _CAUSAL),
    "qwen2": ("Qwen2", "ForCausalLM", _CAUSAL),
    "qwen3": ("Qwen3", "ForCausalLM", _CAUSAL),
    "phi3": ("Phi3", "ForCausalLM", _CAUSAL),
    "gemma": ("Gemma", "ForCausalLM", {**_CAUSAL, "hidden_activation": "gelu_pytorch_tanh"}),
    "t5": ("T5", "ForConditionalGeneration", _T5),
    "t5 gated": ("T5", "ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip
FAMILIES = list(_CONFIGS)


def make(family: str) -> nn.Module:
    """A float32 model without dropout, its norms and biases not ones and zeros, which hide what is done with them."""
    name, head, settings = _CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **settings)
    model = getattr(transformers, name + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) / 4)
    return without_dropout(model).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    labels = TOKENS
    if "Classification" in type(model).__name__:
        labels = torch.tensor([1, 1])  # different ones of like outputs would cancel, and leave the rounding
    elif model.config.is_encoder_decoder:
        labels = TOKENS.flip(1)
    model(input_ids=TOKENS, labels=labels).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def exact_gradients(
    model: nn.Module, call: Callable[[nn.Module], dict[str, Tensor]] = gradients
) -> dict[str, Tensor]:
    """Those of a copy in float64."""
    return call(copy.deepcopy(model).double())


def assert_as_exact(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """float32 gradients as near to float64's as eager torch's are, and near to those."""
    assert found.keys() == eager.keys() == exact.keys()
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        mine, theirs = ((each[name].double() - gradient).norm() for each in (found, eager))
        # Biases of keys have gradients that are zero but for rounding.
        scale = gradient.norm() + largest / 100
        assert mine <= theirs + EXACT * scale, f"{name}: {mine / scale:.2g}, eager's {theirs / scale:.2g}"
    difference = _together({name: found[name].double() - eager[name].double() for name in exact})
    assert difference <= EXACT * _together(exact), f"{difference / _together(exact):.2g}"


def _together(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())
