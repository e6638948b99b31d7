"""Activation checkpointing of the blocks from the first trained one on, and of no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from superfine._recompute import forget
from superfine._swap import Part, add_part, remove_part

__all__ = ["checkpoint_blocks", "leave", "parse", "switch_off", "switch_on"]


class Checkpointed(Part):
    """A block that keeps its inputs in training, and is run again in backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if getattr(self, "gradient_checkpointing", False):
            raise ValueError(
                "prepare: gradient checkpointing was enabled in the model after prepare(checkpointing=...); expected "
                "one of them, as with both blocks run three times (in Trainer gradient_checkpointing=False)"
            )
        if any(_is_cache(value) for value in (*args, *kwargs.values())):
            raise ValueError(
                "prepare: a checkpointed block was given a cache of keys and values, into which its second run would "
                "write again; expected use_cache=False and no past_key_values in training"
            )
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                forget(value)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def _is_cache(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and hasattr(value, "get_seq_length")


def parse(checkpointing: bool | str) -> int:
    """Every how many blocks one is checkpointed; 0 for none. Raises `ValueError`."""
    if isinstance(checkpointing, bool):
        return int(checkpointing)
    every = re.fullmatch(r"every:([1-9][0-9]*)", checkpointing) if isinstance(checkpointing, str) else None
    if every is None:
        raise ValueError(
            f"prepare: checkpointing is {checkpointing!r}; expected False, True or 'every:N' with N from 1"
        )
    return int(every[1])


def checkpoint_blocks(model: nn.Module, blocks: Sequence[str], every: int) -> list[str]:
    """Checkpoints the first of `blocks` and every so many after it; returns their paths."""
    chosen = list(blocks[::every])
    for path in chosen:
        for name, module in model.get_submodule(path).named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise ValueError(
                    f"prepare: {path}.{name} is a {type(module).__name__}, whose statistics a checkpointed block "
                    "would update twice; expected checkpointing=False"
                )
    for path in chosen:
        add_part(model.get_submodule(path), Checkpointed)
    return chosen


def leave(module: nn.Module) -> None:
    """Takes the checkpoint of `module` back."""
    remove_part(module, Checkpointed)


def switch_off(model: nn.Module) -> list[str]:
    """Switches transformers' own checkpointing off; returns the paths of the modules where it was on."""
    on = [
        path for path, module in model.named_modules() if vars(module).get("gradient_checkpointing") is True
    ]
    for path in on:
        model.get_submodule(path).__dict__["gradient_checkpointing"] = False
    return on


def switch_on(model: nn.Module, paths: Sequence[str]) -> None:
    """Switches it on again in the modules that are still there."""
    modules = dict(model.named_modules())
    for path in paths:
        if path in modules:
            modules[path].__dict__["gradient_checkpointing"] = True
