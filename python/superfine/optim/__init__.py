"""Optimizers with torch's names, arguments and checkpoints, stepping through Superfine's kernels."""

from superfine.optim.adamw import AdamW

__all__ = ["AdamW"]
