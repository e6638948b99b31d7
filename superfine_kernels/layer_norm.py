"""Layer norm and RMS norm over the last dimension, which compute and keep only what the trained parts need.

For a row x of n elements, weights w and b:

    layer norm   y = (x - mean) rstd w + b    rstd = 1 / sqrt(mean((x - mean)^2) + eps)    Ba et al. 2016
    RMS norm     y = x rstd w                 rstd = 1 / sqrt(mean(x^2) + eps)             Zhang & Sennrich 2019

Statistics are float32 (float64 for float64 inputs). csrc/math/layer_norm.h has the gradient, and how a mean that is
large beside the deviation keeps its digits.

Kept for backward: the input, or its sum with the residual, as it is, so that bfloat16 stays bfloat16; and one float32
number a row, two in a layer norm; the weight is referred to. Nothing of these where only a bias trains, no weight
where the input needs no gradient. What needs no gradient has no pass. Gradients of weights are added up in a tree
that depends on the sizes alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from superfine_kernels._layer_norm_backends import forward, gradients, kernel_for, output_dtype, why_no_kernel
from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    direct,
    is_batched,
    is_plain,
    opmath_dtype,
    reject,
    warn_once,
)

#: Floating-point operations for an element: forward, gradient of the input, gradient of the weights.
FLOPS = {"layer_norm": (8, 10, 4), "rms_norm": (4, 6, 2)}

NAMES = ("layer_norm", "rms_norm")


def cost(
    rows: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    op: str = "layer_norm",
    *,
    residual: bool = False,
    backward: bool = True,
    input_grad: bool = True,
    weight_grad: bool = True,
) -> Cost:
    """Bytes and flops: input (and residual) read, output (and sum) written; backward reads upstream gradients and the
    kept input, and writes the input's gradient if that is needed."""
    elements = rows * size
    forward, dinput, dweight = FLOPS[op]
    streams, flops = 2 + 2 * residual, forward + residual
    if backward and (input_grad or weight_grad):
        streams += 2 + (1 + residual) * input_grad
        flops += dinput * input_grad + dweight * weight_grad
    return Cost(bytes=elements * streams * dtype.itemsize, flops=elements * flops)


