"""Against forgetting: the diagonal Fisher information of a selection, and elastic weight consolidation with it.

    importance = fisher(plan, batches, loss_fn)          # on data of what is to be remembered, before training
    ewc = EWC(plan, importance, strength=100.0)
    optimizer = plan.optimizer("adamw", lr=2e-5, max_grad_norm=1.0)
    ewc.attach(optimizer)                                # each step now pulls what mattered toward where it was

The penalty is strength / 2 * sum_i F_i (p_i - p0_i)^2 (Kirkpatrick et al. 2017, eq. 3); its gradient,
strength * F_i (p_i - p0_i), is added to `.grad` when a step begins, so that no graph is built for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from superfine._files import atomic_write
from superfine.select import Plan

__all__ = ["EWC", "fisher", "load_fisher", "save_fisher"]

_FORMAT = "superfine-fisher"


def fisher(
    plan: Plan,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of what `plan` trains: the mean of squared gradients.

    `loss_fn(model, batch)` returns negative log-likelihoods under the labels that the data have (which makes it the
    empirical Fisher, not the true one, whose labels the model draws). A vector, one number a sample, gives the Fisher
    of samples: one backward for each. A scalar, the mean over a batch, gives that of batches: one backward for a
    batch, and values smaller by up to the size of a batch, as the gradients of its samples cancel.

    The model runs in eval mode, without dropout; modes, gradients and flags are as before afterwards.

    Args:
        batches: anything that `loss_fn` understands.
        progress: a progress bar on stderr; None for on a terminal only.

    Returns:
        float32 tensors (float64 for float64 parameters) by name, on the parameters' devices.

    Raises:
        ValueError: no batch; a loss of more than one dimension or that is not finite; one that does not depend on
            what the plan trains.
    """
    named = dict(plan.named_parameters())
    parameters = list(named.values())
    sums = [torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for p in parameters]
    reached = [False] * len(parameters)
    terms = 0
    with _eval(plan.model), torch.enable_grad():
        for batch in _tracked(batches, progress):
            loss = loss_fn(plan.model, batch)
            if not isinstance(loss, Tensor) or loss.ndim > 1 or not loss.numel():
                what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"fisher: loss_fn returned {what}; expected a scalar, or a number a sample")
            if not loss.requires_grad or not bool(loss.isfinite().all()):
                raise ValueError(
                    f"fisher: the loss is {loss.detach().flatten()[0].item()}, requires_grad {loss.requires_grad}; "
                    "expected finite ones that depend on what the plan trains"
                )
            for i in range(loss.numel()):
                again = i + 1 < loss.numel()
                grads = torch.autograd.grad(
                    loss.reshape(-1)[i], parameters, retain_graph=again, allow_unused=True
                )
                terms += 1
                for k, grad in enumerate(grads):
                    if grad is not None:
                        reached[k] = True
                        wide = grad.detach().to_dense() if grad.is_sparse else grad.detach()
                        wide = wide.to(sums[k].dtype)
                        sums[k].addcmul_(wide, wide)
    if not terms:
        raise ValueError("fisher: batches is empty; expected at least one batch")
    missed = [name for name, found in zip(named, reached, strict=True) if not found]
    if missed:
        raise ValueError(
            f"fisher: the loss does not depend on {missed[0]!r} (and {len(missed) - 1} others); expected one that "
            "depends on every selected parameter"
        )
    return {name: total.div_(terms) for name, total in zip(named, sums, strict=True)}


