"""Superfine: fine-tune part of a pretrained model as cheaply as the hardware allows.

plan = superfine.select(model, "last:2", "head")
superfine.prepare(model, plan, checkpointing=True)
optimizer = plan.optimizer("adamw", lr=2e-5)
loss = superfine.losses.cross_entropy(logits, labels)
superfine.save_delta(model, plan, "delta.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# `select` and `prepare` name a function and its module: imported here once, the function wins for good.
from superfine.prepare import Prepared, prepare, restore
from superfine.select import Plan, select
from superfine_kernels import __version__

if TYPE_CHECKING:
    from superfine import fused_modules, losses, optim
    from superfine.cache import PrefixCache
    from superfine.delta import DeltaInfo, load_delta, merge, save_delta
    from superfine.deltas import Deltas
    from superfine.forgetting import EWC, fisher, load_fisher, save_fisher
    from superfine.rotate import Rotation
    from superfine.slices import Slice

__all__ = [
    "EWC",
    "DeltaInfo",
    "Deltas",
    "Plan",
    "PrefixCache",
    "Prepared",
    "Rotation",
    "Slice",
    "__version__",
    "fisher",
    "fused_modules",
    "load_delta",
    "load_fisher",
    "losses",
    "merge",
    "optim",
    "prepare",
    "restore",
    "save_delta",
    "save_fisher",
    "select",
]

_FROM = {
    "PrefixCache": "cache",
    **dict.fromkeys(("DeltaInfo", "load_delta", "merge", "save_delta"), "delta"),
    **dict.fromkeys(("EWC", "fisher", "load_fisher", "save_fisher"), "forgetting"),
    "Deltas": "deltas",
    "Rotation": "rotate",
    "Slice": "slices",
}


def __getattr__(name: str) -> Any:  # submodules load on first use: `import superfine` stays cheap
    if name in ("optim", "losses", "fused_modules"):
        return importlib.import_module(f"superfine.{name}")
    if name in _FROM:
        return getattr(importlib.import_module(f"superfine.{_FROM[name]}"), name)
    raise AttributeError(f"module 'superfine' has no attribute {name!r}")
