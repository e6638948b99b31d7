"""What trains is what was planned: looked at in every training forward and in every step of a plan's optimizer.

A parameter that someone freezes after the plan was made does not train, and one that is unfrozen behind a truncated
prefix, after DistributedDataParallel has fixed what it reduces, or after the optimizer was made, silently does not
train as it should.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

__all__ = ["Flags", "watch_steps"]


class Flags:
    """Which parameters of a model are to require gradients.

    They are found through their modules, so that parameters that are replaced, and copies of a model, are its own.
    """

    def __init__(self, model: nn.Module, trained: Collection[str]) -> None:
        # Two lists of (a module's parameters by name, name there, full name): no comparison for each of them.
        self.trained: list[tuple[dict[str, Any], str, str]] = []
        self.frozen: list[tuple[dict[str, Any], str, str]] = []
        full = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                name = full.pop(id(parameter), None)
                if name is not None:
                    (self.trained if name in trained else self.frozen).append((module._parameters, key, name))

    def check(self, where: str = "prepare") -> None:
        """Raise `ValueError` naming the first parameter that requires a gradient against the plan, or does not."""
        try:
            for owner, key, name in self.trained:
                if not owner[key].requires_grad:
                    _reject(where, name, "planned, and is frozen")
            for owner, key, name in self.frozen:
                if owner[key].requires_grad:
                    _reject(where, name, "not planned, and requires a gradient")
        except (KeyError, AttributeError):
            _reject(where, name, "no longer a parameter of the model")


def _reject(where: str, name: str, problem: str) -> None:
    raise ValueError(
        f"{where}: {name!r} is {problem}; expected the model as the plan left it (to train something else: "
        "superfine.select, then Prepared.update, a new optimizer, and only then wrap the model)"
    )


def watch_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every step of `optimizer` looks at the flags of `model`, before anything moves, if it is prepared by now."""
    # A hook for nothing would cost torch's 60 microseconds a step.
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if "_superfine_prepared" in vars(model) and not any(isinstance(hook, _StepCheck) for hook in hooks):
        optimizer.register_step_pre_hook(_StepCheck(model))


class _StepCheck:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        prepared = vars(self.model).get("_superfine_prepared")
        if prepared is not None:
            prepared.flags.check("step")