def reference(
    op: str,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eager torch in float32 (float64 for float64), any number of derivatives: the output; input or sum."""
    x = input if residual is None else input + residual
    real = opmath_dtype(x.dtype)
    n = x.to(real)
    if op == "layer_norm":
        n = n - n.mean(-1, keepdim=True)
    n = n * torch.rsqrt((n * n).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        n = n.to(x.dtype).to(real)
    if weight is not None:
        n = n * (weight.to(real) + weight_offset if weight_offset else weight.to(real))
    if bias is not None:
        n = n + bias.to(real)
    return n.to(output_dtype(input, weight, cast_before_weight)), x


# --- ops and autograd -------------------------------------------------------------------------------------

LIBRARY.define(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, bool rms, float eps, "
    "float weight_offset, bool cast_before_weight, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor? input, Tensor? weight, Tensor? statistics, bool rms, "
    "float weight_offset, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)"
)


def _dense(*tensors: Tensor | None) -> Any:
    """As the kernels want them; a compiler may have laid them out otherwise."""
    dense = []
    for t in tensors:
        if t is not None:
            t = unwrap_if_dead(t)  # what torch.func has left behind has no memory of its own
            t = t if t.is_contiguous() else t.contiguous()
        dense.append(t)
    return tuple(dense)


@torch.library.impl(LIBRARY, "layer_norm", "CompositeExplicitAutograd")
def _op(input, weight, bias, residual, rms, eps, weight_offset, cast_before_weight, backend):
    input, weight, bias, residual = _dense(input, weight, bias, residual)
    chosen = kernel_for(NAMES[rms], input, backend)
    output, sums, statistics = forward(
        input, weight, bias, residual, rms, eps, weight_offset, cast_before_weight, chosen, True
    )
    return output, input.new_empty(0) if sums is None else sums, statistics


@torch.library.impl(LIBRARY, "layer_norm", "Meta")
def _op_fake(input, weight, bias, residual, rms, eps, weight_offset, cast_before_weight, backend):
    rows = math.prod(input.shape[:-1])  # torch.Size.numel() would fix sizes that a compiler keeps open
    return (
        input.new_empty(input.shape, dtype=output_dtype(input, weight, cast_before_weight)),
        input.new_empty(0 if residual is None else input.shape),
        input.new_empty((2 - rms, rows), dtype=opmath_dtype(input.dtype)),
    )


@torch.library.impl(LIBRARY, "layer_norm_backward", "CompositeExplicitAutograd")
def _op_backward(grad, grad_sum, input, weight, statistics, rms, weight_offset, wanted, backend):
    grad, grad_sum, input, weight, statistics = _dense(grad, grad_sum, input, weight, statistics)
    chosen = kernel_for(NAMES[rms], grad, backend)
    found = gradients(rms, grad, grad_sum, input, weight, statistics, weight_offset, tuple(wanted), chosen)
    return tuple(grad.new_empty(0) if one is None else one for one in found)


@torch.library.impl(LIBRARY, "layer_norm_backward", "Meta")
def _op_backward_fake(grad, grad_sum, input, weight, statistics, rms, weight_offset, wanted, backend):
    like = grad if input is None else input
    of_weights = [
        grad.new_empty(grad.shape[-1] if want else 0, dtype=opmath_dtype(like.dtype)) for want in wanted[1:]
    ]
    return like.new_empty(like.shape if wanted[0] else 0), *of_weights


class _Plan(NamedTuple):
    """What backward must know besides tensors."""

    rms: bool
    eps: float
    weight_offset: float
    cast_before_weight: bool
    backend: str
    wanted: tuple[bool, bool, bool]  # gradients of input or residual, weight, bias
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None


def _keep(ctx: Any, x: Tensor, weight: Tensor | None, statistics: Tensor | None, plan: _Plan) -> None:
    """Save what backward reads of these, and no more."""
    of_input, of_weight, _ = plan.wanted
    ctx.plan = plan
    ctx.set_materialize_grads(False)
    if of_input:
        ctx.save_for_backward(x, weight, statistics)
    elif of_weight:
        ctx.save_for_backward(x, None, statistics)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, residual, rms, eps, weight_offset, cast_before_weight, backend = inputs
    _, sums, statistics = output
    of_input, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
    wanted = (of_input or of_residual, of_weight, of_bias)
    dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    plan = _Plan(rms, eps, weight_offset, cast_before_weight, backend, wanted, *dtypes)
    kept = residual is not None
    ctx.mark_non_differentiable(*(() if kept and wanted[0] else (sums,)), statistics)
    _keep(ctx, sums if kept else input, weight, statistics, plan)


def _backward_of_op(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad, grad_sum), None, None, None, None, None


def _backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of input, weight, bias and residual."""
    plan: _Plan = ctx.plan
    needs = ctx.needs_input_grad
    dinput, dweight, dbias = grad_sum, None, None
    if grad is not None:
        input, weight, statistics = ctx.saved_tensors or (None, None, None)
        again = torch.is_grad_enabled()  # backward(create_graph=True)
        if not again and is_plain((grad,)) and not is_legacy_batchedtensor(grad):
            backend = plan.backend or kernel_for(NAMES[plan.rms], grad, None)
            grad, grad_sum, input, weight, statistics = _dense(grad, grad_sum, input, weight, statistics)
            dinput, dweight, dbias = gradients(
                plan.rms, grad, grad_sum, input, weight, statistics, plan.weight_offset, plan.wanted, backend
            )
        elif again or is_batched(grad):
            dinput, dweight, dbias = _differentiable(plan, grad, grad_sum, input, weight)
        else:
            found = torch.ops.superfine.layer_norm_backward(
                grad,
                grad_sum,
                input,
                weight,
                statistics,
                plan.rms,
                plan.weight_offset,
                plan.wanted,
                plan.backend,
            )
            dinput, dweight, dbias = (
                one if want else None for one, want in zip(found, plan.wanted, strict=True)
            )
    if dweight is not None and dweight.dtype != plan.weight_dtype:
        dweight = dweight.to(plan.weight_dtype)
    if dbias is not None and dbias.dtype != plan.bias_dtype:
        dbias = dbias.to(plan.bias_dtype)
    return (
        dinput if needs[0] else None,
        dweight,
        dbias,
        dinput if needs[3] else None,
    )


def _differentiable(
    plan: _Plan, grad: Tensor, grad_sum: Tensor | None, input: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by eager torch, with a graph of their own where one is asked for."""
    op = NAMES[plan.rms]
    again = torch.is_grad_enabled()
    why = "a second derivative is asked for" if again else "many gradients are asked for at once"
    warn_once(f"{op}: {why}; eager torch computes the gradient")
    of_input, of_weight, of_bias = plan.wanted
    if input is None:  # only a bias trains
        return None, None, grad.to(opmath_dtype(grad.dtype)).reshape(-1, grad.shape[-1]).sum(0)
    if of_weight and weight is None:
        weight = torch.ones(input.shape[-1], dtype=plan.weight_dtype, device=input.device, requires_grad=True)
    bias = None
    if of_bias:
        bias = torch.zeros(input.shape[-1], dtype=plan.bias_dtype, device=input.device, requires_grad=True)
    with torch.enable_grad():  # names of their own: the input may have been made from the weight
        input = input.view_as(input)
        weight = None if weight is None else weight.view_as(weight)
        y, _ = reference(
            op,
            input,
            weight,
            bias,
            plan.eps,
            weight_offset=plan.weight_offset,
            cast_before_weight=plan.cast_before_weight,
        )
    wanted = [(of_input, input), (of_weight, weight), (of_bias, bias)]
    chosen = [tensor for want, tensor in wanted if want and tensor is not None]
    found = iter(torch.autograd.grad(y, chosen, grad, create_graph=again))
    dinput, dweight, dbias = (next(found) if want else None for want, _ in wanted)
    if dinput is not None and grad_sum is not None:
        dinput = dinput + grad_sum
    return dinput, dweight, dbias


torch.library.register_autograd(
    "superfine::layer_norm", _backward_of_op, setup_context=_setup_context, lib=LIBRARY
)


class _Norm(torch.autograd.Function):
    """The same without the dispatcher, which for few elements costs more than the norm."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, options):  # each argument costs, a tuple no more than one
        of_input, of_weight, of_bias, of_residual, _ = ctx.needs_input_grad
        of_input = of_input or of_residual
        rms, eps, offset, cast, backend = options
        keep = of_input or of_weight
        output, sums, statistics = forward(
            input, weight, bias, residual, rms, eps, offset, cast, backend, keep
        )
        dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        plan = _Plan(rms, eps, offset, cast, backend, (of_input, of_weight, of_bias), *dtypes)
        _keep(ctx, input if sums is None else sums, weight, statistics, plan)
        if sums is None:
            return output
        if not of_input:
            ctx.mark_non_differentiable(sums)
        return output, sums

    @staticmethod
    def backward(ctx, grad, grad_sum=None):
        return *_backward(ctx, grad, grad_sum), None


_apply = direct(_Norm)


# --- public -----------------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Layer norm over the last dimension as `torch.nn.functional.layer_norm`, for the gradients that are needed.

    Args:
        input: (..., size), of any leading shape; float32, bfloat16, float16 or float64, any strides.
        weight, bias: (size,), of the dtype of `input` or float32; None for ones and zeros. 16-bit ones beside float32
            are converted.
        eps: added to the variance, 0 or above.
        residual: like `input`, to which it is added first.
        backend: None for the best one; "cpu", "cpu:<isa>", "triton" or "reference".

    Returns:
        The output, of shape and dtype of `input`, also under autocast; with `residual` a pair of it and of the sum,
        rounded to that dtype. The sum needs a gradient where input or residual does.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing has been written then.
    """
    return _norm("layer_norm", input, weight, bias, eps, 0.0, False, residual, backend)


def rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """RMS norm over the last dimension as `torch.nn.functional.rms_norm`, for the gradients that are needed.

    Args:
        input, weight, residual, backend: as in `layer_norm`.
        eps: added to the mean of the squares, 0 or above.
        weight_offset: added to the weights: 1 for Gemma's.
        cast_before_weight: round the normalised value to the dtype of `input` and multiply it by the weight then, as
            LlamaRMSNorm does, and T5LayerNorm where its weight has the dtype of the input. The gradient of the weight
            takes the value before it was rounded.

    Returns:
        The output, of the dtype of `input`; with `cast_before_weight` of that of a float32 weight, as Llama's. With
        `residual` a pair, as from `layer_norm`.

    Raises:
        ValueError, TypeError: as `layer_norm`.
    """
    return _norm("rms_norm", input, weight, None, eps, weight_offset, cast_before_weight, residual, backend)


def _norm(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    residual: Tensor | None,
    backend: str | None,
) -> Any:
    _check(op, input, weight, bias, eps, residual)
    if weight is not None and weight.dtype != input.dtype:
        weight = _fitting(weight, input.dtype)
    if bias is not None and bias.dtype != input.dtype:
        bias = _fitting(bias, input.dtype)
    rms = op == "rms_norm"
    plain = is_plain([t for t in (input, weight, bias, residual) if t is not None])
    if not (
        plain and input.is_cpu and backend is None
    ):  # else there is a kernel, and what follows costs as much
        why = None if backend == "reference" else why_no_kernel(input, backend)
        if why is not None:
            warn_once(f"{op}: {why}; eager torch computes it")
            backend = "reference"
    if backend == "reference" or input.numel() == 0:
        y, x = reference(
            op, input, weight, bias, eps,
            weight_offset=weight_offset, cast_before_weight=cast_before_weight, residual=residual,
        )  # fmt: skip
        return y if residual is None else (y, x)
    if not plain:
        output, sums, _ = torch.ops.superfine.layer_norm(
            input, weight, bias, residual, rms, eps, weight_offset, cast_before_weight, backend or ""
        )
        return output if residual is None else (output, sums)
    backend = "cpu" if backend is None and input.is_cpu else kernel_for(op, input, backend)
    options = rms, eps, weight_offset, cast_before_weight, backend
    input, weight, bias, residual = _dense(input, weight, bias, residual)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(input, weight, bias, residual, options)
    output, sums, _ = forward(input, weight, bias, residual, *options, False)
    return output if residual is None else (output, sums)


def _fitting(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the kernels read it beside inputs of `dtype`."""
    return weight if weight.dtype == torch.float32 and dtype.itemsize == 2 else weight.to(dtype)


def _check(
    op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None
) -> None:
    if not isinstance(input, Tensor):
        reject(op, "input", input, "a torch.Tensor", TypeError)
    dtype, size = input.dtype, input.shape[-1:]
    if dtype not in DTYPE_CODES:
        reject(op, "input", input, "float32, bfloat16, float16 or float64", TypeError)
    if not size:
        reject(op, "input", input, "a tensor with a last dimension")
    if not isinstance(eps, (float, int)):
        reject(op, "eps", eps, "a number", TypeError)
    if not eps >= 0:
        reject(op, "eps", eps, "0 or above")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            reject(op, name, parameter, "a torch.Tensor", TypeError)
        if parameter.shape != size:
            reject(op, name, parameter, f"shape ({size[0]},)")
        if parameter.dtype != dtype and not _fits(parameter.dtype, dtype):
            reject(op, name, parameter, f"{str(dtype)[6:]} or float32", TypeError)
        if not (parameter.is_cpu and input.is_cpu) and parameter.device != input.device:
            reject(op, name, parameter, f"a tensor on {input.device}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            reject(op, "residual", residual, "a torch.Tensor", TypeError)
        alike = residual.shape == input.shape and residual.dtype == input.dtype
        if not (alike and residual.device == input.device):
            reject(op, "residual", residual, f"{str(input.dtype)[6:]} {tuple(input.shape)} on {input.device}")


def _fits(parameter: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a parameter of another type than the input's can be read, or converted without loss."""
    if parameter not in DTYPE_CODES or parameter == torch.float64:
        return False
    return parameter == torch.float32 or dtype.itemsize > 2
