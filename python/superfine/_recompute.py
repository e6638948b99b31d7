"""What backward computes again instead of finding it saved.

A tensor may be known to follow from others that are saved anyway: the output of a norm from its input, which the norm
saves. `remember` notes that, and whoever would save the tensor asks `origin` and saves these others, which costs
nothing more. `recomputed` is a node that keeps its input alone, or its input's origin, and notes the same of its
output.

    y = norm(x);  remember(y, norm, (x,))
    a = recomputed(lambda y: gelu(dense(y)), y, parameters)     # saves x, and runs norm, dense, gelu in backward

Notes vanish with their tensors. Under a compiler there are none: it chooses itself what to save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Origin", "forget", "origin", "recomputed", "remember"]


class Origin(NamedTuple):
    """`function(*tensors)` is the tensor, bit for bit."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


# Not attributes of the tensors: those would be pickled and saved with them.
_origins: Any = WeakIdKeyDictionary()


def remember(tensor: Tensor, function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    """Notes that `tensor` is `function(*tensors)`. The function holds no tensors of its own."""
    if not torch.compiler.is_compiling() and tensor.requires_grad:
        _origins[tensor] = tensor._version, Origin(function, tensors)


def forget(tensor: Tensor) -> None:
    """Drops what is noted of a tensor that is kept itself, for which what it follows from would be kept as well."""
    if not torch.compiler.is_compiling():
        _origins.pop(tensor, None)


def origin(tensor: Tensor) -> Origin | None:
    """What `tensor` follows from; None where that is not known, or where it was written to since."""
    if torch.compiler.is_compiling() or not _origins:
        return None
    version, found = _origins.get(tensor, (None, None))
    return found if version == tensor._version else None


def recomputed(function: Callable[[Tensor], Tensor], input: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`function(input)`, of which `input` (or its origin) is saved, and backward runs the function again.

    `parameters` are the tensors beside `input` that require grad and that `function` reads. It draws no random
    numbers.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(input)
    if not input.requires_grad and not parameters:
        return function(input)
    known = origin(input) or Origin(_same, (input,))
    call = _Call(function, known.function, input.requires_grad, input.device.type)
    output: Tensor = _Recomputed.apply(call, input, known.tensors, *parameters)
    remember(output, call, known.tensors)
    return output


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Call:
    """One call of the function: how to run it again as it ran. Holds no tensors but between two steps of backward."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        source: Callable[..., Tensor],
        differentiable: bool,
        device: str,
    ) -> None:
        self.function, self.source, self.differentiable = function, source, differentiable
        self.device, self.autocast = device, torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)
        self.again: tuple[Tensor, Tensor] | None = None  # input and output of the run in backward

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The output again, for a node after this one; what it took is kept for this node, whose turn comes next."""
        if torch.is_grad_enabled():  # a second derivative
            return self.run(self.source(*tensors))
        self.again = self.rerun(tensors)
        return self.again[1].detach()

    def rerun(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Input, cut from what came before it, and output, whose graph leads to it."""
        with torch.no_grad():
            input = self.source(*tensors).detach()
        with torch.enable_grad():
            input.requires_grad_(self.differentiable)
            return input, self.run(input)

    def run(self, input: Tensor) -> Tensor:
        # Without the cache of casts: one made here has no graph, or another one than its next user wants.
        with torch.autocast(self.device, self.dtype, self.autocast, cache_enabled=False):
            return self.function(input)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, input, tensors, *parameters):
        ctx.call, ctx.sources = call, len(tensors)
        # Parameters are saved so that autograd notices when one was changed before backward.
        ctx.save_for_backward(*tensors, *parameters)
        return call.run(input)

    @staticmethod
    def backward(ctx, grad):
        call, saved = ctx.call, ctx.saved_tensors
        tensors, parameters = saved[: ctx.sources], saved[ctx.sources :]
        second = torch.is_grad_enabled()
        if second:  # backward(create_graph=True)
            input = call.source(*tensors)
            output = call.run(input)
        else:
            input, output = call.again or call.rerun(tensors)
            call.again = None
        wanted = [tensor for tensor, needed in zip((input, *parameters), _needed(ctx), strict=True) if needed]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=second, allow_unused=True))
        dinput, *rest = (next(found) if needed else None for needed in _needed(ctx))
        return None, dinput, None, *rest


def _needed(ctx: Any) -> tuple[bool, ...]:
    _, of_input, _, *of_parameters = ctx.needs_input_grad
    return of_input, *of_parameters
