"""What the optimizers' ops share: checks of hyperparameters, lists from an optimizer's state, the fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from superfine_kernels._library import reject, warn_once


def checked_hyperparameters(
    op: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> dict[str, Any]:
    """The hyperparameters by name; ValueError for one out of range."""
    if not (lr >= 0 and math.isfinite(lr)):
        reject(op, "lr", lr, "a finite number >= 0")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            reject(op, name, beta, "a number in [0, 1)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            reject(op, name, value, "a number >= 0")
    return {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}


def state_lists(
    params: Sequence[Tensor], state: dict[Tensor, dict[str, Tensor]], names: Sequence[str | None]
) -> tuple[list[Tensor], ...]:
    """Parameters that have a gradient, their gradients, and the entries `names` of their state; None: no entries."""
    columns = [[state[param][name] for param in params] if name else [] for name in names]
    return list(params), [param.grad for param in params if param.grad is not None], *columns


def state_lists_by_device(
    params: Sequence[Tensor], state: dict[Tensor, dict[str, Tensor]], names: Sequence[str | None]
) -> Iterator[tuple[list[Tensor], ...]]:
    """`state_lists` for those that have a gradient, one device after the other."""
    used = [param for param in params if param.grad is not None]
    for device in dict.fromkeys(param.device for param in used):
        yield state_lists([param for param in used if param.device == device], state, names)


def step_rest(
    op: str,
    reference: Callable[..., None],
    rest: Sequence[int],
    lists: Sequence[Sequence[Tensor]],
    hyper: dict[str, Any],
) -> None:
    """Steps the positions `rest`, which no kernel takes, by `reference`, with one warning."""
    if not rest:
        return
    chosen = [[tensors[i] for i in rest] if tensors else [] for tensors in lists]
    first = chosen[0][0]
    warn_once(
        f"{op}: some parameters (the first is {first.dtype} with strides {first.stride()}) have a dtype or layout "
        "that no kernel takes; eager torch steps them"
    )
    with torch.no_grad():
        reference(*chosen, **hyper)
