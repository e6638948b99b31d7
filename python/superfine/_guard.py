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

from superfine._swap import Part

__all__ = ["Flags", "Sized", "watch_steps"]


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


class Sized(Part):
    """A Hugging Face model whose vocabulary keeps its size while its embeddings or its head train.

    Resized, they are other parameters than those that the plan, its slices and its optimizer know.
    """

    def resize_token_embeddings(self, new_num_tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        of_tokens = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) in of_tokens:
                raise ValueError(
                    f"resize_token_embeddings: {name!r} trains in a prepared model; expected superfine.restore "
                    "first, then the resize, superfine.select and prepare"
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]


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
