"""Optimizers with torch's names, arguments and checkpoints, stepping through Superfine's kernels."""

from superfine.optim.adamw import Adam, AdamW
from superfine.optim.in_backward import InBackward, in_backward
from superfine.optim.lamb import LAMB

__all__ = ["LAMB", "Adam", "AdamW", "InBackward", "in_backward"]
