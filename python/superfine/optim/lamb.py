"""LAMB for large batches: `torch.optim` conventions, one kernel call a step and group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from superfine.optim._profile import profiled_on_demand
from superfine_kernels import lamb_
from superfine_kernels._library import reject
from superfine_kernels._moments import state_lists_by_device


class LAMB(torch.optim.Optimizer):
    """LAMB (You et al. 2020, Algorithm 2): AdamW's update, scaled for each tensor by |parameter| / |update|.

    A group with `weight_decay` 0 is not adapted, as in NVLAMB: its updates are Adam's. `group["adapt"]`, True or
    False, decides for one group, for instance to exclude norms and biases. State has the names `exp_avg`,
    `exp_avg_sq` and `step`, as AdamW's.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in AdamW.
        bias_correction: divide the moments by 1 - beta^t.
        grad_averaging: weigh the gradient by 1 - beta1 in the first moment, else by 1.
        trust_clip: the factor |parameter| / |update| is at most 1.
        always_adapt: adapt groups without weight decay too.
        max_grad_norm: clip the norm of all gradients, over all groups, to this. `.grad` is not overwritten; a norm
            that is not finite scales as `torch.nn.utils.clip_grad_norm_` does: infinity turns finite gradients to
            zeros and infinite ones to NaN, NaN turns all of them to NaN. On a GPU every step then waits for the norm.
        maximize: ascend instead.

    Attributes:
        grad_norm: norm of all gradients at the last step, before clipping; None without `max_grad_norm`.

    Raises:
        ValueError: arguments out of range; a gradient of another dtype, device or shape; parameters that overlap in
            memory. No parameter of that group has moved then.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                reject("LAMB", name, value, "a number >= 0")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                reject("LAMB", f"betas[{i}]", beta, "a number in [0, 1)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            reject("LAMB", "max_grad_norm", max_grad_norm, "a number > 0, or None")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "adapt": None,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "max_grad_norm": self.max_grad_norm,
            "grad_norm": self.grad_norm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for saved in self.state.values():
            if "step" in saved:  # a number in other libraries' checkpoints; a map_location may have moved it
                saved["step"] = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu")

    @profiled_on_demand
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradient_scale = self._clipping_scale()
        for group in self.param_groups:
            self._make_missing_state(group["params"])
            for lists in state_lists_by_device(
                group["params"], self.state, ("exp_avg", "exp_avg_sq", "step")
            ):
                lamb_(*lists, **_hyperparameters(group), gradient_scale=gradient_scale)
        return loss

    def _make_missing_state(self, params: list[Tensor]) -> None:
        for param in params:
            if param.grad is not None and not self.state[param]:
                self.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                    "exp_avg": torch.zeros_like(param, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
                }

    def _clipping_scale(self) -> float:
        """The factor of the gradients that `torch.nn.utils.clip_grad_norm_` would apply; sets `grad_norm`."""
        if self.max_grad_norm is None:
            return 1.0
        params = [param for group in self.param_groups for param in group["params"]]
        self.grad_norm = _total_norm([param.grad for param in params if param.grad is not None])
        scale = self.max_grad_norm / (self.grad_norm + 1e-6)
        return 1.0 if scale > 1.0 else scale


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    adapt = group["adapt"]
    return {
        "lr": float(group["lr"]),
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "bias_correction": group["bias_correction"],
        "grad_averaging": group["grad_averaging"],
        "adapt": group["weight_decay"] != 0 or group["always_adapt"] if adapt is None else adapt,
        "trust_clip": group["trust_clip"],
        "maximize": group["maximize"],
    }


@torch.no_grad()
def _total_norm(grads: list[Tensor]) -> float:
    """Norm of all elements: in float32 over a tensor, whatever lower precision it has, in float64 over tensors."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        by_kind.setdefault((real.device, real.dtype), []).append(real)
    squares = 0.0
    for (_, dtype), tensors in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        each = torch._foreach_norm(tensors, 2, dtype=wide)
        squares += torch.stack(each).double().square().sum().item()
    return math.sqrt(squares)
