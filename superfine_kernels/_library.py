"""What every op file shares: the torch.library handle, argument checks, the cost record."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from superfine_kernels import _cpu

__version__: str = _cpu.__version__

#: All ops live under torch.ops.superfine. Their Meta kernels serve fake tensors too: `register_fake` would read its
#: caller's source file at import, 2 ms for each op.
LIBRARY = torch.library.Library("superfine", "DEF")

#: Codes of the element types, as in csrc/core/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

#: Smaller buffers come from the heap, whose pages have mostly been touched before.
HUGE_PAGE_BYTES = 4 << 20

#: Reads lists of tensors natively (csrc/bind/tensor_list.h).
# Even for who imports this in inference mode, whose tensors have no version to look for.
with torch.inference_mode(False):
    READER = _cpu.TensorReader(torch)


@dataclass(frozen=True)
class Cost:
    """The least an op must do: bytes to and from memory, and floating-point operations."""

    bytes: int
    flops: int


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a kernel computes on elements of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(value: object) -> str:
    """A tensor as `float16 (4, 5) on cpu`; anything else as its repr and type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def reject(
    op: str, argument: str, value: object, expected: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `op: argument is X; expected Y`."""
    raise error(f"{op}: {argument} is {describe(value)}; expected {expected}")


def no_second_derivative(op: str, expected: str) -> RuntimeError:
    """The error of an op whose backward keeps too little to be differentiated again."""
    return RuntimeError(f"{op}: a second derivative is asked for; expected {expected}")


@functools.cache
def warn_once(message: str) -> None:
    """Says once per process that something takes a slower path, and why."""
    warnings.warn(message, UserWarning, stacklevel=3)


def in_functional_transform() -> bool:
    """Whether torch.func (grad, vmap, ...) or forward-mode AD is at work, outside of a compiler."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel may read these directly: nothing traces, no mode or subclass intercepts ops."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None  # torch.jit.trace, which sees no kernel
        and set(map(type, tensors)) <= _PLAIN_TYPES
    )


def is_batched(grad: torch.Tensor) -> bool:
    """Whether a backward pass runs for many gradients at once: is_grads_batched, jacobian(vectorize=True)."""
    return in_functional_transform() or torch._C._functorch.is_legacy_batchedtensor(grad)


def direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` less its preparations for torch.func, which `is_plain` rules out: 2 us a call."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_in_forked_child = False


def in_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """The tensor, just made and of real memory: to touch its pages first often costs more than to compute them."""
    if fresh.is_cpu and fresh.nbytes >= HUGE_PAGE_BYTES:
        _cpu.advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def _after_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads a CPU kernel uses: torch's own number; in a forked child one, as others would never start."""
    count = torch.get_num_threads()
    if count > 1 and _in_forked_child:
        warn_once(
            f"this process was forked from one whose {count} threads it does not have; kernels use one thread here. "
            "Start processes by 'spawn', or set torch.set_num_threads(1) in them"
        )
        return 1
    return count
