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

OPS = ("adamw", "lamb", "cross_entropy", "linear_cross_entropy", "train_step")


def all_cases(only: str | None = None, device: str | None = None) -> list[Case]:
    """Return the cases of every op, or of the op named ``only``; with a type of ``device``, those meant for it.

    Raises:
        ValueError: ``only`` names no op.
    """
    if only is not None and only not in OPS:
        near = difflib.get_close_matches(only, OPS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"bench: op is {only!r}; expected one of {', '.join(OPS)}{hint}")
    names = OPS if only is None else (only,)
    cases = [case for name in names for case in importlib.import_module(f"{__name__}.{name}").cases()]
    return [case for case in cases if device is None or case.device in ("", device)]
