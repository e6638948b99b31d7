"""Superfine: fine-tune part of a pretrained model as cheaply as the hardware allows.

plan = superfine.select(model, "last:2", "head")
optimizer = plan.optimizer("adamw", lr=2e-5)
loss = superfine.losses.cross_entropy(logits, labels)
superfine.save_delta(model, plan, "delta.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# `select` names a function and its module: imported here once, the function wins for good.
from superfine.select import Plan, select
from superfine_kernels import __version__

if TYPE_CHECKING:
    from superfine import losses, optim
    from superfine.delta import DeltaInfo, load_delta, merge, save_delta
    from superfine.slices import Slice

__all__ = [
    "DeltaInfo",
    "Plan",
    "Slice",
    "__version__",
    "load_delta",
    "losses",
    "merge",
    "optim",
    "save_delta",
    "select",
]

_FROM_DELTA = ("DeltaInfo", "load_delta", "merge", "save_delta")


def __getattr__(name: str) -> Any:  # submodules load on first use: `import superfine` stays cheap
    if name in ("optim", "losses"):
        return importlib.import_module(f"superfine.{name}")
    if name in _FROM_DELTA:
        return getattr(importlib.import_module("superfine.delta"), name)
    if name == "Slice":
        return importlib.import_module("superfine.slices").Slice
    raise AttributeError(f"module 'superfine' has no attribute {name!r}")
