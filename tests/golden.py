"""Digests of what the optimizers' kernels compute: the same on every instruction set, GPU, backend and machine.

`python tests/golden.py` computes them on the CPU and writes golden.json; a change of it is a change of numerics, to
be explained in docs/numerics.md and CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from kernel_cases import ADAMW_DTYPES
from moment_options import OPTIONS
from torch import Tensor

import superfine_kernels
from superfine_kernels._storage import scales_shape

FILE = Path(__file__).parent / "golden.json"
STEPS = 3
# One element, the ends of blocks of 256 and 2048, of chunks of 4096 and 8192, and several of them.
SIZES = (1, 255, 2049, 4096, 8193, 20_011)

_CASES: list[tuple[str, torch.dtype, torch.dtype, tuple[str, ...]]] = [
    (op, param, state, names)
    for op in ("adamw", "adam", "lamb")
    for param, state, names in [*((*dtypes, ()) for dtypes in ADAMW_DTYPES), *OPTIONS]
]
_CASES += [("adamw", *dtypes, ("amsgrad",)) for dtypes in ADAMW_DTYPES]

#: By name: the op, the dtypes of parameters and moments, and options.
CASES = {
    " ".join([op, *(str(dtype).removeprefix("torch.") for dtype in dtypes), *names]): (op, *dtypes, names)
    for op, *dtypes, names in _CASES
}


def _bits(numel: int, salt: int) -> Tensor:
    """Numbers in [0, 2^32), by integer arithmetic alone: no version of torch draws others."""
    x = torch.arange(1, numel + 1) * 2_654_435_761 + salt * 97_531
    x = (x ^ (x >> 15)) * 40_503 & 0xFFFF_FFFF
    return (x ^ (x >> 13)) & 0xFFFF_FFFF


def _numbers(numel: int, salt: int, dtype: torch.dtype) -> Tensor:
    """In [-1, 1); codes where `dtype` is uint8."""
    if dtype == torch.uint8:
        return (_bits(numel, salt) & 255).to(dtype)
    return (_bits(numel, salt).double() * 2.0**-31 - 1).to(dtype)


def _squares(numel: int, salt: int, dtype: torch.dtype) -> Tensor:
    x = _numbers(numel, salt, dtype)
    return x if dtype == torch.uint8 else x.square()


def _options(param: torch.dtype, state: torch.dtype, names: tuple[str, ...]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "zero_grads": "zero_grads" in names,
        "stochastic_rounding": "stochastic_rounding" in names,
        "seed": 7,
    }
    if "anchors" in names:
        made["anchors"] = [_numbers(n, 6, param) for n in SIZES]
    if "remainders" in names:
        made["remainders"] = [(_bits(n, 7) - 2**31 >> 16).to(torch.int16) for n in SIZES]
    if "kahan" in names:
        made["remainders"] = [(_numbers(n, 8, torch.float64) * 2.0**-9).to(param) for n in SIZES]
    if state == torch.uint8:
        made["scales"] = [
            (_bits(2 * scales_shape(n)[1], 9).float() * 2.0**-32).view(scales_shape(n)) for n in SIZES
        ]
    return made


def digest(name: str, device: str, backend: str) -> str:
    """Of parameters, gradients, moments, hidden bits and scales after a few steps."""
    op, param, state, names = CASES[name]
    lists = [
        [_numbers(n, 1, param) for n in SIZES],
        [_numbers(n, 2, param) for n in SIZES],
        [_numbers(n, 3, state) for n in SIZES],
        [_squares(n, 4, state) for n in SIZES],
    ]
    maxima = [_squares(n, 5, state) for n in SIZES] if "amsgrad" in names else []
    lists += [maxima] if op != "lamb" else []
    lists += [[torch.tensor(float(i)) for i in range(len(SIZES))]]
    lists = [[t.to(device) for t in tensors] for tensors in lists]
    options = {
        key: [t.to(device) for t in value] if isinstance(value, list) else value
        for key, value in _options(param, state, names).items()
    }
    hyper: dict[str, Any] = {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "gradient_scale": 0.75,
    }
    if op != "lamb":
        hyper["decoupled"] = op == "adamw"
    step = superfine_kernels.lamb_ if op == "lamb" else superfine_kernels.adamw_
    for i in range(STEPS):
        for k, grad in enumerate(lists[1]):
            grad.copy_(_numbers(grad.numel(), 10 + i + 100 * k, param))
        step(*lists, **hyper, **options, backend=backend)
    found = hashlib.sha256()
    for tensors in (*lists, *(options.get(key, []) for key in ("anchors", "remainders", "scales"))):
        for t in tensors:
            found.update(t.cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.ndim else b"")
    return found.hexdigest()[:16]


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: digest(name, "cpu", "cpu") for name in CASES}, indent=1) + "\n")
