"""What a model is called with, read for :class:`superfine.PrefixCache`: which samples a batch holds, the key of each,
and why a call cannot be served from a cache."""

from __future__ import annotations

import hashlib
import inspect
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Samples", "fill_arguments", "flat_arguments", "generates", "read_samples"]

#: Arguments that say which hidden states are wanted, those of one row each.
PER_SAMPLE = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
#: Arguments that the frozen blocks do not see.
_IGNORED = ("use_cache", "return_dict", "labels", "num_items_in_batch", "cache_position")
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")


@dataclass(frozen=True)
class Samples:
    """A batch of ``shape`` (rows, tokens): how many tokens of each row are its sample, and the sample's key.

    ``position``: the one token whose states are wanted, of all rows or of each (rows,); None for all tokens.
    """

    shape: tuple[int, int]
    lengths: list[int]
    keys: list[bytes]
    position: int | Tensor | None = None

    def kept(self, row: int) -> int:
        """How many tokens of a row are kept."""
        return self.lengths[row] if self.position is None else min(1, self.lengths[row])


def flat_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name; those that are None are left out."""
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return {name: value for name, value in arguments.items() if value is not None}


def fill_arguments(signature: inspect.Signature, batch: Any, device: torch.device) -> dict[str, Any]:
    """The arguments of a batch of a data loader (a mapping, or a tuple that begins with one) that the model reads."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"PrefixCache.fill: a batch is {type(batch).__name__}; expected a mapping of the model's arguments, or a"
            " tuple that begins with one"
        )
    found = {name: batch[name] for name in signature.parameters if batch.get(name) is not None}
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in found.items()
        if name not in _IGNORED
    }


def generates(arguments: Mapping[str, Any]) -> bool:
    """Whether a call wants or brings keys and values of earlier tokens: that is generation, which runs uncached."""
    wants = arguments.get("use_cache", False) and not torch.is_grad_enabled()
    return "past_key_values" in arguments or wants


def read_samples(
    arguments: Mapping[str, Any], config: Any, base: Any, position: int | Tensor | None = None
) -> Samples:
    """The samples of a call. ``base``: a blake2b object that has read what all keys of the call share.

    A sample is a row up to the last token that the mask leaves, padding on its left included: that moves positions,
    and is what a language model predicts the first token from. Its key is over its token ids, over token types and
    positions where they are given, and over its mask unless that leaves all of it. No mask is a mask of ones. Where
    the states of one token are wanted, its ``position``, the key is over that, too; a row that wants padding's, which
    is no part of the sample, makes the batch one of all tokens.

    Raises ``ValueError`` where the states of a sample would depend on more than that.
    """
    _check(arguments, config)
    ids = _integers(arguments, "input_ids")
    if ids.ndim != 2:
        raise _refusal(f"input_ids has the shape {ids.shape}", "(batch, tokens)")
    rows, tokens = ids.shape
    columns = [ids]
    for name in ("token_type_ids", "position_ids"):
        if name in arguments:
            values = _integers(arguments, name)
            if (
                values.ndim > 2
                or values.shape[-1:] != (tokens,)
                or values.shape[:-1] not in ((), (1,), (rows,))
            ):
                raise _refusal(f"{name} has the shape {values.shape}", f"({rows}, {tokens}) as input_ids")
            columns.append(np.broadcast_to(values, ids.shape))
    explicit = "position_ids" in arguments
    valid = _valid(arguments, ids.shape)
    if explicit:
        _check_increasing(columns[-1], valid)
    packed = columns[0] if len(columns) == 1 else np.stack(columns, axis=2)
    packed = np.ascontiguousarray(packed)
    layout = ("token_type_ids" in arguments) * 2 + explicit
    if valid is None:
        lengths, whole = [tokens] * rows, [True] * rows
    else:
        stop = np.where(valid.any(1), tokens - valid[:, ::-1].argmax(1), 0)
        lengths, whole = stop.tolist(), (valid.sum(1) == stop).tolist()
    wanted = position.tolist() if isinstance(position, Tensor) else [position or 0] * rows
    if any(at >= length > 0 for at, length in zip(wanted, lengths, strict=True)):
        position = None
    keys = []
    for row, length in enumerate(lengths):
        digest = base.copy()
        digest.update(struct.pack("<qB?", length, layout, whole[row]))
        digest.update(packed[row, :length])
        if not whole[row] and valid is not None:
            digest.update(valid[row, :length].tobytes())
        if position is not None:
            digest.update(struct.pack("<4sq", b"only", wanted[row]))
        keys.append(digest.digest())
    return Samples((rows, tokens), lengths, keys, position)


def shared_key(parts: tuple[Any, ...]) -> Any:
    """The blake2b object for :func:`read_samples`: 128 bits, where a collision of 10^9 samples has odds of 10^-21."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16)


def _check(arguments: Mapping[str, Any], config: Any) -> None:
    for name in _OUTPUTS:
        if arguments.get(name) or getattr(config, name, False):
            raise _refusal(f"{name} is set", "not, because the frozen blocks do not run")
    for name, value in arguments.items():
        if name in PER_SAMPLE or name in _IGNORED or name in _OUTPUTS:
            continue
        if name in _PACKED:
            raise _refusal(f"{name} is given", "one document a row, not several packed into it")
        if name == "inputs_embeds":
            raise _refusal("inputs_embeds is given", "input_ids, which tell samples apart")
        if isinstance(value, (bool, int, float, str)) and not value:
            continue  # switched off
        raise _refusal(
            f"{name} is given", f"none beside {', '.join(PER_SAMPLE)}, by which samples are told apart"
        )
    if "input_ids" not in arguments:
        raise _refusal("input_ids is missing", "token ids, which tell samples apart")


def _integers(arguments: Mapping[str, Any], name: str) -> np.ndarray:
    value = arguments[name]
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise _refusal(f"{name} is {kind}", "a tensor of integers")
    return value.detach().to("cpu", torch.int64).numpy()


def _valid(arguments: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """Which tokens the mask leaves, (batch, tokens); None where all."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        what = (
            f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is {type(mask).__name__}"
        )
        raise _refusal(
            f"attention_mask {what}", f"{shape}: masks between pairs of tokens may hold several documents"
        )
    values = mask.detach().cpu()
    valid: np.ndarray = (values != 0).numpy()
    if values.is_floating_point() and not bool(((values == 0) | (values == 1)).all()):
        raise _refusal("attention_mask holds other values than 0 and 1", "1 for tokens that count, else 0")
    return None if valid.all() else valid


def _check_increasing(positions: np.ndarray, valid: np.ndarray | None) -> None:
    rows = (
        [positions]
        if valid is None
        else [row[mask][None] for row, mask in zip(positions, valid, strict=True)]
    )
    if any((np.diff(row, axis=1) <= 0).any() for row in rows):
        raise _refusal(
            "position_ids start anew within a row", "one document a row, not several packed into it"
        )


def _refusal(problem: str, expected: str) -> ValueError:
    return ValueError(f"PrefixCache: {problem}; expected {expected} (or detach the cache for this call)")


def dropouts(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules that compute something else in train mode: dropout, in modules or as a rate, and batch statistics."""
    found = []
    for name, module in modules.items():
        rates = [getattr(module, "p", 0.0)] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        rates += [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
        if any(rate > 0 for rate in rates) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append((name, module))
    return found


def settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Numbers, texts and flags that a module computes with in eval mode: eps, scales, sizes."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return []
    return sorted(
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and not key.startswith("_")
        and key not in ("training", "gradient_checkpointing")
        and "drop" not in key
    )
