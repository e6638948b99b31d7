"""A classifier's last layer computes only the position that the head reads.

Sequence classifiers read the first position of the last layer (BERT), or each row's last token (causal models): keys
and values are needed of all tokens, queries and everything after them of one. Whether a model is such a one is not
believed but tried, on a few tokens: what the last layer returns at other positions must not change the logits, and
both ways must give the same ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from superfine._shortcut_layers import attention_modules, one_position, reads_last
from superfine._swap import Part, add_part, has_part, remove_part
from superfine.selectors import layer_stacks

__all__ = ["LastLayer", "leave", "position_read", "shorten"]

# Of logits of a few tokens, relative: sums in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Classifier(Part):
    """An argument that goes the way of all others tells the last layer which position is enough."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _wants_all(self.config, kwargs):
            return super().forward(*args, **kwargs)
        return super().forward(*args, superfine_position=0, **kwargs)


class CausalClassifier(Part):
    """The same, of a model whose head reads the last token of each row that is not padding."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or _wants_all(self.config, kwargs):
            return super().forward(*args, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        if first is None and embeds is None:
            return super().forward(*args, **kwargs)
        kwargs["superfine_position"] = _last_tokens(self.config, first, embeds)
        if kwargs.get("use_cache") is None:  # a cache that nobody asked for would need all positions
            kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)


def _last_tokens(config: Any, ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
    """The position of each row's last token that is not padding; with embeddings alone of its last."""
    padding = config.get_text_config().pad_token_id
    if ids is not None and padding is not None:
        positions = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
        return (positions * (ids != padding)).argmax(-1)
    first: Any = embeds if ids is None else ids
    return torch.full((first.shape[0],), first.shape[1] - 1, device=first.device)


def position_read(model: nn.Module, layer: nn.Module, arguments: dict[str, Any]) -> int | Tensor | None:
    """Which position of each row `layer` is told to compute in a forward of `model` with these arguments, or None."""
    if has_part(layer, LastLayer):
        for module in model.modules():
            causal = has_part(module, CausalClassifier)
            if (causal or has_part(module, Classifier)) and not _wants_all(module.config, arguments):
                return _last_tokens(module.config, arguments["input_ids"]) if causal else 0
    return None


