"""What the optimizers' ops share: their lists, checks of hyperparameters, the choice of a backend, the fallback.

An optimizer's op takes nine lists, in the order of `LISTS`: one tensor for each parameter, or none at all in an
optional list. `remainders` of 16-bit parameters and `scales` of 8-bit moments are those of `_storage.py`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import LIBRARY, READER, is_plain, reject, threads, warn_once
from superfine_kernels._sharded import is_sharded, is_split, local_parts
from superfine_kernels._storage import Stored, random_key

LISTS = (
    "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "anchors", "remainders", "scales", "steps"
)  # fmt: skip
OPTIONAL = ("max_exp_avg_sqs", "anchors", "remainders", "scales")

#: The entries of an optimizer's state that make the lists after params and grads.
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor", "remainder", "scales", "step")

#: The hyperparameters of every op that are not its rule's: what a step does beside it, and how it rounds.
SCHEMA = "float gradient_scale, bool zero_grads, bool stochastic_rounding, int seed"

Lists = tuple[list[Tensor], ...]

#: What a step over groups learns about its tensors: given to the next one, it need only see that this still holds.
Plan = _cpu.MomentPlan

#: An optimizer's parameters, and the op's hyperparameters for them with `amsgrad` and `anchored`.
Group = tuple[list[Tensor], dict[str, Any]]


#: Hyperparameters that may be tensors of one element, which kernels on their device read when they run.
TENSOR_HYPERPARAMETERS = ("lr", "beta1", "beta2", "gradient_scale")


def checked_hyperparameters(op: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """The same, with `maximize` as a sign of `gradient_scale`; ValueError for one out of range."""
    checked = dict(hyper)
    for name in TENSOR_HYPERPARAMETERS:
        value = hyper[name]
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
                reject(op, name, value, "a number, or a float32 or float64 tensor of one element")
            if value.device.type == "cpu" and name != "gradient_scale":
                checked[name] = value.item()
        elif not isinstance(value, (int, float)):
            reject(op, name, value, "a number", TypeError)
    lr, seed = checked["lr"], hyper["seed"]
    if not isinstance(lr, Tensor) and not (lr >= 0 and math.isfinite(lr)):
        reject(op, "lr", lr, "a finite number >= 0")
    for name in ("beta1", "beta2"):
        if not isinstance(checked[name], Tensor) and not 0 <= checked[name] < 1:
            reject(op, name, checked[name], "a number in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not hyper[name] >= 0:
            reject(op, name, hyper[name], "a number >= 0")
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        reject(op, "seed", seed, "an integer in [0, 2^32)")
    if checked.pop("maximize"):
        checked["gradient_scale"] = -checked["gradient_scale"]
    return checked


def numbers(hyper: dict[str, Any], device: torch.device | None = None) -> dict[str, Any] | None:
    """The hyperparameters with numbers for all tensors that are not on `device`, waiting for those on a GPU.

    None where `gradient_scale` was such a tensor and is not finite: then the step is not to be taken.
    """
    found = {name: hyper[name] for name in TENSOR_HYPERPARAMETERS if isinstance(hyper[name], Tensor)}
    values = {name: value.item() for name, value in found.items() if value.device != device}
    if not math.isfinite(values.get("gradient_scale", 0.0)):
        return None
    return {**hyper, **values} if values else hyper


@dataclass(frozen=True)
class MomentOp:
    """An optimizer's op: `torch.ops.superfine.<name>_` and the same rule in every backend.

    Attributes:
        name: of the op without its underscore, of the functions in the native modules and of the Triton file.
        rule: the step of one parameter in eager torch; takes its `Stored` tensors, the count of steps with this one,
            and the hyperparameters of `schema`.
        schema: of the hyperparameters, without those of `SCHEMA`.
        of_whole: the hyperparameter that makes the rule read norms of a whole parameter, if there is one.
    """

    name: str
    rule: Callable[..., None]
    schema: str
    of_whole: str | None = None

    def register(self) -> None:
        """Define the op for torch's dispatcher, which subclasses, modes and traces go through."""
        alias = iter("abcdefghi")
        lists = ", ".join(
            f"Tensor[] {name}" if name == "anchors" else f"Tensor({next(alias)}!)[] {name}" for name in LISTS
        )
        LIBRARY.define(f"{self.name}_({lists}, *, {self.schema}, {SCHEMA}, str backend='') -> ()")

        def dispatched(*lists: list[Tensor], backend: str = "", **hyper: Any) -> None:
            self.run(tuple(map(list, lists)), hyper, backend)

        torch.library.impl(LIBRARY, f"{self.name}_", "CompositeExplicitAutograd")(dispatched)
        torch.library.register_fake(f"superfine::{self.name}_", lambda *_, **__: None, lib=LIBRARY)

    def __call__(self, lists: Lists, hyper: dict[str, Any], backend: str | None) -> None:
        """Steps `lists`, past the dispatcher where that is allowed: it costs about 0.2 us for each tensor."""
        with torch.no_grad():
            if is_plain(lists[0]):
                self.run(lists, hyper, backend)
                return
            resolved = numbers(hyper)
            if resolved is None:
                _skip(lists, hyper)
            else:
                getattr(torch.ops.superfine, f"{self.name}_")(*lists, **resolved, backend=backend or "")

    def run(self, lists: Lists, hyper: dict[str, Any], backend: str | None) -> None:
        """Steps `lists` with a backend, and by the reference what it leaves alone."""
        # Without parameters there is no device to choose by; the CPU's reader still compares the lengths.
        device = lists[0][0].device if lists[0] else torch.device("cpu")
        chosen, _, isa = _backends.choose(f"{self.name}_", device, backend).partition(":")
        if not lists[0]:
            chosen = "cpu"
        resolved = numbers(hyper, device if device.type == "cuda" and chosen != "reference" else None)
        if resolved is None:
            _check_lengths(f"{self.name}_", lists)
            _skip(lists, hyper)
            return
        if chosen == "cpu":
            rest = getattr(_cpu, self.name)(READER, lists, resolved, threads=threads(), isa=isa)
        elif chosen == "cuda":
            from superfine_kernels import _cuda

            rest = getattr(_cuda, self.name)(READER, lists, resolved, **_on_gpu(device))
        elif chosen == "triton":
            import importlib

            kernels = importlib.import_module(f"superfine_kernels.triton.{self.name}")
            rest = getattr(kernels, f"{self.name}_")(*lists, **resolved)
        else:
            _check_lengths(f"{self.name}_", lists)
            self.reference(lists, **resolved)
            return
        self.step_rest(rest, lists, resolved)

    def reference(
        self,
        lists: Lists,
        *,
        gradient_scale: float,
        zero_grads: bool,
        stochastic_rounding: bool,
        seed: int,
        **hyper: Any,
    ) -> None:
        """The step in eager torch; takes every dtype and layout. Complex numbers count as pairs of real ones."""
        for i in range(len(lists[0])):
            own = {name: tensors[i] for name, tensors in zip(LISTS, lists, strict=True) if tensors}
            step = own.pop("steps").add_(1).item()
            x = Stored(own, gradient_scale, random_key(seed, int(step)))
            self.rule(x, step, **hyper)
            x.save_param(zero_grads, stochastic_rounding)

    def step_rest(self, rest: Sequence[int], lists: Lists, hyper: dict[str, Any]) -> None:
        """Steps the positions `rest`, which no kernel takes, by the reference, with one warning."""
        if not rest:
            return
        chosen = [[tensors[i] for i in rest] if tensors else [] for tensors in lists]
        first = chosen[0][0]
        warn_once(
            f"{self.name}_: some parameters (the first is {first.dtype} with strides {first.stride()}), their "
            "gradients or their state have a dtype or layout that no kernel takes; eager torch steps them"
        )
        resolved = numbers(hyper)
        with torch.no_grad():
            if resolved is None:
                _skip(tuple(chosen), hyper)
            else:
                self.reference(tuple(chosen), **resolved)

    def step_groups(
        self, groups: Sequence[Group], state: dict[Tensor, dict[str, Tensor]], plan: Plan | None
    ) -> None:
        """Steps the parameters of an optimizer's groups that have a gradient, those of all groups at once.

        The native modules read groups. Lists are made of them for tensor subclasses, several devices, and Triton.
        """
        if is_plain(()):
            rest = self._step_groups_natively(groups, state, plan or Plan())
            if rest is not None:
                for index, pairs in itertools.groupby(rest, key=operator.itemgetter(0)):
                    hyper = groups[index][1]
                    for lists in self._lists([param for _, param in pairs], state, hyper):
                        self.step_rest(range(len(lists[0])), lists, _of_op(hyper))
                return
        for params, hyper in groups:
            if self.of_whole is not None and hyper[self.of_whole] and any(map(is_split, params)):
                raise ValueError(
                    f"{self.name}_: parameters are split over processes (DTensor), and {self.of_whole} takes norms "
                    "of whole ones; expected AdamW, or whole parameters as under DistributedDataParallel"
                )
        # All state is looked up before anything is stepped: a caller may add what is missing and try again.
        calls = [
            (lists, _of_op(hyper)) for params, hyper in groups for lists in self._lists(params, state, hyper)
        ]
        self._check_gradients_are_apart(calls)
        for lists, hyper in calls:
            self(lists, hyper, None)

    def _lists(
        self, params: Sequence[Tensor], state: dict[Tensor, dict[str, Tensor]], hyper: dict[str, Any]
    ) -> list[Lists]:
        """The op's lists; of tensors that lie on several processes the parts that are here."""
        found = state_lists(params, state, hyper)
        if not any(is_sharded(param) or is_sharded(param.grad) for param in params):
            return found
        return [
            tuple(
                local_parts(f"{self.name}_", name, each, lists[0]) if each else []
                for name, each in zip(LISTS, lists, strict=True)
            )
            for lists in found
        ]

    def _step_groups_natively(
        self, groups: Sequence[Group], state: dict[Tensor, dict[str, Tensor]], plan: Plan
    ) -> list[tuple[int, Tensor]] | None:
        """What was left alone, by number of the group; None, and nothing done, where lists have to be made."""
        devices = (param.device for params, _ in groups for param in params if param.grad is not None)
        device = next(devices, None)
        if device is None:
            return []
        chosen = _backends.choose(f"{self.name}_", device)
        if chosen not in ("cpu", "cuda"):
            return None
        reads_tensors = device if chosen == "cuda" else None
        resolved = [(params, numbers(hyper, reads_tensors)) for params, hyper in groups]
        if any(hyper is None for _, hyper in resolved):
            return None
        if chosen == "cpu":
            step = getattr(_cpu, f"{self.name}_groups")
            return step(READER, resolved, state, plan, threads=threads(), isa="")
        from superfine_kernels import _cuda

        step = getattr(_cuda, f"{self.name}_groups")
        return step(READER, resolved, state, plan, **_on_gpu(device))

    def _check_gradients_are_apart(self, calls: Sequence[tuple[Lists, dict[str, Any]]]) -> None:
        if not any(hyper["zero_grads"] for _, hyper in calls):
            return
        places = [grad.data_ptr() for lists, _ in calls for grad in lists[1] if grad.numel() > 0]
        if len(set(places)) < len(places):
            raise ValueError(
                f"{self.name}_: zero_grads is True and parameters share a gradient; expected gradients of their own"
            )


