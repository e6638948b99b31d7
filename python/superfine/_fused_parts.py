"""The forwards that `fused_modules` gives to modules. What an op does not take goes through the module's own."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import superfine_kernels as kernels
from superfine._recompute import origin, recomputed, remember
from superfine._swap import Part, unmixed

__all__ = [
    "PARTS",
    "SETTINGS",
    "Activation",
    "FusedActivation",
    "FusedLoraLinear",
    "FusedMlp",
    "FusedNorm",
    "FusedResidualNorm",
    "Mlp",
    "Norm",
    "ResidualNorm",
    "draws_numbers",
    "mlp_forward",
    "norm_forward",
    "why_no_lora_node",
]

#: The attribute of a module that says what its part computes.
SETTINGS = "_superfine_fused"


def _hooked(module: Any) -> bool:
    """Whether hooks wait for a call of the module, which fusing it into another's would leave out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _autocasts(input: Tensor) -> bool:
    return torch.is_autocast_enabled(input.device.type)


# --- norms ----------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """A norm over the last dimension."""

    rms: bool
    eps: str | None  # the module's attribute; None for float32's, or the input's, own
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    mixed: bool = False  # also where the weight is float32 and the input is not
    double: bool = True  # whether the module computes in float64 on such inputs; many compute in float32
    recompute: bool = False


def norm_forward(settings: Norm, eps: float | None, input: Tensor, weight: Any, bias: Any) -> Tensor:
    """The norm as a function of tensors alone."""
    output: Tensor
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    if not settings.rms:
        output = kernels.layer_norm(input, weight, bias, eps)
        return output
    output = kernels.rms_norm(
        input,
        weight,
        eps,
        weight_offset=settings.weight_offset,
        cast_before_weight=settings.cast_before_weight,
    )
    return output


class FusedNorm(Part):
    """A norm by `layer_norm` or `rms_norm`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        settings: Norm = getattr(module, SETTINGS)
        input = (*args, *kwargs.values())[0]
        if len(args) + len(kwargs) != 1 or not _takes(settings, input, module.weight):
            return super().forward(*args, **kwargs)
        eps = None if settings.eps is None else getattr(module, settings.eps)
        function, tensors = (
            partial(norm_forward, settings, eps),
            (input, module.weight, getattr(module, "bias", None)),
        )
        output = function(*tensors)
        if settings.recompute:
            remember(output, function, tensors)
        return output


def _takes(settings: Norm, input: Any, weight: Tensor | None) -> bool:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return False
    if _autocasts(input) and input.dtype != torch.float32:
        return False  # torch's may give float32 there
    if input.dtype == torch.float64 and not settings.double:
        return False
    if weight is None or weight.dtype == input.dtype:
        return True
    return settings.mixed and weight.dtype == torch.float32 and input.dtype != torch.float64


class ResidualNorm(NamedTuple):
    """`LayerNorm(dropout(dense(hidden_states)) + input_tensor)`, as in BERT."""

    recompute: bool = False


class FusedResidualNorm(Part):
    """Sum and norm in one op."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        norm = module.LayerNorm
        if len(args) != 2 or kwargs or _hooked(norm):
            return super().forward(*args, **kwargs)
        hidden, residual = module.dropout(module.dense(args[0])), args[1]
        dtypes = {hidden.dtype, residual.dtype, *(p.dtype for p in (norm.weight, norm.bias) if p is not None)}
        if hidden.shape != residual.shape or len(dtypes) > 1:
            return norm(hidden + residual)
        if _autocasts(hidden) and hidden.dtype != torch.float32:
            return norm(hidden + residual)
        output, total = kernels.layer_norm(hidden, norm.weight, norm.bias, norm.eps, residual=residual)
        if getattr(self, SETTINGS).recompute:
            function = partial(norm_forward, Norm(rms=False, eps="eps"), norm.eps)
            remember(output, function, (total, norm.weight, norm.bias))
        return output


# --- activations and MLPs -------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """silu, or gelu by the error function ("none") or by the hyperbolic tangent ("tanh")."""

    name: str
    approximate: str = "none"


