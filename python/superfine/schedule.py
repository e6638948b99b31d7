"""Learning-rate schedules as functions of the step: no state, so resuming needs nothing but the step."""

from __future__ import annotations

import math

__all__ = ["lr_scale", "warmup_steps"]


def warmup_steps(warmup: int | float, total: int) -> int:
    """Steps of warm-up: an ``int`` counts steps, a ``float`` is a fraction of ``total``, rounded up."""
    steps = warmup if isinstance(warmup, int) else math.ceil(warmup * total)
    return min(steps, total)


def lr_scale(step: int, total: int, *, kind: str = "linear", warmup: int = 0) -> float:
    """The factor on the learning rate at ``step`` (from 0) of ``total``.

    It rises linearly over ``warmup`` steps, from 1/warmup so that the first step already moves something, and
    then stays at 1 (``constant``) or falls towards 0 along a line (``linear``) or half a cosine
    (``cosine``); zero itself would be reached at ``total``, one past the last step. Raises ``ValueError`` for a step
    outside of these and for another ``kind``.
    """
    if not 0 <= step < total:
        raise ValueError(f"lr_scale: step is {step}; expected 0 <= step < {total}")
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"lr_scale: kind is {kind!r}; expected 'constant', 'linear' or 'cosine'")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / (total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
