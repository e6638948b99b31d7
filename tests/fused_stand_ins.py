"""Eager stand-ins with the signatures of the ops that `fused_modules` calls, saving what the kernels save."""

import torch
from torch.nn import functional as F


class _Saved(torch.autograd.Function):
    """A function that saves its tensors and computes its gradients from them again."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        with torch.enable_grad():
            if not any(g is not None and g.requires_grad for g in grads):
                needed = ctx.needs_input_grad[1:]
                pairs = zip(saved, needed, strict=True)
                saved = [None if t is None else t.detach().requires_grad_(n) for t, n in pairs]
            out = ctx.function(*saved)
        wanted = [t for t in saved if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=torch.is_grad_enabled()))
        return None, *(None if t is None or not t.requires_grad else next(found) for t in saved)


def _op(function, *tensors):
    return _Saved.apply(function, *tensors) if not torch.compiler.is_compiling() else function(*tensors)


def layer_norm(input, weight=None, bias=None, eps=1e-5, *, residual=None, backend=None):
    total = input if residual is None else input + residual
    y = _op(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, eps), total, weight, bias)
    return y if residual is None else (y, total)


def rms_norm(
    input, weight=None, eps=1e-6, *, weight_offset=0.0, cast_before_weight=False, residual=None, backend=None
):
    def function(x, w):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if w is None:
            return y.to(x.dtype)
        if cast_before_weight:
            return w * y.to(x.dtype)
        return (y * (weight_offset + w.to(y.dtype))).to(x.dtype)

    total = input if residual is None else input + residual
    y = _op(function, total, weight)
    return y if residual is None else (y, total)


def gelu(input, approximate="none", *, backend=None):
    return F.gelu(input, approximate=approximate)


def swiglu(gate, up, *, backend=None):
    return _op(lambda g, u: F.silu(g) * u, gate, up)


def geglu(gate, up, approximate="none", *, backend=None):
    return _op(lambda g, u: F.gelu(g, approximate=approximate) * u, gate, up)


def install(monkeypatch):
    import superfine_kernels

    for name in ("layer_norm", "rms_norm", "gelu", "swiglu", "geglu"):
        if not hasattr(superfine_kernels, name):
            monkeypatch.setattr(superfine_kernels, name, globals()[name], raising=False)
