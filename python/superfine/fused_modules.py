"""Modules of a model replaced by ops that save less for backward, and LoRA linears by one node.

    report = superfine.fused_modules.install(model)        # norms, activations, gated MLPs, residual norms, LoRA
    report = superfine.fused_modules.install(model, recompute=True)
    superfine.fused_modules.remove(model)

Weights, names, `state_dict`, hooks and `isinstance` stay: classes are extended (`_swap.Part`), nothing is patched.
A module is replaced where its class computes what the op computes, which is not believed but tried: a copy of it with
small random weights runs on a few numbers, and its result is compared with the op's.

With `recompute` an MLP whose matrices are frozen keeps only its input, and what follows from a norm keeps the norm's
input, which is kept already: one or two products more for a half to a third of the memory. See `_recompute`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from superfine._fused_parts import (
    PARTS,
    SETTINGS,
    FusedActivation,
    FusedLoraLinear,
    FusedMlp,
    FusedNorm,
    FusedResidualNorm,
    ResidualNorm,
    why_no_lora_node,
)
from superfine._fused_probe import activation_of, by_torch, mlp_of, norm_of, residual_norm_of
from superfine._swap import Part, add_part, remove_part, unmixed
from superfine.select import Plan, uncompiled

__all__ = ["Report", "install", "remove"]


@dataclass(frozen=True)
class Report:
    """What `install` did: modules by path, with what they became, and those left as they are, with the reason."""

    changed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for what in self.changed.values():
            counts[what] = counts.get(what, 0) + 1
        lines = [f"{count} x {what}" for what, count in counts.items()] or ["nothing was fused"]
        reasons: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"left: {paths[0]}{more}: {reason}")
        return "\n".join(lines)


def install(model: nn.Module, plan: Plan | None = None, *, recompute: bool = False) -> Report:
    """Replace modules of `model` by ops that save less, in place; `remove` gives the old ones back.

    - LayerNorm, RMSNorm, and the RMS norms of Hugging Face models: `superfine_kernels.layer_norm`, `rms_norm`;
    - a dense layer whose output is added to its residual and normalised, as in BERT: one op for sum and norm;
    - GELU by the hyperbolic tangent, and what computes it operation by operation: `superfine_kernels.gelu`;
    - gated MLPs (Llama, Mistral, Qwen, Gemma, Phi-3, T5 1.1): `swiglu` or `geglu` between their products;
    - PEFT's LoRA linears: `superfine_kernels.lora_linear`.

    Args:
        model: any module; parameters may be frozen or not, before or afterwards.
        plan: of `superfine.select`; only checked to be of this model.
        recompute: MLPs whose matrices are frozen (their biases and LoRA may train) keep nothing between their input
            and their last product, and where the input follows from a norm, only the norm's own input. Not under
            `torch.compile`, which chooses itself, nor in a call where dropout draws inside.

    Returns:
        What was changed, and what was not though it looks alike, with the reason. At run time an input that an op
        does not take (another dtype, integer) goes through the module's own forward.

    Raises:
        TypeError: `model` is not a module, or `plan` not a plan.
        ValueError: the plan is of another model, or the model has fused modules already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"install: model is {type(model).__name__}; expected a torch.nn.Module")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"install: plan is {type(plan).__name__}; expected a superfine.Plan or None")
    model = uncompiled(model)
    if plan is not None and plan.model is not model:
        raise ValueError("install: plan is of another model; expected one that select made of this model")
    fused = next((path for path, module in model.named_modules() if SETTINGS in vars(module)), None)
    if fused is not None:
        raise ValueError(f"install: {fused!r} is fused already; expected a model without (remove first)")
    report, changes = Report(), []
    tried: dict[Any, Any] = {}
    for path, module in model.named_modules():
        found = _change(module, recompute, tried)
        if isinstance(found, str):
            report.skipped[path] = found
        elif found is not None:
            changes.append((module, found))
            report.changed[path] = found.what
    try:
        for module, change in changes:
            add_part(module, change.part)
            setattr(module, SETTINGS, change.settings)
    except BaseException:
        remove(model)
        raise
    return report


def remove(model: nn.Module) -> None:
    """Take back what `install` did: classes and attributes are what they were. Does nothing to other modules."""
    for module in uncompiled(model).modules():
        if SETTINGS in vars(module):
            for part in PARTS:
                remove_part(module, part)
            delattr(module, SETTINGS)


class _Change(NamedTuple):
    part: type[Part]
    settings: Any
    what: str


def _change(module: nn.Module, recompute: bool, tried: dict[Any, Any]) -> _Change | str | None:
    """What to make of the module; why it stays, where it looks like something; None for any other."""
    original: Any = unmixed(module)
    if (original.__module__, original.__name__) == ("peft.tuners.lora.layer", "Linear"):
        if "forward" in vars(module):
            return "its forward was replaced on the module itself"
        return why_no_lora_node(module) or _Change(FusedLoraLinear, None, "LoRA linear as one node")
    norm = _once(tried, module, norm_of)
    if isinstance(norm, str):
        return norm
    if norm is not None:
        what = "rms_norm" if norm.rms else "layer_norm"
        return _Change(FusedNorm, norm._replace(recompute=recompute), what)
    residual = _once(tried, module, residual_norm_of)
    if residual is not None:
        if isinstance(residual, str):
            return residual
        return _Change(FusedResidualNorm, ResidualNorm(recompute), "layer_norm with residual")
    activation = _once(tried, module, activation_of)
    if activation is not None:
        if activation.name == "silu":
            return None
        if by_torch(module, activation):
            return "torch's own gelu keeps no more than its input either, and is not slower"
        return _Change(FusedActivation, activation, "gelu")
    return _mlp_change(module, recompute, tried)


def _mlp_change(module: nn.Module, recompute: bool, tried: dict[Any, Any]) -> _Change | str | None:
    mlp = _once(tried, module, mlp_of)
    if mlp is None or (not recompute and isinstance(mlp, str) and "gated" not in mlp):
        return None if mlp is None else mlp
    if isinstance(mlp, str):
        return mlp
    trains = next((name for name in (mlp.first, mlp.second) if name and _matrix_trains(module, name)), None)
    mlp = mlp._replace(recompute=recompute and trains is None)
    what = {None: "", "silu": "swiglu", "gelu": "geglu"}[mlp.activation and mlp.activation.name]
    if mlp.recompute:
        return _Change(FusedMlp, mlp, f"{what or 'MLP'}, recomputed")
    if what:
        return _Change(FusedMlp, mlp, what)
    return f"not recomputed: {trains}.weight trains" if recompute else None


def _matrix_trains(module: nn.Module, name: str) -> bool:
    layer: Any = module._modules[name]
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return bool(base.weight.requires_grad)


def _once(tried: dict[Any, Any], module: nn.Module, find: Any) -> Any:
    """`find(module)`, tried once for modules that differ in nothing that it looks at."""
    tensors = tuple((k, None if p is None else p.shape) for k, p in module._parameters.items())
    children = tuple((k, None if m is None else _looks(m)) for k, m in module._modules.items())
    key = (find, _looks(module), tensors, children)
    if key not in tried:
        tried[key] = find(module)
    return tried[key]


def _looks(module: nn.Module) -> tuple[Any, ...]:
    """What a module's forward depends on beside its tensors: an activation's `approximate`, a norm's eps."""
    plain = (bool, int, float, str, type(None), tuple)
    settings = tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k != "training")
    return unmixed(module), "forward" in vars(module), settings
