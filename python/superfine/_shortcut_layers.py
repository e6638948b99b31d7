"""Layers of transformers that compute one position of each row: keys and values of all tokens, the rest of one.

Every function takes a layer, hidden states (rows, tokens, size), the mask that the model made (rows or 1, heads or 1,
tokens, tokens; booleans or what is added to the scores) or None, the position in each row (rows) or None for the
first, and the layer's arguments by name. It returns (rows, 1, size).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["attention_modules", "one_position", "reads_last"]

OnePosition = Callable[[Any, Tensor, "Tensor | None", "Tensor | None", dict[str, Any]], Tensor]


def one_position(layer: nn.Module) -> OnePosition | None:
    """The function for layers of this kind, by what they are made of; None for unknown ones."""
    parts = set(layer._modules)
    attention: Any = layer._modules.get("attention")
    own = getattr(attention, "self", None)
    if _has(own, "query", "key", "value") and {"attention", "intermediate", "output"} <= parts:
        return _bert if _has(attention, "output") and hasattr(layer, "feed_forward_chunk") else None
    if parts == {"attention", "sa_layer_norm", "ffn", "output_layer_norm"}:
        return _distilbert if _has(attention, "q_lin", "k_lin", "v_lin", "out_lin") else None
    if parts == {"ln_1", "attn", "ln_2", "mlp"}:
        return _gpt2 if _has(layer._modules["attn"], "c_attn", "c_proj") else None
    if parts == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return _llama if _has(layer._modules["self_attn"], "q_proj", "k_proj", "v_proj", "o_proj") else None
    return None


def reads_last(layer: nn.Module) -> bool:
    """Whether classifiers of such layers read the last token of each row: those of causal models."""
    return one_position(layer) in (_gpt2, _llama)


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that are passed by, whose hooks would hear nothing."""
    found: list[nn.Module] = []
    for name in ("attention", "attn", "self_attn"):
        module = layer._modules.get(name)
        if module is not None:
            found.append(module)
            inner = module._modules.get("self")
            if inner is not None:
                found.append(inner)
    return found


def _has(module: Any, *names: str) -> bool:
    return module is not None and all(hasattr(module, name) for name in names)


def _bert(
    layer: Any, hidden: Tensor, mask: Tensor | None, index: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    attention, one = layer.attention.self, _at(hidden, index)
    q, k, v = attention.query(one), attention.key(hidden), attention.value(hidden)
    context = _attend(attention, attention.attention_head_size, q, k, v, mask, index, attention.dropout.p)
    return cast(Tensor, layer.feed_forward_chunk(layer.attention.output(context, one)))


def _distilbert(
    layer: Any, hidden: Tensor, mask: Tensor | None, index: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    attention, one = layer.attention, _at(hidden, index)
    q, k, v = attention.q_lin(one), attention.k_lin(hidden), attention.v_lin(hidden)
    context = _attend(attention, attention.attention_head_size, q, k, v, mask, index, attention.dropout.p)
    attended = layer.sa_layer_norm(attention.out_lin(context) + one)
    return cast(Tensor, layer.output_layer_norm(layer.ffn(attended) + attended))


def _gpt2(
    layer: Any, hidden: Tensor, mask: Tensor | None, index: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    attention, one = layer.attn, _at(hidden, index)
    # One product makes queries, keys and values: those of all tokens, as there may be adapters around it.
    q, k, v = attention.c_attn(layer.ln_1(hidden)).split(attention.split_size, dim=2)
    dropout = attention.attn_dropout.p
    context = _attend(attention, attention.head_dim, _at(q, index), k, v, mask, index, dropout)
    attended = attention.resid_dropout(attention.c_proj(context)) + one
    return cast(Tensor, attended + layer.mlp(layer.ln_2(attended)))


def _llama(
    layer: Any, hidden: Tensor, mask: Tensor | None, index: Tensor | None, arguments: dict[str, Any]
) -> Tensor:
    attention, one = layer.self_attn, _at(hidden, index)
    normed = layer.input_layernorm(hidden)
    q, k, v = attention.q_proj(_at(normed, index)), attention.k_proj(normed), attention.v_proj(normed)
    rotate = sys.modules[type(attention).__module__].__dict__["apply_rotary_pos_emb"]
    cos, sin = arguments["position_embeddings"]
    rows = hidden.shape[0]
    q, k = _heads(q, attention.head_dim), _heads(k, attention.head_dim)
    if hasattr(attention, "q_norm"):  # Qwen3: of each head
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    there = _at(cos.expand(rows, -1, -1), index), _at(sin.expand(rows, -1, -1), index)
    q, k = rotate(q, q, *there)[0], rotate(k, k, cos, sin)[1]
    q, k = q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2)
    context = _attend(attention, attention.head_dim, q, k, v, mask, index, attention.attention_dropout)
    attended = one + attention.o_proj(context)
    return cast(Tensor, attended + layer.mlp(layer.post_attention_layernorm(attended)))


def _at(values: Tensor, index: Tensor | None) -> Tensor:
    """Of (rows, tokens, ...) one token of each row: (rows, 1, ...)."""
    if index is None:
        return values[:, :1]
    return values[torch.arange(values.shape[0], device=values.device), index].unsqueeze(1)


def _heads(values: Tensor, size: int) -> Tensor:
    return values.unflatten(-1, (-1, size))


def _attend(
    attention: Any,
    size: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention of one position to all: (rows, 1, heads * size of a head)."""
    q, k = _heads(query, size).transpose(1, 2), _heads(key, size).transpose(1, 2)
    v = _heads(value, size).transpose(1, 2)
    rows, tokens = k.shape[0], k.shape[2]
    if mask is not None:
        mask = mask[..., :tokens].expand(rows, -1, -1, -1)
        if mask.shape[2] > 1:  # else one for all positions
            mask = _at(mask.transpose(1, 2), index).transpose(1, 2)
        # Eager attention adds whatever it is given, also a caller's own booleans. Under autocast floats are wider.
        if mask.dtype != torch.bool or attention.config._attn_implementation == "eager":
            mask = mask.to(q.dtype)
    elif index is not None:  # the model is causal and nothing is padded
        mask = (torch.arange(tokens, device=q.device) <= index[:, None])[:, None, None]
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout if attention.training else 0.0, scale=attention.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return context.transpose(1, 2).flatten(2)
