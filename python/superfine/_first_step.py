"""The first-step check: what was selected trains, and nothing else moves.

A selection that the loss does not reach, or a parameter that someone unfroze, cannot be seen before a
backward pass. Both look like training: the loss falls a little less, or a delta file silently misses what
moved. So the first real step of an optimizer made by ``Plan.optimizer`` is watched, once, at the price of
reading the gradients once and the frozen parameters twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from superfine._guard import watch_steps
from superfine_kernels._sharded import local_part, whole

__all__ = ["FirstStep", "watch_first_step"]


def watch_first_step(model: nn.Module, names: Iterable[str], optimizer: torch.optim.Optimizer) -> FirstStep:
    """Check the next step of ``optimizer`` that is not skipped, then leave no trace.

    Raises from ``optimizer.step()``, before anything moves, a ``ValueError`` that names the parameter: a
    selected one has no gradient or was frozen, all gradients are zero, a frozen one has a gradient or was
    unfrozen. After the step: a frozen one has moved. One selected parameter with a zero gradient is a
    ``UserWarning`` only: a zero-initialised neighbour, as in LoRA, makes it legitimate.

    Of a prepared model every step looks at requires_grad, from then on.

    A step that a ``GradScaler`` skips does not count. With a closure, gradients are checked after the step.
    ``remove()`` of what is returned calls the check off.
    """
    watch_steps(model, optimizer)
    return FirstStep(model, frozenset(names), optimizer)


class FirstStep:
    """The hooks of a check that has not been passed yet."""

    def __init__(self, model: nn.Module, names: frozenset[str], optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.names = names
        self.before: dict[str, tuple[int, int]] = {}
        self.pre_hook = optimizer.register_step_pre_hook(self.check_gradients)
        self.post_hook: RemovableHandle | None = None

    def check_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step."""
        if self.post_hook is not None:  # left by a step that failed, or a step within a step
            self.post_hook.remove()
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler's word that this step will be skipped
        if found_inf is not None and bool(found_inf.any()):
            return
        # Nothing moves: a schedule that rises from 0, or torch.distributed.checkpoint, which makes state so.
        if all(group["lr"] == 0 for group in optimizer.param_groups):
            return
        planned, frozen = self.split()
        _require_flags(planned, frozen)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        _refuse(
            [name for name, parameter in planned.items() if id(parameter) not in held],
            "selected parameter {} is another one than the optimizer has",
            "an optimizer made after what replaces parameters, as fully_shard does",
        )
        if not _has_closure(args, kwargs):  # a closure computes the gradients inside the step
            _require_gradients(planned, frozen)
        self.before = _fingerprints(frozen)
        # Registered only now, it is the last post-hook: no other can remove itself while they run.
        self.post_hook = optimizer.register_step_post_hook(self.check_frozen)

    def check_frozen(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step that was taken, which ends the check."""
        planned, frozen = self.split()
        if _has_closure(args, kwargs):
            _require_gradients(planned, frozen)
        after = _fingerprints(frozen)
        _refuse(
            [name for name, value in self.before.items() if after.get(name) != value],
            "frozen parameter {} moved in the first step",
            "only selected parameters to move",
        )
        self.remove()

    def remove(self) -> None:
        """Call the check off."""
        self.pre_hook.remove()
        if self.post_hook is not None:
            self.post_hook.remove()

    def split(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The parameters that are planned, and those that are not, by name."""
        planned: dict[str, nn.Parameter] = {}
        frozen: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            (planned if name in self.names else frozen)[name] = parameter
        return planned, frozen


def _has_closure(args: Any, kwargs: Any) -> bool:
    # torch hands hooks the arguments of step(self, closure=None), self included in some releases
    given = [value for value in args if not isinstance(value, torch.optim.Optimizer)]
    return any(value is not None for value in (*given, kwargs.get("closure")))


def _require_flags(planned: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> None:
    _refuse(
        [name for name, parameter in planned.items() if not parameter.requires_grad],
        "selected parameter {} was frozen after select",
        "requires_grad as select left it; select again for another selection",
    )
    _refuse(
        [name for name, parameter in frozen.items() if parameter.requires_grad],
        "parameter {} requires a gradient but is not selected",
        "requires_grad as select left it; select again for another selection",
    )


def _require_gradients(planned: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> None:
    _refuse(
        [name for name, parameter in planned.items() if parameter.grad is None],
        "selected parameter {} has no gradient",
        "backward() before step(), and a loss that depends on every selected parameter",
    )
    _refuse(
        [name for name, parameter in frozen.items() if parameter.grad is not None],
        "frozen parameter {} has a gradient",
        "gradients for selected parameters only",
    )
    zero = _all_zero(
        {name: parameter.grad for name, parameter in planned.items() if parameter.grad is not None}
    )
    if zero and len(zero) == len(planned):
        _refuse(
            zero,
            "the gradient of {} is zero everywhere, as is every other",
            "a loss that the selection changes",
        )
    if zero:
        warnings.warn(
            f"first step: the gradient of {_listed(zero)} is zero everywhere; it trains once that changes",
            stacklevel=2,
        )


def _all_zero(gradients: dict[str, Tensor]) -> list[str]:
    values = {
        name: gradient.coalesce().values() if gradient.is_sparse else gradient
        for name, gradient in gradients.items()
        if gradient.numel()
    }
    # The norm is by far the fastest reduction on the CPU, but the squares of tiny gradients vanish.
    norms = _fetch({name: whole(torch.linalg.vector_norm(value)) != 0 for name, value in values.items()})
    exact = _fetch({name: whole(values[name]).any() for name, nonzero in norms.items() if not nonzero})
    return [name for name, nonzero in exact.items() if not nonzero]


def _fingerprints(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Address and checksum of each tensor. The sum wraps at 64 bits: any change of one element changes it."""
    parts = {name: local_part(value.detach()) for name, value in parameters.items() if not value.is_meta}
    sums = _fetch({name: _checksum(part) for name, part in parts.items()})
    return {name: (parts[name].data_ptr(), value) for name, value in sums.items()}


def _checksum(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    raw = tensor.reshape(-1).view(torch.uint8)  # a view, unless the tensor is not contiguous
    # 64-bit words need no conversion, so no copy; bytes before and after the aligned middle are added singly.
    start = min(-raw.storage_offset() % 8, raw.numel())
    stop = start + (raw.numel() - start) // 8 * 8
    return raw[start:stop].view(torch.int64).sum() + raw[:start].sum() + raw[stop:].sum()


def _fetch(scalars: dict[str, Tensor]) -> dict[str, Any]:
    """Python values of 0-dim tensors, with one wait for each device instead of one for each tensor."""
    by_device: dict[torch.device, list[str]] = {}
    for name, scalar in scalars.items():
        by_device.setdefault(scalar.device, []).append(name)
    values: dict[str, Any] = {}
    for names in by_device.values():
        values.update(zip(names, torch.stack([scalars[name] for name in names]).tolist(), strict=True))
    return {name: values[name] for name in scalars}


def _refuse(names: list[str], problem: str, expected: str) -> None:
    if names:
        raise ValueError(f"first step: {problem.format(_listed(names))}; expected {expected}")


def _listed(names: list[str]) -> str:
    others = len(names) - 1
    return f"'{names[0]}'" + (f" (and {others} other{'s' if others > 1 else ''})" if others else "")
