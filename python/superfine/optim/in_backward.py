"""Gradient release: each parameter is stepped in backward, as soon as its gradient is there, and the gradient freed.

Pudipeddi et al. 2020, "Training Large Neural Networks with Constant Memory using a New Execution Algorithm".
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from superfine.optim._in_pass import InPass, clip_factor
from superfine.optim.adamw import AdamW
from superfine_kernels import total_norm
from superfine_kernels._library import reject, warn_once


def in_backward(
    params: Any,
    optimizer: type[InPass] | InPass = AdamW,
    *,
    accumulation: int = 1,
    clip: str | None = None,
    **options: Any,
) -> InBackward:
    """Lets `backward()` step parameters one by one, so that the gradients of a model never exist together.

        release = in_backward(model, AdamW, lr=2e-5)  # to be kept, or its optimizer
        scheduler = LambdaLR(release.optimizer, ...)
        for batch in batches:
            model(**batch).loss.backward()  # steps, and leaves no gradients
            scheduler.step()

    Args:
        params: a module, or what an optimizer takes: parameters, named parameters or groups of them.
        optimizer: a class, `AdamW`, `Adam` or `LAMB`, or an optimizer that has all trainable parameters of `params`.
        accumulation: how many calls of `backward()` that reach a parameter make one step. Gradients are kept until
            the last of them, where they are released one by one: between the calls they take as much memory as ever.
        clip: which norm `max_grad_norm` of the optimizer is compared with; see `InBackward`.
        options: keyword arguments of the class.

    Raises:
        ValueError, TypeError: arguments out of range, parameters that are released already or belong to a
            distributed module, `differentiable` groups.
    """
    names: dict[Tensor, str] = {}
    if isinstance(params, nn.Module):
        _refuse_distributed(params)
        names = {param: name for name, param in params.named_parameters()}
        params = params.parameters()
    if isinstance(optimizer, type) and issubclass(optimizer, InPass):
        optimizer = optimizer(params, **options)
    elif not isinstance(optimizer, InPass):
        reject(
            "in_backward",
            "optimizer",
            optimizer,
            "AdamW, Adam or LAMB of superfine.optim, or one made of these",
            TypeError,
        )
    else:
        if options:
            reject(
                "in_backward",
                min(options),
                options[min(options)],
                "no options beside a ready-made optimizer",
                TypeError,
            )
        stepped = {param for group in optimizer.param_groups for param in group["params"]}
        for i, param in enumerate(_tensors(params)):
            if param.requires_grad and param not in stepped:
                raise ValueError(
                    f"in_backward: parameter {names.get(param, i)!r} is not in the optimizer; "
                    "expected every trainable one"
                )
    return InBackward(optimizer, accumulation, clip, names)


class InBackward:
    """Steps the parameters of `optimizer` in backward; made by `in_backward`.

    `optimizer` is the one that schedulers, `state_dict()` and logging work with, as always. Without clipping the
    bits are those of `backward()` and `step()`. A parameter without a gradient is skipped, as in `step()`. One that
    is frozen or unfrozen later, and one that `add_param_group` brings, is treated as it is then.

    Clipping. The norm of all gradients is known when all have been there, which is when backward has ended. So
    `clip` says what stands for it:

    - `"previous"`: the norm during the previous step's backward, or the parameter's own where that is larger, as at
      the first step. This is not `clip_grad_norm_`: a jump of the norm is clipped one step late, though each
      parameter's gradient is never longer than `max_grad_norm`. On a GPU each parameter waits for its norm.
    - `"measured"`: the norm of this very step, from a backward of its own, for the price of that:

          with release.measure():
              loss.backward(retain_graph=True)  # measures and frees; nothing moves
          loss.backward()  # steps

      This is `clip_grad_norm_`, up to rounding, if both passes compute the same: a second forward needs the same
      random numbers.

    Gradients that are not finite. Where norms are taken, by `clip` or by the optimizer's `error_on_nonfinite`, a
    parameter with such a gradient is left as it is and counted in `skipped`; `error_on_nonfinite` raises instead, and
    parameters that backward has reached earlier have moved then. After `measure()` it is all or nothing: no
    parameter moves, and `optimizer.skipped_steps` counts; `error_on_nonfinite` raises from the measuring backward.

    `optimizer.step()` steps gradients that accumulate, for an incomplete window, and does nothing when there are
    none, so loops may go on calling it; hooks on it are not called by backward. `optimizer.zero_grad()` starts the
    window anew. An exception in backward leaves parameters stepped that were reached before; that call does not
    count. A second `backward(retain_graph=True)` through weights that have moved is torch's error.

    What backward refuses, where it reaches the first parameter: `create_graph=True`; reentrant checkpointing
    (`use_reentrant=True`), which computes a gradient in parts and reads weights after they have moved; more than
    one process, as gradients are reduced among processes later. `GradScaler` is refused at `scaler.step()`.

    Args:
        optimizer: `AdamW`, `Adam` or `LAMB` of `superfine.optim`.
        accumulation, clip: as in `in_backward`.
        names: of parameters, for messages.

    Attributes:
        previous_norm: the last finite norm of all gradients; None before. `clip="previous"` compares with it, so
            save and restore it for a resumed run with the same bits. `optimizer.grad_norm` shows the last one,
            finite or not.
        skipped: updates of parameters not made because of gradients that are not finite.
    """

    def __init__(
        self,
        optimizer: InPass,
        accumulation: int = 1,
        clip: str | None = None,
        names: dict[Tensor, str] | None = None,
    ) -> None:
        if not (isinstance(accumulation, int) and accumulation >= 1):
            reject("in_backward", "accumulation", accumulation, "an integer >= 1")
        if clip not in (None, "previous", "measured"):
            reject("in_backward", "clip", clip, "'previous', 'measured' or None")
        if optimizer._release is not None:
            raise ValueError(
                "in_backward: the optimizer is released in backward already; expected remove() before"
            )
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise ValueError(
                "in_backward: the optimizer has hooks on step(), which backward does not call; expected none "
                "(Plan.optimizer: first_step_check=False)"
            )
        self.optimizer = optimizer
        self.accumulation = accumulation
        self.clip = clip
        self.previous_norm: float | None = None
        self.skipped = 0
        self._names = names or {}
        self._hooks: dict[Tensor, _Hook] = {}
        self._lock = threading.Lock()  # devices have threads of their own in backward
        self._task: int | None = None  # the backward that runs: torch's number of it
        self._latest = -1
        self._turn = 0  # backward passes begun
        self._passes = 0  # that count, of those that make one step
        self._last = False  # whether the one that runs is the last of these
        self._norms: list[float] = []  # of gradients released in this one
        self._measuring = False
        self._measured: float | None = None  # by measure(), for the next step
        self._refuse_options()
        self.attach()
        optimizer._release = self
        self._step_handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    # --- life ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks parameters that have none; `add_param_group` calls it."""
        found: dict[Tensor, _Hook] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            if group.get("differentiable"):
                reject("in_backward", f"differentiable of group {g}", True, "False")
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                name = f"param_groups[{g}]['params'][{i}]" if names is None else names[i]
                if param in self._hooks or not (param.is_floating_point() or param.is_complex()):
                    continue
                found[param] = _Hook(self, g, self._names.get(param, name))
                for other in list((param._post_accumulate_grad_hooks or {}).values()):
                    if isinstance(other, _Hook) and other.release() is None:
                        other.handle.remove()
                    elif isinstance(other, _Hook):
                        raise ValueError(
                            f"in_backward: {found[param].name} is released in backward already; "
                            "expected remove() before"
                        )
        for param, hook in found.items():
            frozen = not param.requires_grad
            if frozen:  # torch keeps a frozen parameter's hook, but takes none for it
                param.requires_grad_(True)
            hook.handle = param.register_post_accumulate_grad_hook(hook)
            if frozen:
                param.requires_grad_(False)
        self._hooks.update(found)

    def remove(self) -> None:
        """Leaves the optimizer to `step()` again; gradients that accumulate stay."""
        for handle in (*self._step_handles, *(hook.handle for hook in self._hooks.values())):
            handle.remove()
        self._hooks.clear()
        if self.optimizer._release is self:
            self.optimizer._release = None
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "in_backward: a release cannot be copied or pickled; expected copies of model and optimizer, and another "
            "release of these"
        )

    # --- one backward ----------------------------------------------------------------------------------

    def _begin(self, task: int) -> None:
        with self._lock:
            if task == self._task:  # another device's thread was first
                return
            self._refuse_backward(task)
            if self._task is not None:  # an exception has cut that one off
                self._forget()
            self._refuse_options()
            if self.clip == "measured" and self._measured is None and not self._measuring:
                raise RuntimeError(
                    "in_backward: clip is 'measured' and nothing has been measured for this step; expected "
                    "measure() before"
                )
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self._latest = task
            self._turn += 1
            self._last = self._passes + 1 == self.accumulation
            self._task = task

    def _take(self, hook: _Hook, param: Tensor) -> None:
        """Steps the parameter, or measures its gradient, and frees that."""
        optimizer = self.optimizer
        scale: float | None = 1.0
        limit = optimizer.max_grad_norm or math.inf
        if self._measured is not None:
            scale = clip_factor(self._measured, limit) if math.isfinite(self._measured) else None
        elif self._measuring or self.clip is not None or optimizer.error_on_nonfinite:
            norm = total_norm([param.grad])  # type: ignore[list-item]
            self._norms.append(norm)
            if math.isfinite(norm):
                scale = clip_factor(max(norm, self.previous_norm or 0.0), limit)
            elif optimizer.error_on_nonfinite:
                raise FloatingPointError(
                    f"in_backward: the norm of the gradient of {hook.name} is {norm}; expected finite"
                )
            else:
                scale = None
        if not self._measuring:
            if scale is None:
                self.skipped += 1
                warn_once("in_backward: gradients are not finite; such updates are skipped and counted")
            else:
                optimizer.step_params([(optimizer.param_groups[hook.group], [param])], scale)
        param.grad = None

    @torch.no_grad()
    def _end(self) -> None:
        if not self._last:
            self._passes += 1
            self._task = None
            return
        for param, hook in self._hooks.items():
            if param.grad is not None:  # from an earlier one of these passes
                self._take(hook, param)
        if self._norms:
            # Sorted, so that the sum does not depend on the order in which backward reaches parameters.
            norm = math.hypot(*sorted(self._norms))
            self.optimizer.grad_norm = norm
            if math.isfinite(norm):
                self.previous_norm = norm
            if self._measuring:
                self._measured = norm
        if not self._measuring:
            if self._measured is not None and not math.isfinite(self._measured):
                self.optimizer.skipped_steps += 1
            self._measured = None
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers expect step() before theirs
        self._norms.clear()
        self._passes = 0
        self._task = None

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """The next step's norm: as many `backward()` as make one step measure gradients, and free them.

        Raises:
            RuntimeError: within another `measure()`, or between the passes that make one step; or too few or
                many passes have run.
        """
        if self._measuring or self._passes:
            raise RuntimeError(
                f"measure: {self._passes} of {self.accumulation} backward passes have run; expected none before it"
            )
        self._forget()
        self._measuring = True
        turn = self._turn
        try:
            yield
            if self._turn - turn != self.accumulation or self._measured is None:
                raise RuntimeError(
                    f"measure: {self._turn - turn} backward passes have run; "
                    f"expected {self.accumulation}, as accumulation"
                )
        except BaseException:
            self._free()
            raise
        finally:
            self._measuring = False

    def restart(self) -> None:
        """Forgets what has been measured and which of the accumulated passes have run; `zero_grad()` calls it."""
        self._passes = 0
        self._forget()

    def _forget(self) -> None:
        self._norms.clear()
        self._measured = None
        self._task = None

    def _free(self) -> None:
        for param in self._hooks:
            param.grad = None
        self.restart()

    # --- step() ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (
            getattr(optimizer, "grad_scale", None) is not None
            or getattr(optimizer, "found_inf", None) is not None
        ):
            raise RuntimeError(
                "in_backward: a GradScaler steps the optimizer; expected none, as backward has stepped with scaled "
                "gradients (bfloat16 needs no scaling)"
            )
        if self._measuring:
            raise RuntimeError(
                "in_backward: step() is called within measure(); expected only backward() there"
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(param.grad is not None for param in self._hooks):
            norm = self.optimizer.grad_norm
            if self.clip is not None and norm is not None and math.isfinite(norm):
                self.previous_norm = norm  # step() has measured it
            self._free()

    # --- refusals --------------------------------------------------------------------------------------

    def _refuse_options(self) -> None:
        if self.clip is None and self.optimizer.max_grad_norm is not None:
            reject("in_backward", "clip", None, "'previous' or 'measured' beside max_grad_norm")
        if self.clip is not None and self.optimizer.max_grad_norm is None:
            reject("in_backward", "max_grad_norm", None, f"a number beside clip={self.clip!r}")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                reject(
                    "in_backward",
                    "the number of processes",
                    size,
                    "1: gradients are reduced among them later",
                )

    def _refuse_backward(self, task: int) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "in_backward: backward has create_graph=True; expected False, as gradients are freed"
            )
        # torch counts backward passes up, so a smaller number belongs to one around the last.
        if task < self._latest or _within_backward():
            raise RuntimeError(
                "in_backward: backward runs within another backward, as checkpointing with use_reentrant=True does; "
                "expected use_reentrant=False. Parameters that were reached before have been stepped"
            )


