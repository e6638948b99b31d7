"""AdamW and Adam as drop-ins for torch's: same arguments, same state, one kernel call a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from typing_extensions import Unpack

from superfine.optim._in_pass import InPass, InPassOptions
from superfine.optim._profile import profiled_on_demand
from superfine_kernels import adamw_groups_
from superfine_kernels._library import warn_once


class _Adam(InPass, torch.optim.Adam):  # type: ignore[override]
    """The step of both; a group's `decoupled_weight_decay` tells them apart, as in torch."""

    _op = staticmethod(adamw_groups_)

    @profiled_on_demand
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; returns what `closure`, if given, returned."""
        # torch's own check that nobody captures a step whose scalars would be frozen into the graph.
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if check := getattr(self, name, None):
                check()
                break
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable = [group for group in self.param_groups if group["differentiable"]]
        for group in differentiable:
            self._reject_in_pass(group)
        scale = self._gradient_scale()
        if scale is None:
            return loss
        if differentiable:
            warn_once(
                f"{type(self).__name__}: differentiable=True has no kernel; torch's implementation steps such groups"
            )
        ours = [group for group in self.param_groups if not group["differentiable"]]
        self.step_params([(group, group["params"]) for group in ours], scale, self._plan)
        for group in differentiable:
            self._step_group_with_torch(group)
        return loss

    def _reject_in_pass(self, group: dict[str, Any]) -> None:
        names = (
            "max_grad_norm", "zero_grads", "anchored", "decouple_lr", "master_weights", "stochastic_rounding",
            "state_dtype",
        )  # fmt: skip
        used = [name for name in names if self._option(group, name)]
        used += ["clip_grad_norm_()"] * (self._measured is not None)
        if used:
            raise ValueError(
                f"{type(self).__name__}: differentiable is True beside {', '.join(used)}; expected one or the other"
            )

    def _hyperparameters(self, group: dict[str, Any], scale: float | Tensor) -> dict[str, Any]:
        own = {"decoupled": group["decoupled_weight_decay"], "amsgrad": group["amsgrad"]}
        return super()._hyperparameters(group, scale) | own

    def _step_group_with_torch(self, group: dict[str, Any]) -> None:
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        beta1, beta2 = group["betas"]
        with torch.enable_grad():
            has_complex = self._init_group(group, *lists)
            adam(
                params=lists[0],
                grads=lists[1],
                exp_avgs=lists[2],
                exp_avg_sqs=lists[3],
                max_exp_avg_sqs=lists[4],
                state_steps=lists[5],
                amsgrad=group["amsgrad"],
                has_complex=has_complex,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=True,
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )


class AdamW(_Adam, torch.optim.AdamW):  # type: ignore[override]
    """AdamW (Loshchilov & Hutter 2019), equal to `torch.optim.AdamW`, which it subclasses.

    State and parameter groups have torch's names and meaning, so checkpoints load in both directions. On float32
    CPU parameters the bits are those of torch's fused implementation, except for its scalar tail of a few
    elements a tensor; lower precision is computed in float32 and rounded once per store, as there.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`.
        capturable: as in torch, for steps within a CUDA graph; ours are the same with it and without.
        differentiable: such groups are stepped by torch's own implementation, with one warning.
        foreach, fused: accepted so that existing calls work; they choose among torch's implementations only.
        max_grad_norm: clip the norm of all gradients, over all groups, to this, as `clip_grad_norm_` would.
        zero_grads: step() leaves zeros in the gradients, as `zero_grad(set_to_none=False)` would.
        anchored: weight decay pulls toward the values that a parameter had at its first step, not toward zero.
        decouple_lr: weight decay is multiplied by lr / first lr instead of lr, so by the schedule alone.
        master_weights: "split" or "kahan": what keeps the rounding of 16-bit parameters.
        stochastic_rounding: round bfloat16 parameters at random.
        state_dtype: of the moments: torch.float32, torch.bfloat16, or torch.uint8 for 8-bit blockwise ones.
        error_on_nonfinite: raise where a gradient is not finite.
        seed: of what is rounded at random.

    Those after `fused` are explained at `superfine.optim._in_pass.InPass`.

    Raises:
        ValueError: arguments out of range, as torch; a gradient of another dtype, device or shape; parameters
            that overlap in memory. Where all of them lie on the CPU, none has moved then.
        FloatingPointError: a gradient is not finite, with `error_on_nonfinite`; nothing has moved then.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[InPassOptions],
    ) -> None:
        self._configure(**options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
        )


class Adam(_Adam):
    """Adam (Kingma & Ba 2015), equal to `torch.optim.Adam`: weight decay is part of the gradient.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in `torch.optim.Adam`.
        options: and all else as in `superfine.optim.AdamW`.

    Raises:
        ValueError, FloatingPointError: as `superfine.optim.AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[InPassOptions],
    ) -> None:
        self._configure(**options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            decoupled_weight_decay=decoupled_weight_decay,
        )
