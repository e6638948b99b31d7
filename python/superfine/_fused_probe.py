"""Which modules compute what an op computes: found by their looks, and then tried.

What is tried is a shallow copy of the module whose parameters and matrices are small random ones, so it costs no time
and touches neither the module nor anyone's random numbers. Its class's own forward and the op must agree.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from superfine._fused_parts import Activation, Mlp, Norm, norm_forward
from superfine._swap import unmixed

__all__ = ["activation_of", "by_torch", "mlp_of", "norm_of", "residual_norm_of"]

_TANH = {"NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh", "AccurateGELUActivation"}

#: How families name the parts of an MLP.
_MLPS = (
    Mlp("gate_proj", "up_proj", "act_fn", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    Mlp("gate_up_proj", None, "activation_fn", "down_proj", halves=True),  # Phi-3, GLM
    Mlp("wi_0", "wi_1", "act", "wo", "dropout", dropout_before_last=True),  # T5 1.1
    Mlp("wi", None, "act", "wo", "dropout", dropout_before_last=True),  # T5
    Mlp("dense", None, "intermediate_act_fn", None),  # BERT
    Mlp("c_fc", None, "act", "c_proj", "dropout"),  # GPT-2
    Mlp("lin1", None, "activation", "lin2", "dropout"),  # DistilBERT
    Mlp("fc1", None, "activation_fn", "fc2"),  # CLIP
)


def _stub(module: nn.Module, **members: Any) -> Any:
    """A shallow copy with other parameters or submodules."""
    stub = copy.copy(module)
    for kind in ("_parameters", "_modules", "_buffers"):
        stub.__dict__[kind] = dict(getattr(module, kind))
    for name, member in members.items():
        kind = "_modules" if isinstance(member, nn.Module) else "_parameters"
        stub.__dict__[kind][name] = member
    return stub


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device="cpu", dtype=torch.float64)


def _numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, device="cpu", dtype=torch.float64).to(dtype)


class _Trial:
    """Random numbers of its own, no graph, no autocast."""

    def __enter__(self) -> None:
        self.contexts = (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        )
        for context in self.contexts:
            context.__enter__()
        torch.default_generator.manual_seed(0)

    def __exit__(self, *reason: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*reason)


def _why_not(module: nn.Module) -> str | None:
    return "its forward was replaced on the module itself" if "forward" in vars(module) else None


# --- norms ----------------------------------------------------------------------------------------------------


def norm_of(module: Any) -> Norm | str | None:
    """How the module is a norm; why it is not quite one; None where it does not look like one."""
    original: Any = unmixed(module)
    layer_norm, rms_norm = (original.forward is cls.forward for cls in (nn.LayerNorm, nn.RMSNorm))
    looks = layer_norm or rms_norm or original.__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if not looks:
        return None
    if why := _why_not(module):
        return why
    if layer_norm or rms_norm:
        if len(module.normalized_shape) != 1:
            return "it is over more than one dimension"
        return Norm(rms=rms_norm, eps=None if module.eps is None else "eps")
    eps = next(
        (name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)), None
    )
    weight = module._parameters.get("weight")
    if eps is None or weight is None or weight.dim() != 1 or len(module._parameters) > 1 or module._modules:
        return "it is not a weight and a number eps"
    with _Trial():
        return _tried_rms_norm(module, original, eps, weight.numel())


def _tried_rms_norm(module: nn.Module, original: Any, eps: str, size: int) -> Norm | str:
    found: list[tuple[float, Norm]] = []
    for offset in (0.0, 1.0):
        for cast in (True, False):
            norm = Norm(True, eps, offset, cast)
            errors = [_error(module, original, norm, size, d, d) for d in (torch.float32, torch.bfloat16)]
            if errors[0] < 1e-5 and errors[1] < 1e-2:
                mixed = _error(module, original, norm, size, torch.bfloat16, torch.float32) < 1e-2
                double = _error(module, original, norm, size, torch.float64, torch.float64) < 1e-12
                found.append((errors[1], norm._replace(mixed=mixed, double=double)))
    if not found:
        return f"{original.__name__} computes something else than an RMS norm"
    return min(found, key=lambda pair: pair[0])[1]


def _error(
    module: nn.Module, original: Any, norm: Norm, size: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> float:
    """The op's error relative to the module's own forward; infinite where one fails or dtypes differ."""
    stub = _stub(module, weight=nn.Parameter(1 + _numbers(size, dtype=weight_dtype) / 2))
    input = 3 * _numbers(4, size, dtype=dtype)
    try:
        expected = original.forward(stub, input)
        found = norm_forward(norm, getattr(module, norm.eps or ""), input, stub.weight, None)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return float("inf")
    if not isinstance(expected, Tensor) or expected.dtype != found.dtype or expected.shape != found.shape:
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def residual_norm_of(module: Any) -> bool | str | None:
    """Whether the module is `LayerNorm(dropout(dense(x)) + residual)`; why not; None where it does not look so."""
    if set(module._modules) != {"dense", "LayerNorm", "dropout"} or module._parameters:
        return None
    if why := _why_not(module):
        return why
    original: Any = unmixed(module)
    norm: Any = module.LayerNorm
    if getattr(unmixed(norm), "forward", None) is not nn.LayerNorm.forward or len(norm.normalized_shape) != 1:
        return "its norm is not a LayerNorm over one dimension"
    with _Trial():
        scale = nn.LayerNorm(8, eps=norm.eps, device="cpu", dtype=torch.float64)
        stub = _stub(module, dense=_linear(8, 8), LayerNorm=scale, dropout=nn.Dropout(0.0))
        x, residual = _numbers(2, 3, 8), _numbers(2, 3, 8)
        try:
            found = original.forward(stub, x, residual)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"{original.__name__} could not be tried: {error}"
        expected = F.layer_norm(stub.dense(x) + residual, (8,), scale.weight, scale.bias, norm.eps)
        return _agree(found, expected) or f"{original.__name__} computes something else than a residual norm"


def _agree(found: Any, expected: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    )


# --- activations and MLPs -------------------------------------------------------------------------------------


def activation_of(module: nn.Module) -> Activation | None:
    """silu or gelu, as the module computes it."""
    original: Any = unmixed(module)
    if original.__name__ in ("SiLU", "SiLUActivation"):
        found, function = Activation("silu"), F.silu
    elif original.__name__ in ("GELU", "GELUActivation"):
        found = Activation("gelu", getattr(module, "approximate", "none"))
        function = _gelu(found.approximate)
    elif original.__name__ in _TANH:
        found, function = Activation("gelu", "tanh"), _gelu("tanh")
    else:
        return None
    if _why_not(module) or module._parameters or module._buffers:
        return None
    with _Trial():
        x = torch.linspace(-8, 8, 257, device="cpu", dtype=torch.float64)
        return found if _agree(original.forward(module, x), function(x)) else None


def by_torch(module: Any, activation: Activation) -> bool:
    """Whether the module is torch's gelu by the error function, in one operation."""
    composed = unmixed(module).__name__ == "GELUActivation" and module.act is not F.gelu
    return activation == Activation("gelu", "none") and not composed


