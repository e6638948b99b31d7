"""A classifier's last layer computes only the position that the head reads.

BERT-like sequence classifiers read the first position of the last layer: keys and values are needed of all tokens,
queries and everything after them of one. Whether a model is such a one is not looked up but tried, on a few tokens:
what the last layer returns at other positions must not change the logits, and both ways must give the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superfine._swap import Part, add_part, remove_part
from superfine.selectors import layer_stacks

__all__ = ["leave", "shorten"]

# Of logits of a few tokens, relative: sums in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Classifier(Part):
    """The model: an argument that goes the way of all others tells its last layer that one position is enough."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        whole = any(
            kwargs.get(name, getattr(config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        if whole or config._attn_implementation not in ("sdpa", "eager"):
            return super().forward(*args, **kwargs)
        return super().forward(*args, superfine_first_position=True, **kwargs)


class LastLayer(Part):
    """The last layer. Where it is told so, it returns the first position alone."""

    attention: nn.Module

    def forward(self, *args: Any, superfine_first_position: bool = False, **kwargs: Any) -> Any:
        if superfine_first_position and not any(
            value is not None
            for value in (*args[2:], kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values"))
        ):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            if (mask is None or mask.ndim == 4) and not _has_hooks(self.attention):
                return _bert_like(self, hidden_states, mask)
        return super().forward(*args, **kwargs)


def _has_hooks(attention: nn.Module) -> bool:
    """Whether someone listens to the modules that are passed by; transformers' own listeners are idle then."""
    for module in (attention, getattr(attention, "self", attention)):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                return True
    return False


def _bert_like(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    first = hidden[:, :1]
    if hasattr(layer, "ffn"):  # DistilBERT
        attention = layer.attention
        context = _attend(attention, attention.q_lin, attention.k_lin, attention.v_lin, hidden, first, mask)
        attended = layer.sa_layer_norm(attention.out_lin(context) + first)
        return cast(Tensor, layer.output_layer_norm(layer.ffn(attended) + attended))
    attention = layer.attention.self
    context = _attend(attention, attention.query, attention.key, attention.value, hidden, first, mask)
    return cast(Tensor, layer.feed_forward_chunk(layer.attention.output(context, first)))


def _attend(
    attention: Any,
    query: Callable[[Tensor], Tensor],
    key: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    hidden: Tensor,
    first: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attention of the first position to all: (rows, 1, heads * size of a head)."""

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    q, k, v = heads(query(first)), heads(key(hidden)), heads(value(hidden))
    if mask is not None:
        mask = mask[:, :, :1, : k.shape[2]]
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)  # under autocast it is wider
    dropout = attention.dropout.p if attention.training else 0.0
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=attention.scaling
    )
    return context.transpose(1, 2).flatten(2)


def shorten(model: nn.Module) -> tuple[list[nn.Module], str]:
    """Installs the short-cut where it is exact: the modules with a part, and what was done or why nothing was."""
    found = _classifier(model)
    if isinstance(found, str):
        return [], found
    classifier, layer, path = found
    reason = _try(classifier, layer)
    if reason is None:
        return [classifier, layer], f"{path} computes only the first position, which the head reads"
    leave(classifier)
    leave(layer)
    return [], reason


def leave(module: nn.Module) -> None:
    """Takes the short-cut of `module` back."""
    remove_part(module, Classifier)
    remove_part(module, LastLayer)


def _classifier(model: nn.Module) -> tuple[Any, nn.Module, str] | str:
    """The Hugging Face classifier in `model`, its last layer and that one's path; else why there is none."""
    classifiers = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("ForSequenceClassification") and hasattr(module, "get_input_embeddings")
        and type(module).__module__.startswith("transformers.")
    ]  # fmt: skip
    if len(classifiers) != 1:
        return f"nothing is known of what reads the last layer of a {type(model).__name__}"
    stacks = [stack for stack in layer_stacks(model) if not stack.leaves]
    if len(stacks) != 1:
        return "the model has not one stack of layers"
    path = stacks[0].blocks[-1]
    layer: Any = model.get_submodule(path)
    attention = getattr(layer, "attention", None)
    bert = all(hasattr(getattr(attention, "self", None), name) for name in ("query", "key", "value"))
    bert = bert and hasattr(layer, "feed_forward_chunk") and hasattr(attention, "output")
    distilbert = all(hasattr(attention, name) for name in ("q_lin", "k_lin", "v_lin", "out_lin"))
    distilbert = distilbert and hasattr(layer, "ffn") and hasattr(layer, "sa_layer_norm")
    if not (bert or distilbert):
        return (
            f"not for {type(layer).__name__}: only layers as BERT's or DistilBERT's, whose head reads the first "
            "position (of a causal model it reads each row's last token)"
        )
    return classifiers[0], layer, path


@torch.no_grad()
def _try(classifier: Any, layer: nn.Module) -> str | None:
    """Adds both parts and compares; the reason where the model is not served so."""
    from superfine.fused_loss import in_eval_mode

    config = classifier.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation!r}; expected 'sdpa' or 'eager'"
    weight = next(classifier.parameters())
    # Two rows, one of them padded, and no token that is padding.
    tokens = torch.arange(12, device=weight.device).remainder(max(config.vocab_size // 2, 1))
    tokens = (tokens + config.vocab_size // 2).view(2, 6)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}

    def disturbed(slots: slice) -> Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            changed[:, slots] += torch.cos(torch.arange(hidden.shape[-1], device=hidden.device))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = layer.register_forward_hook(hook)
        try:
            logits: Tensor = classifier(**inputs).logits
            return logits
        finally:
            handle.remove()

    try:
        with in_eval_mode(classifier):
            logits = classifier(**inputs).logits
            others, first = disturbed(slice(1, None)), disturbed(slice(0, 1))
            add_part(layer, LastLayer)
            add_part(classifier, Classifier)
            short = classifier(**inputs).logits
    except Exception as error:  # the model is one of another kind: it wants other inputs
        return f"a few tokens could not be tried: {type(error).__name__}: {error}"
    tolerance = _TOLERANCE.get(logits.dtype, 5e-2)
    if not torch.equal(others, logits) or torch.equal(first, logits):
        return "the head does not read the first position alone"
    if not torch.allclose(short, logits, rtol=tolerance, atol=tolerance):
        return "the last layer is not as BERT's: the logits of a few tokens differ"
    return None