def _wants_all(config: Any, kwargs: dict[str, Any]) -> bool:
    return config._attn_implementation not in ("sdpa", "eager") or any(
        kwargs.get(name, getattr(config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    )


class LastLayer(Part):
    """The last layer. Where it is told so it computes one position: it returns that alone, or zeros at all others."""

    _superfine_arguments: tuple[str, ...]  # names of what it is given by position

    def forward(self, *args: Any, superfine_position: Any = None, **kwargs: Any) -> Any:
        if superfine_position is None:
            return super().forward(*args, **kwargs)
        named = zip(self._superfine_arguments, args)  # noqa: B905 (torch 2.9 compiles strict=False as if it were True)
        given = {**dict(named), **kwargs}
        hidden, mask = given["hidden_states"], given.get("attention_mask")
        known = given.get("past_key_values") is None and given.get("encoder_hidden_states") is None
        compute = one_position(self)
        if compute is None or not known or (mask is not None and mask.ndim != 4) or _has_hooks(self):
            return super().forward(*args, **kwargs)
        if not isinstance(superfine_position, Tensor):
            return compute(self, hidden, mask, None, given)
        index = superfine_position.to(hidden.device)
        one = compute(self, hidden, mask, index, given)
        return torch.zeros_like(hidden, dtype=one.dtype).scatter(1, index[:, None, None].expand_as(one), one)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether someone listens to modules that are passed by; transformers' own listeners are idle here."""
    for module in attention_modules(layer):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                return True
    return False


def shorten(model: nn.Module) -> tuple[bool, str]:
    """Installs the short-cut where it is exact: whether it did, and what was done or why nothing was."""
    found = _classifier(model)
    if isinstance(found, str):
        return False, found
    classifier, layer, path = found
    reason = _try(classifier, layer)
    if reason is None:
        position = "each row's last token" if reads_last(layer) else "the first position"
        return True, f"{path} computes only {position}, which the head reads"
    leave(classifier)
    leave(layer)
    return False, reason


def leave(module: nn.Module) -> None:
    """Takes the short-cut of `module` back."""
    for part in (Classifier, CausalClassifier, LastLayer):
        remove_part(module, part)
    vars(module).pop("_superfine_arguments", None)


def _classifier(model: nn.Module) -> tuple[Any, nn.Module, str] | str:
    """The Hugging Face classifier in `model`, its last layer and that one's path; else why there is none."""
    classifiers = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("ForSequenceClassification")
        and type(module).__module__.startswith("transformers.")
    ]
    if len(classifiers) != 1:
        return f"nothing is known of what reads the last layer of a {type(model).__name__}"
    stacks = [stack for stack in layer_stacks(model) if not stack.leaves]
    if len(stacks) != 1:
        return "the model has not one stack of layers"
    path = stacks[0].blocks[-1]
    layer = model.get_submodule(path)
    if one_position(layer) is None or "hidden_states" not in inspect.signature(layer.forward).parameters:
        return (
            f"not for {type(layer).__name__}: only for layers as those of BERT, DistilBERT, GPT-2 and Llama"
        )
    return classifiers[0], layer, path


@torch.no_grad()
def _try(classifier: Any, layer: nn.Module) -> str | None:
    """Adds both parts and compares; the reason where the model is not served so."""
    from superfine.fused_loss import in_eval_mode

    config, last = classifier.config, reads_last(layer)
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation!r}; expected 'sdpa' or 'eager'"
    text = config.get_text_config()
    weight, padding = next(classifier.parameters()), getattr(text, "pad_token_id", None)
    # Rows of different lengths, without tokens that mean padding elsewhere; one row where there is no padding.
    words = [token for token in range(text.vocab_size) if token != padding][-10:] * 10
    tokens = torch.tensor(words[:10], device=weight.device).view(2, 5)
    mask = torch.ones_like(tokens)
    if padding is None and last:
        tokens, mask = tokens[:1], mask[:1]
    else:
        mask[1, 3:] = 0
        if padding is not None:
            tokens[1, 3:] = padding
    inputs = {"input_ids": tokens, "attention_mask": mask}
    read = mask.sum(1) - 1 if last else torch.zeros_like(mask[:, 0])
    at_read = torch.arange(5, device=weight.device) == read[:, None]

    def disturbed(positions: Tensor) -> Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            noise = torch.cos(torch.arange(output.shape[-1], device=output.device)).to(output.dtype)
            return torch.where(positions[..., None], output + noise, output)

        handle = layer.register_forward_hook(hook)
        try:
            logits: Tensor = classifier(**inputs).logits
            return logits
        finally:
            handle.remove()

    try:
        with in_eval_mode(classifier):
            logits = classifier(**inputs).logits
            others, there = disturbed(~at_read), disturbed(at_read)
            vars(layer)["_superfine_arguments"] = tuple(inspect.signature(layer.forward).parameters)
            add_part(layer, LastLayer)
            add_part(classifier, CausalClassifier if last else Classifier)
            short = classifier(**inputs).logits
    except Exception as error:  # the model is one of another kind: it wants other inputs
        return f"a few tokens could not be tried: {type(error).__name__}: {error}"
    if not torch.equal(others, logits) or torch.equal(there, logits):
        return f"the head does not read {'the last token' if last else 'the first position'} alone"
    tolerance = _TOLERANCE.get(logits.dtype, 5e-2)
    if not torch.allclose(short, logits, rtol=tolerance, atol=tolerance):
        return "the last layer computes something else: the logits of a few tokens differ"
    return None
