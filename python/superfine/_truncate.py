"""The part of a model before the first trained parameter runs without a graph.

Autograd itself records nothing there, unless someone makes the inputs require gradients, as gradient checkpointing
and PEFT do in Hugging Face models: then the whole prefix is kept, and gone through in backward, for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from superfine._prefix import Boundary
from superfine._swap import Part, add_part, has_part, remove_part, unmixed
from superfine.selectors import layer_stacks

__all__ = ["Sites", "Truncation", "eval_prefix", "find_sites", "leave", "truncate"]


@dataclass(frozen=True)
class Sites:
    """Where the prefix is: paths of modules.

    ``prefix``: what is registered before the first trained block, the widest modules that can be. ``entry``: the
    block that holds the first trained parameter. ``suffix``: it and the blocks after it. ``why_none``: no prefix.
    """

    prefix: tuple[str, ...] = ()
    entry: str | None = None
    suffix: tuple[str, ...] = ()
    why_none: str | None = None


def find_sites(model: nn.Module, trained: Collection[str]) -> Sites:
    """The sites of `model` when the parameters named in `trained` (under any of their names) train.

    What is registered first counts as used first; :meth:`Truncation.look` finds out where that is not so. Of an
    encoder-decoder whose encoder is frozen, the encoder is a part of the prefix.
    """
    boundary = Boundary(model, trained)
    first = boundary.first or ""
    stacks = layer_stacks(model)
    blocks = [block for stack in stacks for block in stack.blocks]
    if not blocks:
        return Sites(why_none="no stack of repeated layers was found")
    before = [block for block in blocks if boundary.is_after(block)]
    suffix = tuple(b for stack in stacks if not stack.leaves for b in stack.blocks if b not in before)
    entry = next((block for block in blocks if first.startswith(block + ".")), None)
    if entry is None and not before:
        return Sites(suffix=suffix, why_none=f"{first!r} trains, which is used before the layers")
    prefix = _registered_before(model, before[-1] if entry is None else entry)
    if entry is None:
        prefix.append(before[-1])
    outside = {
        id(module)
        for path, module in model.named_modules(remove_duplicate=False)
        if not any(path == top or path.startswith(top + ".") for top in prefix)
    }
    # A module that is used again elsewhere (an activation, shared layers) is no part of the prefix.
    alone = [path for path in prefix if outside.isdisjoint(map(id, model.get_submodule(path).modules()))]
    return Sites(tuple(alone), entry, suffix, None if alone or entry else "nothing comes before it")


def _registered_before(model: nn.Module, path: str) -> list[str]:
    """Modules with a forward that are registered before the one at `path`, the widest that do not hold it."""
    found: list[str] = []
    module, parent = model, ""
    for part in path.split("."):
        for name, child in module._modules.items():
            if name == part:
                break
            if child is not None:
                found += _with_forward(child, parent + name)
        module, parent = module.get_submodule(part), f"{parent}{part}."
    return found


def _with_forward(module: nn.Module, path: str) -> list[str]:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [path]
    return [
        found for name, child in module.named_children() for found in _with_forward(child, f"{path}.{name}")
    ]


@dataclass
class Truncation:
    """What the parts of one model share: whether a forward has shown that nothing trained is cut off.

    `running`: a forward of the whole model that records a graph.
    """

    entry: str | None
    trained: dict[str, nn.Parameter]
    checked: bool = False
    running: bool = False
    seen: set[Any] = field(default_factory=set)

    def look(self, values: Any) -> None:
        """Raise `ValueError` where a trained parameter is in the graph of a tensor among `values`."""
        names = {id(parameter): name for name, parameter in self.trained.items()}
        nodes = [tensor.grad_fn for tensor in _tensors(values) if tensor.grad_fn is not None]
        while nodes:
            node = nodes.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            name = names.get(id(getattr(node, "variable", None)))
            if name is not None:
                end = "the layers' end" if self.entry is None else repr(self.entry)
                raise ValueError(
                    f"prepare: {name!r} trains and is used before {end}, where truncate=True lets gradients end; "
                    "expected it to be used afterwards, as it is registered (truncate=False keeps its gradients)"
                )
            nodes += [after for after, _ in node.next_functions if after is not None]

    def done(self) -> None:
        """A forward has come to its end."""
        self.checked = True
        self.trained.clear()


class NoGraph(Part):
    """A frozen module of the prefix."""

    _superfine_truncation: Truncation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        truncation = self._superfine_truncation
        if (
            not (torch.compiler.is_compiling() or truncation.running)
            and self.training
            and torch.is_grad_enabled()
        ):
            # Without the whole model, whose forward looks at what trains: merge_and_unload() of PEFT takes it away.
            trains = next((name for name, p in self.named_parameters() if p.requires_grad), None)
            if trains is not None:
                raise ValueError(
                    f"prepare: {trains!r} of a {unmixed(self).__name__} requires a gradient, where a plan had frozen "
                    "it and prepare ended the graph; expected superfine.restore before the model trains otherwise"
                )
        # Compiling comes first: else a forward that is not compiled, later, would be a reason to compile again.
        if torch.compiler.is_compiling() or truncation.checked or not torch.is_grad_enabled():
            with torch.no_grad():
                return super().forward(*args, **kwargs)
        output = super().forward(*args, **kwargs)
        truncation.look(output)
        return _detached(output)


class Detached(Part):
    """The first trained block: its inputs carry no graph."""

    _superfine_truncation: Truncation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        truncation = self._superfine_truncation
        if not torch.compiler.is_compiling():
            if truncation.running and not torch.is_grad_enabled():
                raise ValueError(
                    f"prepare: {truncation.entry!r} runs without a graph in training, as checkpointing with "
                    "use_reentrant=True does, and needs inputs that require gradients, which truncate=True ends; "
                    "expected prepare(checkpointing=True), use_reentrant=False or truncate=False"
                )
            if not truncation.checked and torch.is_grad_enabled():
                truncation.look((args, kwargs))
        return super().forward(*_detached(args), **_detached(kwargs))


class Eval(Part):
    """A module that stays in eval mode."""

    _superfine_mode: bool | None  # what was asked for last
    _superfine_modes: list[bool]  # of it and what it holds, before

    def train(self, mode: bool = True) -> Any:
        self._superfine_mode = mode
        return super().train(False)


def truncate(model: nn.Module, sites: Sites, trained: dict[str, nn.Parameter]) -> Truncation:
    """Lets the modules of the prefix run without a graph."""
    truncation = Truncation(sites.entry, trained)
    for path in sites.prefix:
        module = model.get_submodule(path)
        # Not dropout or an activation: they keep next to nothing, and may be called again later on.
        if next(module.parameters(), None) is not None:
            _add(module, NoGraph, _superfine_truncation=truncation)
    if sites.entry is not None:
        _add(model.get_submodule(sites.entry), Detached, _superfine_truncation=truncation)
    return truncation


def eval_prefix(model: nn.Module, sites: Sites) -> None:
    """Puts the modules of the prefix into eval mode, for good."""
    for path in sites.prefix:
        module = model.get_submodule(path)
        _add(
            module, Eval, _superfine_mode=None, _superfine_modes=[each.training for each in module.modules()]
        )
        nn.Module.train(module, False)


def leave(module: nn.Module) -> None:
    """Takes back whatever this file has done to `module`; its mode is the one that was asked for last."""
    attributes = vars(module)
    if has_part(module, Eval):
        asked, modes = attributes.pop("_superfine_mode"), attributes.pop("_superfine_modes")
        remove_part(module, Eval)
        if asked is not None:
            module.train(asked)
        else:
            for each, mode in zip(module.modules(), modes, strict=False):
                each.training = mode
    for part in (NoGraph, Detached):
        remove_part(module, part)
    attributes.pop("_superfine_truncation", None)


def _add(module: nn.Module, part: type[Part], **attributes: Any) -> None:
    add_part(module, part)
    vars(module).update(attributes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _detached(value: Any) -> Any:
    """`value` with every tensor in it that requires a gradient detached; what holds none is passed on as it is."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if not isinstance(value, (dict, tuple, list)) or not any(each.requires_grad for each in _tensors(value)):
        return value
    if isinstance(value, dict):
        detached = {name: _detached(each) for name, each in value.items()}
        return detached if type(value) is dict else type(value)(**detached)  # a ModelOutput
    found = [_detached(each) for each in value]
    return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
