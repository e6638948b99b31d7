"""Benchmarks of Superfine's ops: each ``<op>.py`` declares cases, ``harness.py`` does all the timing.

Two front ends read the same cases: ``superfine bench`` and ``pytest bench/``.
"""

from __future__ import annotations

import difflib
import importlib

from .harness import FULL, QUICK, Case, Provider, Settings, UnavailableError, measure
from .records import Ceilings, Row, Run, read

__all__ = [
    "FULL",
    "OPS",
    "QUICK",
    "Case",
    "Ceilings",
    "Provider",
    "Row",
    "Run",
    "Settings",
    "UnavailableError",
    "all_cases",
    "measure",
    "read",
]

#: Each op, and the file of its cases.
FILES = {
    "adamw": "adamw",
    "lamb": "lamb",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "bce_with_logits": "elementwise_loss",
    "mse": "elementwise_loss",
    "gelu": "activation",
    "swiglu": "activation",
    "geglu": "activation",
    "rows_linear": "slices",
    "cols_linear": "slices",
    "rows_embedding": "slices",
    "layer_norm": "layer_norm",
    "rms_norm": "layer_norm",
    "train_step": "train_step",
    "prepare": "prepare",
    "fused_modules": "fused_modules",
}
OPS = tuple(FILES)


def all_cases(only: str | None = None, device: str | None = None) -> list[Case]:
    """Return the cases of every op, or of the op named ``only``; with a type of ``device``, those meant for it.

    Raises:
        ValueError: ``only`` names no op.
    """
    if only is not None and only not in OPS:
        near = difflib.get_close_matches(only, OPS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"bench: op is {only!r}; expected one of {', '.join(OPS)}{hint}")
    files = dict.fromkeys(FILES.values() if only is None else [FILES[only]])
    cases = [case for name in files for case in importlib.import_module(f"{__name__}.{name}").cases()]
    cases = [case for case in cases if only is None or case.op == only]
    return [case for case in cases if device is None or case.device in ("", device)]
