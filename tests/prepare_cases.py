"""What the tests of prepare share: models and inputs, gradients, and stand-ins for parts that are not there."""

from __future__ import annotations

import torch
import transformers
from small_models import TOKENS, VOCAB, bert, distilbert, gpt2, llama, mlp, roberta, t5
from torch import nn


def qwen():
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


MODELS = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2": lambda: gpt2(tie_word_embeddings=False),
    "llama": llama,
    "qwen": qwen,
    "t5": t5,
    "mlp": mlp,
}


def make(name, dtype=torch.float64, dropout=False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).train()
    with torch.no_grad():  # as wide as that, attention is far from even, and every gradient counts
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.5)
    return model if dropout else without_dropout(model)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # of Llama and of T5
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def loss(model: nn.Module) -> torch.Tensor:
    """Of rows with padding; every logit counts."""
    config = getattr(model, "config", None)
    if config is None:
        x = torch.linspace(-1, 1, 8, dtype=next(model.parameters()).dtype).view(2, 4)
        return model(x).square().sum()
    mask = torch.ones_like(TOKENS)
    mask[1, 4:] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    return model(**inputs).logits.square().sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual, expected, relative):
    assert actual.keys() == expected.keys()
    # Biases of keys have gradients that are zero but for rounding: those are held against the largest gradient.
    rounding = max(g.norm() * torch.finfo(g.dtype).eps for g in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        assert error <= relative * gradient.norm() + rounding, f"{name}: {error / gradient.norm():.2g}"


def require_input_gradients(model: nn.Module) -> None:
    """What Hugging Face does for gradient checkpointing: embeddings' outputs require gradients."""
    model.enable_input_require_grads()
