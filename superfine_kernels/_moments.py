"""What the optimizers' ops share: their lists, checks of hyperparameters, the choice of a backend, the fallback.

An optimizer's op takes eight lists, in the order of `LISTS`: one tensor for each parameter, or none at all in an
optional list. `low_bits` hold the lower halves of fp32 parameters whose upper halves are bfloat16 `params`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import LIBRARY, READER, is_plain, opmath_dtype, reject, threads, warn_once

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "anchors", "low_bits", "steps")
OPTIONAL = ("max_exp_avg_sqs", "anchors", "low_bits")

#: The entries of an optimizer's state that make the lists after params and grads.
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor", "low_bits", "step")

Lists = tuple[list[Tensor], ...]


def checked_hyperparameters(
    op: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gradient_scale: float,
    maximize: bool,
) -> dict[str, Any]:
    """The hyperparameters by name, `maximize` as a sign of `gradient_scale`; ValueError for one out of range."""
    if not (lr >= 0 and math.isfinite(lr)):
        reject(op, "lr", lr, "a finite number >= 0")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            reject(op, name, beta, "a number in [0, 1)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            reject(op, name, value, "a number >= 0")
    if not isinstance(gradient_scale, (int, float)):
        reject(op, "gradient_scale", gradient_scale, "a number", TypeError)
    return {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "gradient_scale": -gradient_scale if maximize else gradient_scale,
    }


@dataclass(frozen=True)
class MomentOp:
    """An optimizer's op: `torch.ops.superfine.<name>_` and the same rule in every backend.

    Attributes:
        name: of the op without its underscore, of the functions in the native modules and of the Triton file.
        reference: takes the lists and the hyperparameters.
        schema: of the hyperparameters.
        cuda_arguments: what the CUDA kernel needs beyond them, from the parameters' device.
    """

    name: str
    reference: Callable[..., None]
    schema: str
    cuda_arguments: Callable[[torch.device], dict[str, Any]] = lambda device: {}

    def register(self) -> None:
        """Define the op for torch's dispatcher, which subclasses, modes and traces go through."""
        alias = iter("abcdefgh")
        lists = ", ".join(
            f"Tensor[] {name}" if name == "anchors" else f"Tensor({next(alias)}!)[] {name}" for name in LISTS
        )
        LIBRARY.define(f"{self.name}_({lists}, *, {self.schema}, bool zero_grads, str backend='') -> ()")

        def dispatched(*lists: list[Tensor], backend: str = "", **hyper: Any) -> None:
            self.run(tuple(map(list, lists)), hyper, backend)

        torch.library.impl(LIBRARY, f"{self.name}_", "CompositeExplicitAutograd")(dispatched)
        torch.library.register_fake(f"superfine::{self.name}_", lambda *_, **__: None, lib=LIBRARY)

    def __call__(self, lists: Lists, hyper: dict[str, Any], backend: str | None) -> None:
        """Steps `lists`, past the dispatcher where that is allowed: it costs about 0.2 us for each tensor."""
        with torch.no_grad():
            if is_plain(lists[0]):
                self.run(lists, hyper, backend)
            else:
                getattr(torch.ops.superfine, f"{self.name}_")(*lists, **hyper, backend=backend or "")

    def run(self, lists: Lists, hyper: dict[str, Any], backend: str | None) -> None:
        """Steps `lists` with a backend, and by the reference what it leaves alone."""
        # Without parameters there is no device to choose by; the CPU's reader still compares the lengths.
        device = lists[0][0].device if lists[0] else torch.device("cpu")
        chosen, _, isa = _backends.choose(f"{self.name}_", device, backend).partition(":")
        if chosen == "cpu" or not lists[0]:
            rest = getattr(_cpu, self.name)(READER, lists, **hyper, threads=threads(), isa=isa)
        elif chosen == "cuda":
            from superfine_kernels import _cuda

            stream = torch.cuda.current_stream(device).cuda_stream
            more = self.cuda_arguments(device)
            rest = getattr(_cuda, self.name)(READER, lists, **hyper, **more, stream=stream)
        elif chosen == "triton":
            import importlib

            kernels = importlib.import_module(f"superfine_kernels.triton.{self.name}")
            rest = getattr(kernels, f"{self.name}_")(*lists, **hyper)
        else:
            _check_lengths(f"{self.name}_", lists)
            self.reference(*lists, **hyper)
            return
        self.step_rest(rest, lists, hyper)

    def step_rest(self, rest: Sequence[int], lists: Lists, hyper: dict[str, Any]) -> None:
        """Steps the positions `rest`, which no kernel takes, by the reference, with one warning."""
        if not rest:
            return
        chosen = [[tensors[i] for i in rest] if tensors else [] for tensors in lists]
        first = chosen[0][0]
        warn_once(
            f"{self.name}_: some parameters (the first is {first.dtype} with strides {first.stride()}) have a dtype "
            "or layout that no kernel takes; eager torch steps them"
        )
        with torch.no_grad():
            self.reference(*chosen, **hyper)

    def step_group(
        self,
        params: list[Tensor],
        state: dict[Tensor, dict[str, Tensor]],
        absent: Sequence[str],
        native: Callable[..., tuple[list[Tensor], list[int]] | None],
        hyper: dict[str, Any],
    ) -> None:
        """Steps the parameters of an optimizer's group that have a gradient.

        `native` is the CPU module's function for whole groups, which collects no lists; `absent` names the state that
        is not to be used, even where there is some.
        """
        if not params:
            return
        if params[0].device.type == "cpu" and is_plain(()):
            done = native(READER, params, state, **hyper, threads=threads(), isa="")
            if done is not None:
                used, rest = done
                for lists in state_lists([used[i] for i in rest], state, absent):
                    self.step_rest(range(len(lists[0])), lists, hyper)
                return
        for lists in state_lists(params, state, absent):
            self(lists, hyper, None)


