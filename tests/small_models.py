"""Small models of the supported families, for the tests of selection and of the first step."""

from __future__ import annotations

import torch
import transformers
from torch import nn

# Widths of 8 and 2 to 4 layers: the smallest with several heads and a first, an inner and a last layer.
VOCAB = 32
WIDTHS = {"vocab_size": VOCAB, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def bert(cls="BertForSequenceClassification", layers=4, labels=3):
    config = transformers.BertConfig(
        **WIDTHS, num_hidden_layers=layers, max_position_embeddings=16, num_labels=labels
    )
    return getattr(transformers, cls)(config)


def roberta():
    config = transformers.RobertaConfig(**WIDTHS, num_hidden_layers=3, max_position_embeddings=20)
    return transformers.RobertaForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=8, n_layers=3, n_heads=2, hidden_dim=16, max_position_embeddings=16
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(cls="GPT2LMHeadModel", **settings):
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=8,
        n_layer=3,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    return getattr(transformers, cls)(config)


def llama(tied=False):
    config = transformers.LlamaConfig(
        **WIDTHS,
        num_hidden_layers=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def causal(family, **settings):
    """A causal model of a family that is made like Llama, such as "Qwen3"."""
    config = getattr(transformers, f"{family}Config")(
        **WIDTHS,
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def qwen():
    return causal("Qwen3")


def mistral():
    return causal("Mistral")


def gemma():
    return causal("Gemma")


def t5(**settings):
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
        num_decoder_layers=2,
        **settings,
    )
    return transformers.T5ForConditionalGeneration(config)


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def starting(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def step(model, plan, optimizer, inputs=None):
    """One backward and step of a small model on a fixed input."""
    model(torch.linspace(-1, 1, 8).view(2, 4) if inputs is None else inputs).square().sum().backward()
    optimizer.step()


def checkpoint_activations(model, on=True):
    """By transformers, which calls it so since 5.23."""
    verb = "enable" if on else "disable"
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    getattr(model, new if hasattr(model, new) else old)()


TOKENS = torch.arange(2, 14).view(2, 6)


def logits(model):
    with torch.no_grad():
        inputs = {"input_ids": TOKENS}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = TOKENS
        return model.eval()(**inputs).logits


def perturb(plan):
    """Stand in for training: move every planned parameter."""
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(torch.randn_like(parameter))