class FusedActivation(Part):
    """GELU by `gelu`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        input = (*args, *kwargs.values())[0]
        if len(args) + len(kwargs) != 1 or not isinstance(input, Tensor) or not input.is_floating_point():
            return super().forward(*args, **kwargs)
        return kernels.gelu(input, getattr(self, SETTINGS).approximate)


class Mlp(NamedTuple):
    """The names of an MLP's submodules: `last(act(first(x)))`, or `last(act(first(x)) * second(x))`.

    With `halves` one product gives both factors: `last(act(gate) * up)`, where `gate, up = first(x).chunk(2, -1)`.
    """

    first: str
    second: str | None
    act: str
    last: str | None
    dropout: str | None = None
    dropout_before_last: bool = False
    halves: bool = False
    activation: Activation | None = None  # of a gated MLP, where one op computes it with the product
    recompute: bool = False

    @property
    def gated(self) -> bool:
        return self.halves or self.second is not None


def draws_numbers(module: nn.Module) -> bool:
    """Whether a forward draws random numbers, so that it could not be run again."""
    return type(module) is not nn.Linear and any(
        isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in module.modules()
    )


def _hidden(module: Any, mlp: Mlp, input: Tensor) -> Tensor:
    """What lies between the first and the last product."""
    first: Tensor = module._modules[mlp.first](input)
    if mlp.halves:
        first, second = first.chunk(2, dim=-1)
    elif mlp.second is None:
        output: Tensor = module._modules[mlp.act](first)
        return output
    else:
        second = module._modules[mlp.second](input)
    if mlp.activation is None or first.dtype != second.dtype:
        output = module._modules[mlp.act](first) * second
    elif mlp.activation.name == "silu":
        output = kernels.swiglu(first, second)
    else:
        output = kernels.geglu(first, second, approximate=mlp.activation.approximate)
    return output


def mlp_forward(module: Any, mlp: Mlp, input: Tensor) -> Tensor:
    """The MLP; with `recompute` only its input is saved for what lies before the last product."""
    parts = [module._modules[name] for name in (mlp.first, mlp.second, mlp.act) if name is not None]
    if mlp.recompute and not any(map(draws_numbers, parts)):
        parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        hidden = recomputed(partial(_hidden, module, mlp), input, parameters)
    else:
        hidden = _hidden(module, mlp, input)
    dropout = None if mlp.dropout is None else module._modules[mlp.dropout]
    if dropout is not None and mlp.dropout_before_last:
        hidden = _dropped(dropout, hidden)
    if mlp.last is not None:
        last = module._modules[mlp.last]
        if mlp.dropout_before_last and hidden.dtype != last.weight.dtype:  # T5 keeps this matrix in float32
            hidden = hidden.to(last.weight.dtype)
        hidden = last(hidden)
    return hidden if dropout is None or mlp.dropout_before_last else dropout(hidden)


def _dropped(dropout: nn.Module, hidden: Tensor) -> Tensor:
    """Without a call where nothing is dropped: its output would be another tensor, of unknown origin."""
    if isinstance(dropout, nn.Dropout) and not _hooked(dropout) and not (dropout.training and dropout.p > 0):
        return hidden
    output: Tensor = dropout(hidden)
    return output


class FusedMlp(Part):
    """An MLP by `mlp_forward`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mlp: Mlp = getattr(self, SETTINGS)
        if len(args) + len(kwargs) != 1 or _hooked(self._modules[mlp.act]):
            return super().forward(*args, **kwargs)
        return mlp_forward(self, mlp, (*args, *kwargs.values())[0])


# --- LoRA -----------------------------------------------------------------------------------------------------

_TENSORS = (Tensor, nn.Parameter)


def why_no_lora_node(module: Any) -> str | None:
    """Why a PEFT LoRA linear in its present state is not one node; None where it is."""
    if module.disable_adapters or module.merged:
        return "its adapter is disabled or merged"
    if len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return "it has not exactly one active adapter"
    name, base = module.active_adapters[0], module.base_layer
    if name in getattr(module, "lora_variant", ()):
        return "its adapter is a variant, such as DoRA"
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
        return "its adapter is not two matrices without bias"
    if type(base) is not nn.Linear and (type(base).__name__ != "Conv1D" or type(base) is not unmixed(base)):
        parts = "" if type(base) is unmixed(base) else " with another forward"  # rows or columns that train
        return f"its base layer is {type(base).__name__}{parts}"
    if not isinstance(dropout, (nn.Dropout, nn.Identity)):
        return f"its dropout is {type(dropout).__name__}"
    if any(type(t) not in _TENSORS for t in (base.weight, a.weight, b.weight)):
        return "its parameters are not plain tensors"
    if _hooked(base) or _hooked(a) or _hooked(b):
        return "hooks wait for a call of its parts"
    return None


class FusedLoraLinear(Part):
    """PEFT's layer by `lora_linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or why_no_lora_node(self) is not None or not self._takes(x):
            return super().forward(x, *args, **kwargs)
        layer: Any = self
        name, base = layer.active_adapters[0], layer.base_layer
        dropout, mask, p = layer.lora_dropout[name], None, 0.0
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            if dropout.p == 1:
                return super().forward(x)
            p = dropout.p
            mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
        return kernels.lora_linear(
            x,
            base.weight.t() if type(base).__name__ == "Conv1D" else base.weight,
            base.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            dropout_mask=mask,
            dropout_p=p,
            input_from=origin(x),
        )

    def _takes(self, x: Tensor) -> bool:
        """Whether the op computes in the dtypes that PEFT would."""
        layer: Any = self
        base, adapter = layer.base_layer, layer.lora_A[layer.active_adapters[0]].weight.dtype
        if not x.is_floating_point():
            return False
        if _autocasts(x):
            return x.dtype != torch.float64
        if base.weight.dtype != x.dtype or (base.bias is not None and base.bias.dtype != x.dtype):
            return False
        wider = torch.promote_types(adapter, x.dtype) == adapter
        return adapter == x.dtype or (wider and getattr(layer, "cast_input_dtype_enabled", True))


PARTS: tuple[type[Part], ...] = (FusedNorm, FusedResidualNorm, FusedActivation, FusedMlp, FusedLoraLinear)