def _check_lengths(op: str, lists: Lists) -> None:
    for name, tensors in zip(LISTS, lists, strict=True):
        if len(tensors) != len(lists[0]) and not (name in OPTIONAL and not tensors):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors; expected {len(lists[0])}, one for each of params"
            )


def state_lists(
    params: Sequence[Tensor], state: dict[Tensor, dict[str, Tensor]], absent: Sequence[str] = ()
) -> list[Lists]:
    """The op's lists for parameters that have a gradient: one device after the other, apart with hidden bits."""
    groups: dict[tuple[torch.device, bool], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            groups.setdefault((param.device, "low_bits" in state[param]), []).append(param)
    found: list[Lists] = []
    for (_, split), used in groups.items():
        missing = {*absent, *(() if split else ("low_bits",))}
        columns = [[] if name in missing else [state[param][name] for param in used] for name in STATE]
        found.append((used, [param.grad for param in used if param.grad is not None], *columns))
    return found


# --- what the references share ----------------------------------------------------------------------


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose upper halves are bfloat16 `high` and whose lower ones int16 `low` (core/dtype.h)."""
    low = low.to(torch.int32) & 0xFFFF
    rounded_up = torch.where(high == 0, 0, low >> 15 << 16)  # a zero that was put there since is one
    bits = (high.view(torch.int16).to(torch.int32) << 16 | low) - rounded_up
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join`."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


class Stored:
    """One parameter's tensors as real numbers in the type of computation; `save_...` write them back, rounded.

    Attributes:
        p, g, m, v: parameter, scaled gradient, moments.
        v_max: maximum of the second moments; None without amsgrad.
        distance: of the parameter from its anchor.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], i: int, gradient_scale: float) -> None:
        def real(tensors: Sequence[Tensor]) -> Tensor:
            return torch.view_as_real(tensors[i]) if tensors[i].is_complex() else tensors[i]

        def wide(tensors: Sequence[Tensor]) -> Tensor:
            return real(tensors).to(opmath_dtype(tensors[i].dtype))

        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, low_bits, _ = lists
        self.p = join(params[i], low_bits[i]) if low_bits else wide(params)
        self.g = wide(grads) * gradient_scale
        self.m, self.v = wide(exp_avgs), wide(exp_avg_sqs)
        self.v_max = wide(max_exp_avg_sqs) if max_exp_avg_sqs else None
        self.distance = self.p - wide(anchors) if anchors else self.p
        self._param, self._grad = real(params), real(grads)
        self._low_bits = low_bits[i] if low_bits else None
        self.exp_avg, self.exp_avg_sq = real(exp_avgs), real(exp_avg_sqs)
        self._max_exp_avg_sq = real(max_exp_avg_sqs) if max_exp_avg_sqs else None

    def save_moments(self) -> None:
        self.exp_avg.copy_(self.m)
        self.exp_avg_sq.copy_(self.v)
        if self._max_exp_avg_sq is not None and self.v_max is not None:
            self._max_exp_avg_sq.copy_(self.v_max)

    def save_param(self, zero_grad: bool) -> None:
        if self._low_bits is None:
            self._param.copy_(self.p)
        else:
            high, low = split(self.p)
            self._param.copy_(high)
            self._low_bits.copy_(low)
        if zero_grad:
            self._grad.zero_()
