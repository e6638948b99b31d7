"""Losses of an output and its target, element by element, with the gradient of the output from the same pass.

For outputs x, targets t, weights w and, for labels, weights p of the positive ones (both 1 without):

    bce_with_logits   loss = w [(1 - t) x + (1 - t + p t) log(1 + exp(-x))]
                      dx   = w [1 - t - (1 - t + p t) / (1 + exp(x))]
    mse               loss = w (x - t)^2
                      dx   = 2 w (x - t)

reduced as `torch.nn.functional.binary_cross_entropy_with_logits` and `mse_loss` do: the mean is over all elements,
but that of a weighted mse divides by the sum of the weights. csrc/math/elementwise_loss.h has the form that is
computed, which overflows nowhere. Losses are float32 (float64 for float64 inputs).

Two ways to the gradient, as in cross_entropy.py. *Fused*: the forward pass writes dx as if the upstream gradient
were 1; only dx is saved, and backward multiplies it unless that is so. *Two-phase*: input and target are saved, and
backward computes dx from them: for `reduction="none"`, for float16, whose loss scale must come before the rounding,
and on GPUs.

Weights that are broadcast are read as they are: `_elements.Pattern`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._cross_entropy_backends import cuda_place, new_gradient
from superfine_kernels._elements import Elements, Pattern, check
from superfine_kernels._library import (
    LIBRARY,
    Cost,
    in_functional_transform,
    is_plain,
    opmath_dtype,
    reject,
    threads,
    warn_once,
)
from superfine_kernels._losses import MEAN, NONE, REDUCTIONS, times_upstream

#: Floating-point operations for an element, forward and backward.
FLOPS = {"bce_with_logits": (35, 8), "mse": (3, 1)}


def cost(
    elements: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    loss: str = "bce_with_logits",
    backward: bool = True,
) -> Cost:
    """Bytes and flops: each output and target read once and, with backward, each gradient written once."""
    target_size = (target_dtype or dtype).itemsize
    forward, more = FLOPS[loss]
    size = dtype.itemsize * (1 + backward) + target_size
    return Cost(bytes=elements * size, flops=elements * (forward + more * backward))


def reference(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Eager torch in float32 (float64 for float64): every input that torch takes, any number of derivatives."""
    if num_items is not None:
        return reference(loss, input, target, weight, pos_weight, "sum") / num_items
    dtype = opmath_dtype(input.dtype)
    input, target = input.to(dtype), target.to(dtype)
    weight, pos_weight = (w if w is None else w.to(dtype) for w in (weight, pos_weight))
    if loss == "bce_with_logits":
        return torch.nn.functional.binary_cross_entropy_with_logits(
            input, target, weight, pos_weight=pos_weight, reduction=reduction
        )
    if weight is None:
        return torch.nn.functional.mse_loss(input, target, reduction=reduction)
    losses = weight * (input - target) ** 2  # torch's weight does not broadcast
    if reduction == "mean":
        return losses.sum() / weight.expand(input.shape).sum()
    return losses if reduction == "none" else losses.sum()


# --- backends ---------------------------------------------------------------------------------------------


def _run(
    elements: Elements,
    backend: str,
    *,
    losses: Tensor | None = None,
    gradient: Tensor | None = None,
    scale: Tensor | None = None,
    denominator: float = 1.0,
    total: bool = False,
) -> Tensor | None:
    """Fills `losses` and `gradient`; the sum of the losses over the denominator, where `total` asks for it.

    The gradient is multiplied by `scale`, a number or one for every element, and divided by the denominator.
    """
    input = elements.input
    name, _, isa = _backends.choose(elements.loss, input.device, backend).partition(":")
    if name == "triton":
        from superfine_kernels.triton import elementwise_loss as kernels

        return kernels.elementwise_loss(elements, losses, gradient, scale, denominator, total)
    if name == "cuda":
        return _run_cuda(elements, losses, gradient, scale, denominator, total)
    if name != "cpu":
        reject(elements.loss, "backend", name, "cpu, cuda or triton for this device")
    arguments = _arguments(elements, losses, gradient, scale, denominator)
    value = _cpu.elementwise_loss(**arguments, sum=total, threads=threads(), isa=isa)
    # Not on torch's default device.
    return torch.tensor(value / denominator, dtype=opmath_dtype(input.dtype), device="cpu") if total else None