def save_fisher(values: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write what `fisher` returned to one safetensors file, which appears whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in values.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": _FORMAT})


def load_fisher(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read such a file, on the CPU. Raises `FileNotFoundError`, or `ValueError` for another or a damaged file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_fisher: path is {path}; expected a file by save_fisher")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(
                    f"load_fisher: path is {path}, a file of another kind; expected one by save_fisher"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"load_fisher: path is {path}, truncated or no safetensors file ({error}); expected one by save_fisher"
        ) from error


class EWC:
    """Elastic weight consolidation: pulls what `plan` trains toward the values that it has now.

    Order within a step of an attached optimizer: `.grad` as backward left it (times the scale of a `GradScaler`,
    which the pull is multiplied by, too), plus the pull, then `max_grad_norm` of the sum, then the update. Clipping
    that you do before `step()` sees gradients without the pull, so let the optimizer clip. Afterwards `.grad` holds
    the sum: zero it before the next backward, as ever.

    Args:
        plan: what trains.
        fisher: importance by name, as `fisher` returns it: for every parameter of the plan, in its shape, >= 0.
        strength: of the penalty, called lambda in the paper.

    Raises:
        ValueError: `fisher` lacks a parameter or has another shape, or values that are negative or not finite;
            `strength` is not positive and finite.
    """

    def __init__(self, plan: Plan, fisher: Mapping[str, Tensor], strength: float) -> None:
        self.plan = plan
        self.strength = _checked_strength(strength)
        named = dict(plan.named_parameters())
        self.fisher = {name: _checked(name, p, fisher.get(name)) for name, p in named.items()}
        self.start = {name: p.detach().clone() for name, p in named.items()}

    def penalty(self) -> Tensor:
        """strength / 2 * sum F (p - p0)^2, a scalar with a graph: to log or add to a loss in place of `attach`."""
        total: Tensor | None = None
        for name, p in self.plan.named_parameters():
            wide = self.fisher[name].dtype
            moved = p.to(wide) - self.start[name].to(wide)
            term = (self.fisher[name] * moved * moved).sum() * (0.5 * self.strength)
            total = term if total is None else total + term.to(total.device)
        if total is None:
            raise ValueError("EWC: the plan trains nothing; expected a selection")
        return total

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Lets every step of `optimizer` begin with the pull; returns what takes it back, by `.remove()`.

        A step without a gradient for a parameter leaves that one alone, as the optimizer does.
        """
        return optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def add_to_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Adds scale * strength * F (p - p0) to `.grad` of each parameter that has one."""
        plain: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
        for name, p in self.plan.named_parameters():
            if p.grad is None:
                continue
            if p.grad.dtype == p.dtype == self.fisher[name].dtype and not p.grad.is_sparse:
                for values, value in zip(
                    plain, (p, self.start[name], self.fisher[name], p.grad), strict=True
                ):
                    values.append(value)
                continue
            wide = self.fisher[name].dtype  # of 16-bit parameters: their differences would lose what matters
            pull = (p.to(wide) - self.start[name].to(wide)) * self.fisher[name]
            pull *= self.strength * _on(scale, p.device)
            if p.grad.is_sparse:
                raise ValueError(f"EWC: the gradient of {name!r} is sparse; expected a dense one")
            p.grad.copy_(p.grad.to(wide) + pull)
        if plain[0]:
            pulls = torch._foreach_sub(plain[0], plain[1])
            torch._foreach_mul_(pulls, plain[2])
            if isinstance(scale, Tensor):  # stays on its device, so that nothing waits for it
                torch._foreach_mul_(pulls, _on(scale, pulls[0].device).to(torch.float32))
                torch._foreach_add_(plain[3], pulls, alpha=self.strength)
            else:
                torch._foreach_add_(plain[3], pulls, alpha=self.strength * scale)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: where the pull goes, and how strong it is."""
        return {"start": dict(self.start), "fisher": dict(self.fisher), "strength": self.strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with what `state_dict` returned; `ValueError` where it belongs to another plan."""
        named = dict(self.plan.named_parameters())
        strength = _checked_strength(state["strength"])
        importance = {name: _checked(name, p, state["fisher"].get(name)) for name, p in named.items()}
        start = {}
        for name, p in named.items():
            value = state["start"].get(name)
            if value is None or value.shape != p.shape:
                raise ValueError(f"EWC: the state has no values of {name!r}; expected that of the same plan")
            start[name] = value.to(device=p.device, dtype=p.dtype, copy=True)
        self.fisher, self.start, self.strength = importance, start, strength

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        given = [value for value in args if not isinstance(value, torch.optim.Optimizer)]
        if any(value is not None for value in (*given, kwargs.get("closure"))):
            raise RuntimeError(
                "EWC: step() has a closure, which would make the gradients anew; expected none"
            )
        if getattr(optimizer, "_release", None) is not None:
            raise RuntimeError(
                "EWC: gradients are released in backward; expected an optimizer whose step sees all of them"
            )
        if getattr(optimizer, "_measured", None) is not None:
            raise RuntimeError(
                "EWC: clip_grad_norm_() has measured gradients without the pull; expected max_grad_norm instead"
            )
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not found_inf.is_cuda and bool(found_inf):
            return  # the step will be skipped
        scale = getattr(optimizer, "grad_scale", None)  # set where the step unscales by itself
        self.add_to_gradients(1.0 if scale is None else scale)


def _checked_strength(strength: float) -> float:
    if not 0 < strength < float("inf"):
        raise ValueError(f"EWC: strength is {strength}; expected a finite number > 0")
    return float(strength)


def _checked(name: str, parameter: Tensor, value: Tensor | None) -> Tensor:
    if value is None or value.shape != parameter.shape:
        found = "missing" if value is None else f"of shape {tuple(value.shape)}"
        raise ValueError(
            f"EWC: fisher[{name!r}] is {found}; expected one of shape {tuple(parameter.shape)}, from the same plan"
        )
    if not bool((value >= 0).all()) or not bool(value.isfinite().all()):
        raise ValueError(
            f"EWC: fisher[{name!r}] has values below 0 or not finite; expected squared gradients"
        )
    return value.detach().to(device=parameter.device, dtype=_wide(parameter), copy=True)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _on(scale: float | Tensor, device: torch.device) -> Any:
    return scale.to(device) if isinstance(scale, Tensor) else scale


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tracked(batches: Iterable[Any], progress: bool | None) -> Iterator[Any]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, "fisher", total=total, console=Console(stderr=True), transient=True)
