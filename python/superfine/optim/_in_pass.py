"""What an optimizer's step takes along in its one pass: clipping, loss scaling, zeroing, anchors, hidden bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import total_norm
from superfine_kernels._library import reject, warn_once


class InPass(torch.optim.Optimizer):
    """Base of our optimizers. A group may have its own `anchored`, `decouple_lr` and `state_dtype`.

    Attributes:
        grad_norm: norm of all gradients, before clipping, when it was last measured; None before.
        skipped_steps: steps not taken, because gradients were not finite or a `GradScaler` said so.
    """

    max_grad_norm: float | None = None
    zero_grads: bool = False
    anchored: bool = False
    decouple_lr: bool = False
    master_weights: str | None = None
    state_dtype: torch.dtype | None = None
    error_on_nonfinite: bool = False
    grad_norm: float | None = None
    skipped_steps: int = 0
    _measured: tuple[float, float] | None = None  # by clip_grad_norm_: norm and limit

    def _configure(
        self,
        max_grad_norm: float | None,
        zero_grads: bool,
        anchored: bool,
        decouple_lr: bool,
        master_weights: str | None,
        state_dtype: torch.dtype | None,
        error_on_nonfinite: bool,
    ) -> None:
        name = type(self).__name__
        if max_grad_norm is not None and not max_grad_norm > 0:
            reject(name, "max_grad_norm", max_grad_norm, "a number > 0, or None")
        if master_weights not in (None, "split"):
            reject(name, "master_weights", master_weights, "'split' or None")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            reject(name, "state_dtype", state_dtype, "torch.float32, torch.bfloat16 or None")
        self.max_grad_norm = max_grad_norm
        self.zero_grads = zero_grads
        self.anchored = anchored
        self.decouple_lr = decouple_lr
        self.master_weights = master_weights
        self.state_dtype = state_dtype
        self.error_on_nonfinite = error_on_nonfinite

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` sets grad_scale and found_inf around step(), instead of unscaling itself."""
        return not any(group.get("capturable") or group.get("differentiable") for group in self.param_groups)

    # --- gradients ------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Measures the norm of all gradients for the next step, which scales them as it reads them.

        In place of `torch.nn.utils.clip_grad_norm_` over the same parameters; `.grad` itself stays as it is. That
        step clips to `max_norm`, whatever `max_grad_norm` is; `zero_grad()` before it takes the measurement back.

        Returns:
            The norm before clipping, a scalar tensor.

        Raises:
            RuntimeError: it is not finite, with `error_if_nonfinite`.
        """
        if not max_norm > 0:
            reject("clip_grad_norm_", "max_norm", max_norm, "a number > 0")
        self.grad_norm = total_norm(list(self._grads()))
        if error_if_nonfinite and not math.isfinite(self.grad_norm):
            raise RuntimeError(
                f"clip_grad_norm_: the norm of the gradients is {self.grad_norm}; expected finite"
            )
        self._measured = self.grad_norm, max_norm
        return torch.tensor(self.grad_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._measured = None
        super().zero_grad(set_to_none)

    def _gradient_scale(self) -> float | None:
        """The factor of this step's gradients; None for a step that is not to be taken."""
        scaler, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = 1.0 if scaler is None else 1.0 / float(scaler)
        measured, self._measured = self._measured, None
        if self.zero_grads and len(self.param_groups) > 1:
            places = [grad.data_ptr() for grad in self._grads() if grad.numel() > 0]
            if len(set(places)) < len(places):
                raise ValueError(
                    f"{type(self).__name__}: zero_grads is True and parameters of two groups share a gradient; "
                    "expected gradients of their own"
                )
        if found_inf is not None and float(found_inf):
            self._skip()
            return None
        if measured is None and (self.max_grad_norm is not None or self.error_on_nonfinite):
            measured = total_norm(list(self._grads())), self.max_grad_norm or math.inf
        if measured is not None:
            norm, limit = scale * measured[0], measured[1]
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
            scale *= min(1.0, limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        return scale

    @torch.no_grad()
    def _skip(self) -> None:
        self.skipped_steps += 1
        if self.zero_grads:
            torch._foreach_zero_(list(self._grads()))

    def _grads(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param.grad

    def _first_nonfinite(self) -> str:
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                grad = None if param.grad is None else param.grad.to_dense().isfinite()
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

    def _is_split(self, param: Tensor) -> bool:
        return self.master_weights == "split" and param.dtype == torch.bfloat16

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; keeps the first lr where weight decay is measured by it: schedulers change lr from now on."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._option(group, "decouple_lr"):
            group.setdefault("decay_lr", float(group["lr"]))

    def _moments_dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        wanted = self._option(group, "state_dtype") or (
            torch.float32 if self._is_split(param) else param.dtype
        )
        if wanted != param.dtype and (wanted != torch.float32 or param.dtype not in _HALVES):
            reject(type(self).__name__, "state_dtype", wanted, f"None beside {param.dtype} parameters")
        return wanted

    def _make_missing_state(self, group: dict[str, Any], amsgrad: bool = False) -> bool:
        """Gives parameters with a gradient the state, or the anchor, that they lack; returns whether any did."""
        added = False
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            before = len(state)
            if not state:
                dtype = self._moments_dtype(group, param)
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
                    state[name] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
                if self._is_split(param):
                    state["low_bits"] = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
            if self._option(group, "anchored") and "anchor" not in state:
                state["anchor"] = param.detach().clone()
            added |= len(state) > before
        return added

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but hidden bits stay integers, and moments have the dtype that this optimizer was made for."""
        loaded: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(
            lambda _, given: loaded.update(given)
        )  # after all others
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        state_dict = loaded
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for saved_id, (group, param) in zip(saved_ids, params, strict=True):
            saved, state = state_dict["state"].get(saved_id, {}), self.state.get(param)
            if not state:
                continue
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if name in state:  # from what was saved: torch has rounded it to the parameter's dtype
                    dtype = self._moments_dtype(group, param)
                    state[name] = saved[name].to(device=param.device, dtype=dtype, copy=True)
            state.pop("low_bits", None)
            if self._is_split(param):
                low_bits = saved.get("low_bits")
                known = low_bits is not None and low_bits.dtype == torch.int16  # torch's optimizers cast them
                state["low_bits"] = (
                    low_bits.to(device=param.device, copy=True)
                    if known
                    else torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
                )


_HALVES = (torch.bfloat16, torch.float16)

#: What copies and pickles take along.
_ATTRIBUTES = (
    "max_grad_norm", "zero_grads", "anchored", "decouple_lr", "master_weights", "state_dtype", "error_on_nonfinite",
    "grad_norm", "skipped_steps",
)  # fmt: skip
