"""Another forward for a module that is there already: its class becomes a subclass of the same name.

What replaces `forward` on an instance holds on to the module, so a copy would run the original's; accelerate, too,
rebinds it. A class has neither trouble; `isinstance`, names, hooks, parameters and `state_dict` stay as they were.

    class Detached(Part):
        def forward(self, *args, **kwargs): ... super().forward(...)

    add_part(module, Detached)
    remove_part(module, Detached)

Several parts stack: what was added last runs first. A part keeps its state in attributes of the module.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["Part", "add_part", "has_part", "remove_part", "unmixed"]


class Part(nn.Module):
    """What is mixed into a module's class: methods that replace the module's, which `super()` reaches."""


_classes: dict[tuple[type, tuple[type[Part], ...]], type] = {}


def add_part(module: nn.Module, part: type[Part]) -> None:
    """Puts `part` before the module's class; `ValueError` where it is there."""
    original, parts = _split(module)
    if part in parts:
        raise ValueError(f"{type(module).__name__} has {part.__name__} already; expected it once")
    if "forward" in vars(module):
        raise ValueError(
            f"{type(module).__name__}.forward was replaced on the module itself; expected the class's own"
        )
    module.__class__ = _mixed(original, (part, *parts))


def remove_part(module: nn.Module, part: type[Part]) -> None:
    """The class without `part`; does nothing where it is not there."""
    original, parts = _split(module)
    if part in parts:
        module.__class__ = _mixed(original, tuple(p for p in parts if p is not part))


def has_part(module: nn.Module, part: type[Part]) -> bool:
    """Whether `part` is mixed into the module."""
    return part in _split(module)[1]


def unmixed(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made with, without parts."""
    return _split(module)[0]


def _split(module: nn.Module) -> tuple[type[nn.Module], tuple[type[Part], ...]]:
    """The class that the module was made with, and the parts before it."""
    made: tuple[type[nn.Module], tuple[type[Part], ...]] | None = vars(type(module)).get("_superfine_parts")
    return made or (type(module), ())


def _mixed(original: Any, parts: tuple[type[Part], ...]) -> Any:
    if not parts:
        return original
    if (original, parts) not in _classes:

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            # The class has no name that could be imported: copies and pickles make it anew.
            _, _, *state = original.__reduce_ex__(self, protocol)
            return (_new, (original, parts), *state)

        members: dict[str, Any] = {
            "__reduce_ex__": reduce,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_superfine_parts": (original, parts),
        }
        if any("forward" in vars(part) for part in parts):

            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return super(made, self).forward(*args, **kwargs)

            # Trainer reads the names of a model's inputs there.
            forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
            forward.__doc__ = original.forward.__doc__
            # A member: transformers' layers wrap the forward of a subclass when it is made.
            members["forward"] = forward
        made: Any = type(original.__name__, (*parts, original), members)
        _classes[original, parts] = made
    return _classes[original, parts]


def _new(original: Any, parts: tuple[type[Part], ...]) -> Any:
    """An empty module for copy and pickle to fill."""
    made = _mixed(original, parts)
    return made.__new__(made)
