"""Benchmarks of Superfine's ops: each ``<op>.py`` declares cases, ``harness.py`` does all the timing.

Two front ends read the same cases: ``python -m superfine_bench`` and ``pytest bench/``.
"""

from __future__ import annotations

import difflib
import importlib

from .harness import Case, Ceilings, Provider, Row, Settings, UnavailableError, measure, measure_ceilings

__all__ = [
    "OPS",
    "Case",
    "Ceilings",
    "Provider",
    "Row",
    "Settings",
    "UnavailableError",
    "all_cases",
    "measure",
    "measure_ceilings",
]

OPS = ("adamw", "cross_entropy")


def all_cases(only: str | None = None) -> list[Case]:
    """Return the cases of every op, or of the op named ``only``.

    Raises:
        ValueError: ``only`` names no op.
    """
    if only is not None and only not in OPS:
        near = difflib.get_close_matches(only, OPS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"all_cases: only is {only!r}; expected one of {', '.join(OPS)}{hint}")
    names = OPS if only is None else (only,)
    return [case for name in names for case in importlib.import_module(f"{__name__}.{name}").cases()]