def _run_cuda(
    elements: Elements,
    losses: Tensor | None,
    gradient: Tensor | None,
    scale: Tensor | None,
    denominator: float,
    total: bool,
) -> Tensor | None:
    from superfine_kernels import _cuda

    input, count = elements.input, elements.input.numel()
    cycles = [pattern.cycle for pattern in (elements.weight, elements.pos_weight)]
    most = _cuda.MOST_ELEMENTS
    if count > most:  # parts that patterns begin anew with, where they are short
        step = math.lcm(*(cycle for cycle in cycles if cycle <= most))
        most = most // step * step or most
    sums: list[Tensor] = []
    for begin in range(0, count, most):
        part = slice(begin, min(begin + most, count))
        these = elements if count <= most else elements.part(part)  # a name: it owns what is read
        arguments = _arguments(
            these,
            None if losses is None else losses.view(-1)[part],
            None if gradient is None else gradient.view(-1)[part],
            None if scale is None else scale.view(-1)[part] if scale.dim() else scale,
            denominator,
        )
        blocks = -(-(part.stop - begin) // _cuda.ELEMENTS_PER_SUM)
        partial = input.new_empty(blocks + 1 if total else 0, dtype=torch.float32)
        addresses = {name: partial[i:].data_ptr() if total else 0 for i, name in enumerate(("out", "sums"))}
        _cuda.elementwise_loss(**arguments, **addresses, **cuda_place(input))
        sums.append(partial[:1].view(()) if total else partial)
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) if total else None


def _arguments(
    elements: Elements,
    losses: Tensor | None,
    gradient: Tensor | None,
    scale: Tensor | None,
    denominator: float,
) -> dict[str, Any]:
    return {
        **elements.native(),
        "scale": 0 if scale is None else scale.data_ptr(),
        "scale_stride": 0 if scale is None or scale.dim() == 0 else 1,
        "denominator": denominator,
        "losses": 0 if losses is None else losses.data_ptr(),
        "gradient": 0 if gradient is None else gradient.data_ptr(),
    }


def _forward(
    elements: Elements, reduction: int, denominator: float, gradient: Tensor | None, backend: str
) -> Tensor:
    """The loss; fills `gradient`, which may be the input, with that of the reduced loss."""
    if reduction == NONE:
        losses = torch.empty_like(elements.input, dtype=opmath_dtype(elements.input.dtype))
        _run(elements, backend, losses=losses)
        return losses
    loss = _run(elements, backend, gradient=gradient, denominator=denominator, total=True)
    if loss is None:
        raise RuntimeError(f"{elements.loss}: backend {backend!r} gave no loss; expected one")
    return loss


# --- ops and autograd -------------------------------------------------------------------------------------

_ARGUMENTS = "Tensor target, Tensor? weight, int weight_repeat, Tensor? pos_weight, int pos_weight_repeat"
LIBRARY.define(
    f"elementwise_loss(str loss, Tensor input, {_ARGUMENTS}, int reduction, float denominator, bool gradient, "
    "str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"elementwise_loss_(str loss, Tensor(a!) input, {_ARGUMENTS}, float denominator, str backend) -> Tensor"
)
LIBRARY.define(
    f"elementwise_loss_backward(str loss, Tensor input, {_ARGUMENTS}, Tensor scale, float denominator, str backend)"
    " -> Tensor"
)


def _elements(loss, input, target, weight, weight_repeat, pos_weight, pos_weight_repeat):
    """Dense as the kernels want them; a compiler may have laid them out otherwise."""
    weight, pos_weight = (w if w is None else w.contiguous() for w in (weight, pos_weight))
    return Elements(
        loss,
        input.contiguous(),
        target.contiguous(),
        Pattern(weight, weight_repeat),
        Pattern(pos_weight, pos_weight_repeat),
    )


@torch.library.impl(LIBRARY, "elementwise_loss", "CompositeExplicitAutograd")
def _op(
    loss, input, target, weight, repeat, pos_weight, pos_repeat, reduction, denominator, gradient, backend
):
    dinput = new_gradient(input) if gradient else None
    elements = _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat)
    value = _forward(elements, reduction, denominator or float(input.numel()), dinput, backend)
    return value, input.new_empty(0) if dinput is None else dinput


@torch.library.impl(LIBRARY, "elementwise_loss", "Meta")
def _op_fake(
    loss, input, target, weight, repeat, pos_weight, pos_repeat, reduction, denominator, gradient, backend
):
    shape = input.shape if reduction == NONE else ()
    value = input.new_empty(shape, dtype=opmath_dtype(input.dtype))
    return value, input.new_empty(input.shape if gradient else 0)


@torch.library.impl(LIBRARY, "elementwise_loss_", "CompositeExplicitAutograd")
def _op_inplace(loss, input, target, weight, repeat, pos_weight, pos_repeat, denominator, backend):
    if not input.is_contiguous():
        reject(loss, "input", f"a tensor with strides {input.stride()}", "a dense one to be overwritten")
    elements = _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat)
    value = _forward(elements, MEAN, denominator or float(input.numel()), input, backend)
    torch.autograd.graph.increment_version(input)  # autograd must notice, as after any in-place op
    return value


