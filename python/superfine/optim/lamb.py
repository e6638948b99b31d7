"""LAMB for large batches: `torch.optim` conventions, one kernel call a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from superfine.optim._in_pass import InPass, InPassOptions
from superfine.optim._profile import profiled_on_demand
from superfine_kernels import lamb_groups_
from superfine_kernels._library import reject


class LAMB(InPass):
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
        maximize: ascend instead.
        options: max_grad_norm and all others of `superfine.optim.AdamW`.

    Raises:
        ValueError: arguments out of range; a gradient of another dtype, device or shape; parameters that overlap in
            memory. Where all of them lie on the CPU, none has moved then.
    """

    _op = staticmethod(lamb_groups_)

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
        maximize: bool = False,
        **options: Unpack[InPassOptions],
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                reject("LAMB", name, value, "a number >= 0")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                reject("LAMB", f"betas[{i}]", beta, "a number in [0, 1)")
        self._configure(**options)
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

    @profiled_on_demand
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._gradient_scale()
        if scale is None:
            return loss
        self.step_params([(group, group["params"]) for group in self.param_groups], scale, self._plan)
        return loss

    def _hyperparameters(self, group: dict[str, Any], scale: float | Tensor) -> dict[str, Any]:
        adapt = group["adapt"]
        own = {
            "bias_correction": group["bias_correction"],
            "grad_averaging": group["grad_averaging"],
            "adapt": group["weight_decay"] != 0 or group["always_adapt"] if adapt is None else adapt,
            "trust_clip": group["trust_clip"],
        }
        return super()._hyperparameters(group, scale) | own