def _on_gpu(device: torch.device) -> dict[str, Any]:
    """What the CUDA kernels take beside what the CPU's do: memory for the time of a step, and the stream."""
    held: list[Tensor] = []

    def allocate(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=device))
        return held[-1].data_ptr()

    return {"allocate": allocate, "stream": torch.cuda.current_stream(device).cuda_stream}


def _skip(lists: Lists, hyper: dict[str, Any]) -> None:
    """What remains of a step that is not taken."""
    if hyper["zero_grads"]:
        torch._foreach_zero_(lists[1])


def _of_op(hyper: dict[str, Any]) -> dict[str, Any]:
    """Without what lists are there for."""
    return {name: value for name, value in hyper.items() if name not in ("amsgrad", "anchored")}


def _check_lengths(op: str, lists: Lists) -> None:
    for name, tensors in zip(LISTS, lists, strict=True):
        if len(tensors) != len(lists[0]) and not (name in OPTIONAL and not tensors):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors; expected {len(lists[0])}, one for each of params"
            )


def state_lists(
    params: Sequence[Tensor], state: dict[Tensor, dict[str, Tensor]], hyper: dict[str, Any]
) -> list[Lists]:
    """The op's lists for parameters that have a gradient: one device after the other, apart by what they lack."""
    absent = set()
    if not hyper.get("amsgrad"):
        absent.add("max_exp_avg_sq")
    if not hyper.get("anchored"):
        absent.add("anchor")
    groups: dict[tuple[torch.device, frozenset[str]], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            lacks = frozenset({"remainder", "scales"} - state[param].keys())
            groups.setdefault((param.device, lacks), []).append(param)
    found: list[Lists] = []
    for (_, lacks), used in groups.items():
        missing = absent | lacks
        columns = [[] if name in missing else [state[param][name] for param in used] for name in STATE]
        found.append((used, [param.grad for param in used if param.grad is not None], *columns))
    return found