@torch.library.impl(LIBRARY, "elementwise_loss_", "Meta")
def _op_inplace_fake(loss, input, target, weight, repeat, pos_weight, pos_repeat, denominator, backend):
    return input.new_empty((), dtype=opmath_dtype(input.dtype))


@torch.library.impl(LIBRARY, "elementwise_loss_backward", "CompositeExplicitAutograd")
def _op_backward(loss, input, target, weight, repeat, pos_weight, pos_repeat, scale, denominator, backend):
    elements, dinput = (
        _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat),
        new_gradient(input),
    )
    denominator = denominator or float(input.numel())
    _run(elements, backend, gradient=dinput, scale=scale.contiguous(), denominator=denominator)
    return dinput


@torch.library.impl(LIBRARY, "elementwise_loss_backward", "Meta")
def _op_backward_fake(
    loss, input, target, weight, repeat, pos_weight, pos_repeat, scale, denominator, backend
):
    return input.new_empty(input.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.loss, input, target, weight, ctx.repeat, pos_weight, ctx.pos_repeat, *options = inputs
    ctx.reduction, ctx.denominator, ctx.fused, ctx.backend = options
    _, dinput = output
    ctx.mark_non_differentiable(dinput)
    ctx.set_materialize_grads(False)
    if ctx.fused:
        ctx.save_for_backward(dinput)
    else:
        ctx.save_for_backward(input, target, weight, pos_weight)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[1]:
        return (None,) * 11
    dinput = (
        times_upstream(ctx.saved_tensors[0], grad, ctx.loss) if ctx.fused else _two_phase_gradient(ctx, grad)
    )
    return None, dinput, *(None,) * 9


def _two_phase_gradient(ctx: Any, grad: Tensor) -> Tensor:
    input, target, weight, pos_weight = ctx.saved_tensors
    if torch.is_grad_enabled() and input.requires_grad:  # backward(create_graph=True)
        warn_once(f"{ctx.loss}: a second derivative is asked for; eager torch computes the gradient")
        weight = Pattern(weight, ctx.repeat).whole(input.shape)
        pos_weight = Pattern(pos_weight, ctx.pos_repeat).whole(input.shape)
        reduction = "none" if ctx.reduction == NONE else "sum"
        loss = reference(ctx.loss, input, target, weight, pos_weight, reduction)
        loss = loss / (ctx.denominator or float(input.numel()))
        return torch.autograd.grad(loss, input, grad, create_graph=True)[0]
    arguments = (ctx.loss, input, target, weight, ctx.repeat, pos_weight, ctx.pos_repeat)
    scale = grad.to(opmath_dtype(input.dtype))
    return torch.ops.superfine.elementwise_loss_backward(*arguments, scale, ctx.denominator, ctx.backend)


torch.library.register_autograd(
    "superfine::elementwise_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)


class _Fused(torch.autograd.Function):
    """The fused way without the dispatcher, which for few elements costs more than the loss.

    In place, the input's memory becomes the gradient and its version counts up.
    """

    @staticmethod
    def forward(
        ctx, loss, input, inplace, denominator, backend, target, weight, repeat, pos_weight, pos_repeat
    ):
        ctx.loss = loss
        arguments = (target, weight, repeat, pos_weight, pos_repeat)
        if inplace:
            dinput = input.detach()
            value = torch.ops.superfine.elementwise_loss_(loss, dinput, *arguments, denominator, backend)
        else:
            value, dinput = _op(loss, input, *arguments, MEAN, denominator, True, backend)
        ctx.save_for_backward(dinput)
        return value

    @staticmethod
    def backward(ctx, grad):
        return None, times_upstream(ctx.saved_tensors[0], grad, ctx.loss), *(None,) * 8


# --- public -----------------------------------------------------------------------------------------------


def bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy of logits as `torch.nn.functional.binary_cross_entropy_with_logits`, in one pass.

    Args:
        input: logits of any shape; float32, bfloat16, float16 or float64, any strides.
        target: probabilities of the positive class, of the shape of `input`. Read as they are in the dtype of `input`
            or float32; float64 ones beside other inputs, booleans and integers are converted first.
        weight: of each element's loss; broadcasts to the shape of `input`.
        reduction: "mean" (over all elements, whatever their weights), "sum" or "none".
        pos_weight: of the positive part of the loss, one for each class for instance; broadcasts to `input`.
        num_items: what "mean" divides the sum of the losses by, instead of the elements of this call: for instance
            those of all steps of accumulation, on all processes. A number or a tensor of one element, above 0; on a
            GPU it is not waited for.
        inplace: the gradient may overwrite the memory of `input`, which then no longer holds the logits; needs a
            reduction and an input that is not a leaf. Saves a buffer of the size of `input` where that is contiguous
            and not float16.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none". NaN for the mean
        of nothing. An infinite logit gives the limit, 0 or infinity, where torch gives NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing has been written then.
    """
    return _loss("bce_with_logits", input, target, weight, pos_weight, reduction, num_items, inplace, backend)


def mse(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error as `torch.nn.functional.mse_loss`, in one pass.

    Args:
        input: outputs of any shape; float32, bfloat16, float16 or float64, any strides.
        target: what they should be, of the same shape (another one is broadcast, with a warning as torch's); dtypes
            as in `bce_with_logits`.
        reduction: "mean" (with weights: their weighted mean), "sum" or "none".
        weight: of each element's loss; broadcasts to the shape of `input`, where torch wants that shape.
        num_items, inplace, backend: as in `bce_with_logits`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none".

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing has been written then.
    """
    return _loss("mse", input, target, weight, None, reduction, num_items, inplace, backend)


def _loss(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    inplace: bool,
    backend: str | None,
) -> Tensor:
    check(loss, input, target, weight, pos_weight, reduction, num_items, inplace)
    if target.shape != input.shape:
        warnings.warn(
            f"mse: target has shape {tuple(target.shape)} and input {tuple(input.shape)}: both are broadcast, "
            "which is likely to be wrong",
            stacklevel=3,
        )
        input, target = torch.broadcast_tensors(input, target)
    if why := _why_no_kernel(loss, input, target, weight, backend):
        warn_once(f"{loss}: {why}; eager torch computes it")
        backend = "reference"
    if backend == "reference" or input.numel() == 0:
        return reference(loss, input, target, weight, pos_weight, reduction, num_items)
    if loss == "mse" and weight is not None and reduction == "mean" and num_items is None:
        of_each = input.numel() / weight.numel()
        num_items = weight.detach().sum(dtype=opmath_dtype(input.dtype)) * of_each
    if isinstance(num_items, Tensor):
        if num_items.device.type != "cpu" or not is_plain((num_items,)) or num_items == 0:
            rest = (weight, pos_weight, "sum", None, inplace, backend)
            return _loss(loss, input, target, *rest) / num_items.reshape(())
        num_items = num_items.item()
    if input.dtype == torch.float64 and input.device.type == "cuda":
        backend = "triton"  # CUDA C++ has no kernel for it
    return _by_kernel(loss, input, target, weight, pos_weight, reduction, num_items, inplace, backend or "")


def _by_kernel(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    num_items: float | None,
    inplace: bool,
    backend: str,
) -> Tensor:
    dtype = opmath_dtype(input.dtype)
    if target.dtype not in (input.dtype, dtype):
        target = target.to(input.dtype if target.dtype == torch.bool else dtype)
    x, t = input.contiguous(), target.contiguous()
    patterns = [Pattern.of(w, x.shape, dtype) for w in (weight, pos_weight)]
    weights = [argument for pattern in patterns for argument in (pattern.values, pattern.repeat)]
    # 0: as many as there are elements, which the op counts: a float would fix sizes that a compiler keeps open.
    denominator = float(num_items or 0) if reduction == "mean" else 1.0
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    # float16 gradients want the loss scale before they are rounded, and it is known only in backward.
    early = reduction != "none" and input.dtype != torch.float16
    fused = needs_gradient and early and input.device.type == "cpu"
    inplace = inplace and early and not torch.compiler.is_compiling()  # the compiler plans memory itself
    if needs_gradient and (inplace or (fused and is_plain((x, t)))):
        return _Fused.apply(loss, x, inplace, denominator, backend, t, *weights)
    options = (REDUCTIONS[reduction], denominator, fused, backend)
    return torch.ops.superfine.elementwise_loss(loss, x, t, *weights, *options)[0]


def _why_no_kernel(
    loss: str, input: Tensor, target: Tensor, weight: Tensor | None, backend: str | None
) -> str | None:
    if in_functional_transform():
        return "torch.func and forward-mode AD have no kernel"
    if torch.is_grad_enabled():
        for name, tensor in (("target", target), ("weight", weight)):
            if tensor is not None and tensor.requires_grad:
                return f"there is no kernel for the gradient of {name}"
    if input.device.type not in _backends.TABLE:
        return f"there is no kernel for tensors on {input.device.type}"
    if input.device.type == "cuda" and input.dtype == torch.float64 and backend == "cuda":
        reject(loss, "input", input, "float32, bfloat16 or float16 with backend='cuda'")
    if input.device.type == "cuda" and backend is None and not torch.compiler.is_compiling():
        best = "triton" if input.dtype == torch.float64 else _backends.choose(loss, input.device)
        if best == "reference" or _backends.why_unavailable(best):
            return f"there is no kernel for {input.dtype} that is usable here"
    return None
