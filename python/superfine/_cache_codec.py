"""Hidden states as :class:`superfine.PrefixCache` keeps them: rounded or not, as bytes, a record for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from superfine._cache_store import CODES, INT8, Record

__all__ = ["DTYPES", "decode", "encode"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
_CODE = {name: code for code, (name, _) in CODES.items()}


def encode(states: Tensor, lengths: Sequence[int], dtype: str) -> list[Record]:
    """Records of (rows, tokens, width) states, the first ``lengths`` tokens of each row, stored as ``dtype``.

    Raises ``ValueError`` for states that are no floating-point numbers, or beyond what fp16 holds.
    """
    states = states.detach()
    code = _CODE.get(str(states.dtype).removeprefix("torch."))
    if code is None or code == INT8:
        raise ValueError(f"PrefixCache: hidden states are {states.dtype}; expected a floating-point type")
    if dtype == "int8":
        scales = states.abs().amax(-1, keepdim=True).float() / 127
        codes = (states.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
        # Scales that are not finite make the token NaN again.
        parts = [_bytes(codes.nan_to_num(0).clamp(-127, 127).to(torch.int8)), _bytes(scales)]
        stored = INT8
    else:
        kept = states if dtype == "fp32" else states.to(getattr(torch, DTYPES[dtype]))
        if dtype == "fp16" and bool((kept.isinf() & states.isfinite()).any()):
            raise ValueError("PrefixCache: a hidden state is beyond 65504; expected dtype 'bf16' or 'fp32'")
        parts, stored = [_bytes(kept)], _CODE[str(kept.dtype).removeprefix("torch.")]
    return [
        Record(length, stored, code, np.concatenate([part[row, :length].reshape(-1) for part in parts]))
        for row, length in enumerate(lengths)
    ]


def decode(
    records: Sequence[Record | None], like: Record, tokens: int, width: int, device: torch.device
) -> Tensor:
    """The states of records stored as ``like``, (rows, tokens, width); zero where there is none and after it."""
    rows = len(records)
    name, size = CODES[like.stored]
    states = np.zeros((rows, tokens, width * size), np.uint8)
    scales = np.zeros((rows, tokens, 4), np.uint8) if like.stored == INT8 else None
    for row, record in enumerate(records):
        if record is not None:
            end = record.tokens * width * size
            states[row, : record.tokens] = record.payload[:end].reshape(record.tokens, -1)
            if scales is not None:
                scales[row, : record.tokens] = record.payload[end:].reshape(record.tokens, 4)
    dtype = getattr(torch, CODES[like.dtype][0])
    whole = torch.from_numpy(states).view(getattr(torch, name)).to(device)
    if scales is not None:
        return (whole.float() * torch.from_numpy(scales).view(torch.float32).to(device)).to(dtype)
    return whole.to(dtype)


def _bytes(tensor: Tensor) -> np.ndarray:
    """(rows, tokens, bytes) of a (rows, tokens, width) tensor; numpy has no bfloat16."""
    array: np.ndarray = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return array