def _gelu(approximate: str) -> Any:
    return lambda x: F.gelu(x, approximate=approximate)


def mlp_of(module: nn.Module) -> Mlp | str | None:
    """Which MLP the module is; why it is not quite one; None where it does not look like one."""
    names = set(module._modules)
    mlp = next((m for m in _MLPS if {m.first, m.second, m.act, m.last, m.dropout} - {None} == names), None)
    if mlp is None or module._parameters or module._buffers:
        gated = {"gate_proj", "up_proj", "down_proj"} <= names or {"gate_up_proj", "down_proj"} <= names
        return "its parts are not those of a known MLP" if gated else None
    if why := _why_not(module):
        return why
    activation = activation_of(module.get_submodule(mlp.act))
    if mlp.gated and activation is None:
        return f"{type(module.get_submodule(mlp.act)).__name__} has no gated op"
    original: Any = unmixed(module)
    with _Trial():
        last = {} if mlp.last is None else {mlp.last: _linear(12, 8)}
        gate = {} if mlp.second is None else {mlp.second: _linear(8, 12)}
        dropout = {} if mlp.dropout is None else {mlp.dropout: nn.Dropout(0.0)}
        stub = _stub(module, **{mlp.first: _linear(8, 24 if mlp.halves else 12)}, **gate, **last, **dropout)
        x = _numbers(2, 3, 8)
        try:
            found = original.forward(stub, x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            return f"{original.__name__} could not be tried: {error}"
        hidden, up = stub.get_submodule(mlp.first)(x), None
        if mlp.halves:
            hidden, up = hidden.chunk(2, dim=-1)
        elif mlp.second is not None:
            up = stub.get_submodule(mlp.second)(x)
        hidden = stub.get_submodule(mlp.act)(hidden)
        hidden = hidden if up is None else hidden * up
        expected = hidden if mlp.last is None else stub.get_submodule(mlp.last)(hidden)
    if not _agree(found, expected):
        return f"{original.__name__} computes something else than its parts suggest"
    return mlp._replace(activation=activation) if mlp.gated else mlp
