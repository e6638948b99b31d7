"""What an optimizer's step takes along in its one pass: clipping, loss scaling, zeroing, anchors, hidden bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from superfine.optim._layout import Layout, check_saved, counts
from superfine_kernels import total_norm
from superfine_kernels._library import reject, warn_once
from superfine_kernels._moments import Group, Plan
from superfine_kernels._sharded import local_part, whole
from superfine_kernels.norm import reference as norm_without_waiting

if TYPE_CHECKING:
    from superfine.optim.in_backward import InBackward


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by, as in `torch.nn.utils.clip_grad_norm_`."""
    return min(1.0, limit / (norm + 1e-6))


def _number(value: Any) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


class InPassOptions(TypedDict, total=False):
    """Keyword arguments of our optimizers beside torch's; `InPass` says what they do."""

    max_grad_norm: float | None
    zero_grads: bool
    anchored: bool
    decouple_lr: bool
    master_weights: str | None
    stochastic_rounding: bool
    state_dtype: torch.dtype | str | None
    error_on_nonfinite: bool
    seed: int


class InPass(torch.optim.Optimizer):
    """Base of our optimizers: what every one of them takes along.

    A group may have its own `anchored`, `decouple_lr`, `master_weights`, `stochastic_rounding` and `state_dtype`.

    Args:
        max_grad_norm: clip the norm of all gradients, over all groups, to this, as `clip_grad_norm_` would.
        zero_grads: step() leaves zeros in the gradients, as `zero_grad(set_to_none=False)` would.
        anchored: weight decay pulls toward the values that a parameter had at its first step, not toward zero (L2-SP,
            Li et al. 2018); takes one more copy of the parameters.
        decouple_lr: weight decay is multiplied by lr / first lr instead of lr, so by the schedule alone.
        master_weights: "split" gives bfloat16 parameters 16 hidden bits each, so that they follow the float32
            trajectory bit for bit; their moments are float32 unless `state_dtype` says otherwise. "kahan" gives
            bfloat16 and float16 parameters a second number of their dtype, which keeps what rounding takes.
        stochastic_rounding: round bfloat16 parameters at random, right on average; takes no memory.
        state_dtype: of the moments; None for the parameter's. torch.float32 ("fp32") beside 16-bit parameters,
            torch.bfloat16 ("bf16") beside float32 ones, or torch.uint8 ("8bit"): 8-bit codes, of which blocks of 256
            share a scale.
        error_on_nonfinite: raise where a gradient is not finite, which reads all of them once more without
            `max_grad_norm`. Otherwise a step whose measured norm is not finite is skipped and counted.
        seed: of what is rounded at random: stochastic rounding and 8-bit second moments. Bits follow from it, the
            step, and an element's place and value, so a resumed run has those of one that was not cut off.

    Attributes:
        grad_norm: norm of all gradients, before clipping, when it was last measured; None before.
        skipped_steps: steps not taken, because gradients were not finite or a `GradScaler` said so.

    Where all gradients are on one GPU a step waits for nothing, so that a CUDA graph can capture it: the norm, the
    scale and whether the step is taken stay there. Only `error_on_nonfinite` and who reads those attributes wait.
    """

    max_grad_norm: float | None = None
    zero_grads: bool = False
    anchored: bool = False
    decouple_lr: bool = False
    master_weights: str | None = None
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    error_on_nonfinite: bool = False
    seed: int = 0
    _norm: float | Tensor | None = None
    _skipped: int = 0
    _skipped_on_gpu: Tensor | None = None
    _measured: tuple[float | Tensor, float] | None = None  # by clip_grad_norm_: norm and limit
    _plan: Plan  # of all steps
    _release: InBackward | None = None  # what steps the parameters in backward, if anything does

    def _configure(self, **options: Unpack[InPassOptions]) -> None:
        name = type(self).__name__
        self._plan = Plan()
        if unknown := options.keys() - InPassOptions.__annotations__.keys():
            raise TypeError(f"{name}() got an unexpected keyword argument {min(unknown)!r}")
        for option, value in options.items():
            setattr(self, option, value)
        self.state_dtype = _STATE_DTYPES.get(self.state_dtype, self.state_dtype)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            reject(name, "max_grad_norm", self.max_grad_norm, "a number > 0, or None")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            reject(name, "seed", self.seed, "an integer in [0, 2^32)")

    @property
    def grad_norm(self) -> float | None:
        return None if self._norm is None else float(self._norm)

    @grad_norm.setter
    def grad_norm(self, value: float | Tensor | None) -> None:
        self._norm = value

    @property
    def skipped_steps(self) -> int:
        return self._skipped + (0 if self._skipped_on_gpu is None else int(self._skipped_on_gpu))

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skipped = value
        if self._skipped_on_gpu is not None:
            self._skipped_on_gpu.zero_()  # the tensor that a captured step counts in

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` sets grad_scale and found_inf around step(), instead of unscaling itself."""
        return not any(group.get("differentiable") for group in self.param_groups)

    # --- gradients ------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Measures the norm of all gradients for the next step, which scales them as it reads them.

        In place of `torch.nn.utils.clip_grad_norm_` over the same parameters; `.grad` itself stays as it is. That
        step clips to `max_norm`, whatever `max_grad_norm` is; `zero_grad()` before it takes the measurement back.

        Returns:
            The norm before clipping, a scalar tensor; on a GPU where all gradients are on that one.

        Raises:
            RuntimeError: it is not finite, with `error_if_nonfinite`.
        """
        if not max_norm > 0:
            reject("clip_grad_norm_", "max_norm", max_norm, "a number > 0")
        if self._release is not None:
            raise RuntimeError(
                "clip_grad_norm_: the gradients were released in backward; expected max_grad_norm and clip= of "
                "superfine.optim.in_backward instead"
            )
        grads = list(self._grads())
        norm = total_norm(grads) if self._gpu() is None else norm_without_waiting(grads)
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"clip_grad_norm_: the norm of the gradients is {float(norm)}; expected finite"
            )
        self.grad_norm = norm
        self._measured = norm, max_norm
        return norm.clone() if isinstance(norm, Tensor) else torch.tensor(norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._measured = None
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.restart()

    def _gradient_scale(self) -> float | Tensor | None:
        """The factor of this step's gradients; None, or a tensor that is not finite, if it is not to be taken."""
        if self._gpu() is not None and not self.error_on_nonfinite:
            return self._gradient_scale_without_waiting()
        scaler, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = 1.0 if scaler is None else 1.0 / float(scaler)
        measured, self._measured = self._measured, None
        if found_inf is not None and float(found_inf):
            self._skip()
            return None
        if measured is None and (self.max_grad_norm is not None or self.error_on_nonfinite):
            grads = list(self._grads())
            measured = (total_norm(grads), self.max_grad_norm or math.inf) if grads else None
        if measured is not None:
            norm, limit = scale * float(measured[0]), measured[1]
            self.grad_norm = norm
            if not math.isfinite(norm):
                if self.error_on_nonfinite:
                    raise FloatingPointError(
                        f"{type(self).__name__}: the gradient of {self._first_nonfinite()}"
                    )
                warn_once(
                    f"{type(self).__name__}: gradients are not finite; such steps are skipped and counted"
                )
                self._skip()
                return None
            scale *= clip_factor(norm, limit)
        return scale

    def _gpu(self) -> torch.device | None:
        """The device of all gradients, if that is one GPU."""
        device = None
        for grad in self._grads():
            if not grad.is_cuda or (device is not None and grad.device != device):
                return None
            device = grad.device
        return device

    @torch.no_grad()
    def _gradient_scale_without_waiting(self) -> float | Tensor:
        """As _gradient_scale; counts steps not taken on the device, as only it knows of them."""
        scaler, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        measured, self._measured = self._measured, None
        grads = list(self._grads())
        if measured is None and self.max_grad_norm is not None:
            measured = norm_without_waiting(grads), self.max_grad_norm
        if scaler is None and found_inf is None and measured is None:
            return 1.0
        device = grads[0].device
        scale = torch.ones((), dtype=torch.float64, device=device)
        if scaler is not None:
            scale /= scaler.to(device)
        if measured is not None:
            norm = scale * torch.as_tensor(measured[0], device=device)
            self.grad_norm = norm
            scale = scale * (measured[1] / (norm + 1e-6)).clamp(max=1.0)
            scale = torch.where(norm.isfinite(), scale, math.nan)
        if found_inf is not None:
            scale = torch.where(found_inf.to(device).reshape(()) == 0, scale, math.nan)
        if self._skipped_on_gpu is None:
            self._skipped_on_gpu = torch.zeros((), dtype=torch.int64, device=device)
        elif self._skipped_on_gpu.device != device:
            self._skipped_on_gpu = self._skipped_on_gpu.to(device)
        self._skipped_on_gpu += ~scale.isfinite()  # in place, so that replays of a graph count on
        return scale

    @torch.no_grad()
    def _skip(self) -> None:
        self._skipped += 1
        if self.zero_grads:
            torch._foreach_zero_([local_part(grad) for grad in self._grads()])

    def _grads(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param.grad

    def _first_nonfinite(self) -> str:
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                grad = None if param.grad is None else whole(param.grad).to_dense().isfinite()
                if grad is not None and not grad.all():
                    place = f"param_groups[{g}]['params'][{i}]" if names is None else names[i]
                    return (
                        f"{place} has {int((~grad).sum())} elements that are not finite; expected finite ones"
                    )
        return "the parameters overflows their norm; expected a finite one"

    # --- state ----------------------------------------------------------------------------------------

    def _option(self, group: dict[str, Any], name: str) -> Any:
        return group.get(name, getattr(self, name))

    def _weight_decay(self, group: dict[str, Any]) -> float:
        """What the kernel is to multiply by lr."""
        decay: float = group["weight_decay"]
        if not self._option(group, "decouple_lr"):
            return decay
        first = float(group.get("decay_lr", group.get("initial_lr", group["lr"])))
        return decay / first if first else 0.0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; keeps the first lr where weight decay is measured by it: schedulers change lr from now on.

        Raises:
            ValueError: the group's own options, or those of the optimizer for it, are out of range.
        """
        name = type(self).__name__
        master_weights, state_dtype = (
            self._option(param_group, option) for option in ("master_weights", "state_dtype")
        )
        if master_weights not in (None, "split", "kahan"):
            reject(name, "master_weights", master_weights, "'split', 'kahan' or None")
        if master_weights is not None and self._option(param_group, "stochastic_rounding"):
            reject(name, "stochastic_rounding", True, "False beside master_weights, which lose nothing")
        if _STATE_DTYPES.get(state_dtype, state_dtype) not in _STATE_DTYPES.values():
            reject(name, "state_dtype", state_dtype, "torch.float32, torch.bfloat16, torch.uint8 or None")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._option(group, "decouple_lr"):
            group.setdefault("decay_lr", float(group["lr"]))
        if self._release is not None:
            self._release.attach()

    def _hyperparameters(self, group: dict[str, Any], scale: float | Tensor) -> dict[str, Any]:
        """What the op takes for a group; here, what every op takes."""
        return {
            "lr": _number(group["lr"]),
            "beta1": _number(group["betas"][0]),
            "beta2": _number(group["betas"][1]),
            "eps": group["eps"],
            "weight_decay": self._weight_decay(group),
            "maximize": group["maximize"],
            "gradient_scale": scale,
            "zero_grads": self.zero_grads,
            "stochastic_rounding": self._option(group, "stochastic_rounding"),
            "seed": self.seed,
            "anchored": self._option(group, "anchored"),
        }

    def _layout(self, group: dict[str, Any], param: Tensor) -> Layout:
        """How this parameter's state is to be stored."""
        wanted = self._option(group, "state_dtype")
        return Layout.of(
            type(self).__name__,
            param,
            self._option(group, "master_weights"),
            _STATE_DTYPES.get(wanted, wanted),
            group.get("amsgrad", False),
        )

    def step_params(
        self,
        chosen: Sequence[tuple[dict[str, Any], list[Tensor]]],
        scale: float | Tensor,
        plan: Plan | None = None,
    ) -> None:
        """Steps parameters that have a gradient, given by group, with `scale` times it; nothing else of a step."""
        groups = [(params, self._hyperparameters(group, scale)) for group, params in chosen]
        try:
            self._op(groups, self.state, plan)
        except KeyError:  # nothing has been written: the step looks all state up first
            added = [self._make_missing_state(group, params) for group, params in chosen]
            if not any(added):
                raise
            self._op(groups, self.state, plan)

    @staticmethod
    def _op(groups: Sequence[Group], state: dict[Tensor, dict[str, Tensor]], plan: Plan | None) -> None:
        """The optimizer's op, such as `superfine_kernels.adamw_groups_`."""
        raise NotImplementedError

    def _make_missing_state(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Gives parameters with a gradient the state, or the anchor, that they lack; returns whether any did."""
        params = [param for param in params if param.grad is not None]
        stateless = [param for param in params if not self.state[param]]
        for param, step in zip(stateless, counts([0.0] * len(stateless), stateless), strict=True):
            self.state[param].update(self._layout(group, param).new(param, step))
        anchorless = [param for param in params if "anchor" not in self.state[param]]
        if not self._option(group, "anchored"):
            anchorless = []
        for param in anchorless:
            self.state[param]["anchor"] = param.detach().clone()
        return bool(stateless or anchorless)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = Plan()
        stepped = [p for p, entries in self.state.items() if isinstance(p, Tensor) and "step" in entries]
        steps = counts([self.state[param]["step"] for param in stepped], stepped)
        for param, step in zip(stepped, steps, strict=True):
            self.state[param]["step"] = step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but what is saved is converted to the layout of state that this optimizer was made for.

        Groups keep how they store things, and the options that the checkpoint's groups do not have.
        Hidden bits begin anew where the checkpoint has none of the kind.

        Raises:
            ValueError: 8-bit moments, or their scales, that another optimizer has converted to another dtype; nothing
                has changed then.
        """
        loaded: dict[str, Any] = {}
        own_groups = self.param_groups

        def look_at(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            check_saved(given["state"].values())
            loaded.update(given)

        hook = self.register_load_state_dict_pre_hook(look_at)  # after all others
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, own in zip(self.param_groups, own_groups, strict=True):
            for name in _LAYOUT_OPTIONS:
                group.pop(name, None)
            group.update({name: own[name] for name in own.keys() - group.keys()})
        saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for saved_id, (group, param) in zip(saved_ids, params, strict=True):
            state = self.state.get(param)
            if state:  # from what was saved: torch has rounded it to the parameter's dtype
                state.update(self._layout(group, param).convert(param, loaded["state"][saved_id], state))


_STATE_DTYPES: dict[object, torch.dtype | None] = {
    None: None,
    torch.float32: torch.float32, "fp32": torch.float32,
    torch.bfloat16: torch.bfloat16, "bf16": torch.bfloat16,
    torch.uint8: torch.uint8, "8bit": torch.uint8,
}  # fmt: skip

_LAYOUT_OPTIONS = ("master_weights", "stochastic_rounding", "state_dtype")

#: What copies and pickles take along.
_ATTRIBUTES = (*InPassOptions.__annotations__, "_norm", "_skipped", "_skipped_on_gpu")