class _Hook:
    """One parameter's: what torch calls when its gradient is accumulated.

    It does not keep the release alive: torch does not show such hooks to the garbage collector, so parameters that
    their own hooks reached would never be freed.
    """

    __slots__ = ("group", "handle", "name", "release", "turn")
    handle: RemovableHandle

    def __init__(self, release: InBackward, group: int, name: str) -> None:
        self.release = weakref.ref(release)
        self.group = group  # its place: load_state_dict replaces the groups themselves
        self.name = name
        self.turn = 0

    def __call__(self, param: Tensor) -> None:
        release = self.release()
        if release is None:
            raise RuntimeError(
                f"in_backward: what releases {self.name} has been deleted; expected it, or its optimizer, "
                "to be kept, or remove() before"
            )
        task = torch._C._current_graph_task_id()
        if task != release._task:
            release._begin(task)
        if self.turn == release._turn:
            raise RuntimeError(
                f"in_backward: the gradient of {self.name} comes in parts, as where it was moved between uses; "
                "expected the whole at once"
            )
        self.turn = release._turn
        if release._last:
            release._take(self, param)


_BACKWARD = torch.autograd.backward.__code__
_NODE = torch.autograd.function.BackwardCFunction.apply.__code__


def _within_backward() -> bool:
    """Whether the backward that runs was called by a node or a hook of another one."""
    calls = 0
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _NODE:
            return True
        calls += frame.f_code is _BACKWARD
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


_DISTRIBUTED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def _refuse_distributed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _DISTRIBUTED:
                raise ValueError(
                    f"in_backward: module {name!r} is {kind.__name__}; expected a model of one process, as gradients "
                    "are reduced among processes only after they are released"
                )


def _tensors(params: Any) -> Iterator[Tensor]:
    """Those of what an optimizer takes: tensors, named tensors, groups."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry
