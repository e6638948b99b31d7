"""`Optimizer.step` without the cost of a profiler that is not there.

torch wraps every optimizer's step in `record_function` and a search for hooks: about 60 us a step, as much as
our kernel takes for hundreds of small tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer

Step = TypeVar("Step", bound=Callable[..., Any])


def profiled_on_demand(step: Step) -> Step:
    """Wraps `step` as torch does, and goes through the wrapper only while there are hooks or a profiler."""
    profiled = torch.optim.Optimizer.profile_hook_step(step)
    untraced = _disable_dynamo(profiled)

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A step is one call already, and what a trace finds in the state soon changes.
        if torch.compiler.is_compiling():
            return untraced(self, *args, **kwargs)
        if (
            torch._C._autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        ):
            return profiled(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch's mark for "wrapped already"
    return wrapper  # type: ignore[return-value]
