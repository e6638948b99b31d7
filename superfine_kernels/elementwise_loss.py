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

Weights that are broadcast are read as they are: `Pattern`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    in_functional_transform,
    is_plain,
    opmath_dtype,
    reject,
    threads,
    warn_once,
)
from superfine_kernels._losses import MEAN, NONE, REDUCTIONS, check_reduction
from superfine_kernels.cross_entropy import _new_gradient, _overlaps_itself, _times_upstream, _where

#: Codes of the losses, as in csrc/math/elementwise_loss.h, and their floating-point operations, forward and backward.
CODES = {"bce_with_logits": 0, "mse": 1}
FLOPS = {"bce_with_logits": (35, 8), "mse": (3, 1)}

#: Patterns are at least this long, so that what a kernel reads at a time holds at most one of their ends.
WINDOW = 4096
#: Values repeated fewer times than this are written out: runs so short would cost more than they save.
SHORTEST_RUN = 16


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
    losses = weight * (input - target) ** 2  # torch < 2.9 has no weight, later ones broadcast none
    if reduction == "mean":
        return losses.sum() / weight.expand(input.shape).sum()
    return losses if reduction == "none" else losses.sum()


# --- backends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """Element i of the flat input has values[i // repeat % len(values)]: what broadcasting means, without copies."""

    values: Tensor | None
    repeat: int

    @classmethod
    def of(cls, weight: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Pattern:
        if weight is None:
            return cls(None, 1)
        weight = weight.to(dtype)
        sizes = (1,) * (len(shape) - weight.dim()) + tuple(weight.shape)
        varying = [d for d, size in enumerate(sizes) if size != 1]
        first, last = (varying[0], varying[-1] + 1) if varying else (0, 0)
        # Of the dimensions from the first to the last that vary, those between may have to be written out.
        whole = (1,) * first + tuple(shape[first:last]) + (1,) * (len(shape) - last)
        values = weight.reshape(sizes).expand(whole).reshape(-1)
        repeat = math.prod(shape[last:])
        if repeat < SHORTEST_RUN:
            values, repeat = values.repeat_interleave(repeat), 1
        cycle, elements = values.numel() * repeat, shape.numel()
        if cycle < min(WINDOW, elements):
            values = values.repeat(-(-WINDOW // cycle))
        return cls(values.contiguous(), repeat)

    def whole(self, shape: torch.Size) -> Tensor | None:
        """Every element's value."""
        if self.values is None:
            return None
        index = torch.arange(shape.numel(), device=self.values.device) // self.repeat
        return self.values[index % self.values.numel()].reshape(shape)


@dataclass(frozen=True)
class Elements:
    """Checked arguments: input and target dense and of one shape."""

    loss: str
    input: Tensor
    target: Tensor
    weight: Pattern
    pos_weight: Pattern

    def native(self) -> dict[str, Any]:
        arguments = {
            "loss": CODES[self.loss],
            "count": self.input.numel(),
            "input": self.input.data_ptr(),
            "dtype": DTYPE_CODES[self.input.dtype],
            "target": self.target.data_ptr(),
            "target_dtype": DTYPE_CODES[self.target.dtype],
        }
        for name, pattern in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            values = pattern.values
            arguments[name] = 0 if values is None else values.data_ptr()
            arguments[f"{name}_length"] = 1 if values is None else values.numel()
            arguments[f"{name}_repeat"] = pattern.repeat
        return arguments


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
    arguments: dict[str, Any] = {
        **elements.native(),
        "scale": 0 if scale is None else scale.data_ptr(),
        "scale_stride": 0 if scale is None or scale.dim() == 0 else 1,
        "denominator": denominator,
        "losses": 0 if losses is None else losses.data_ptr(),
        "gradient": 0 if gradient is None else gradient.data_ptr(),
    }
    dtype = opmath_dtype(input.dtype)
    if name == "cpu":
        value = _cpu.elementwise_loss(**arguments, sum=total, threads=threads(), isa=isa)
        # Not on torch's default device.
        return torch.tensor(value / denominator, dtype=dtype, device=input.device) if total else None
    from superfine_kernels import _cuda

    out = input.new_empty((), dtype=dtype) if total else None
    blocks = -(-input.numel() // _cuda.ELEMENTS_PER_SUM)
    sums = input.new_empty(blocks, dtype=torch.float64) if total else None
    addresses = {
        "sums": 0 if sums is None else sums.data_ptr(), "out": 0 if out is None else out.data_ptr()
    }  # fmt: skip
    _cuda.elementwise_loss(**arguments, **addresses, **_where(input))
    return out


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


def _elements(loss, input, target, weight, weight_repeat, pos_weight, pos_weight_repeat) -> Elements:
    return Elements(
        loss, input, target, Pattern(weight, weight_repeat), Pattern(pos_weight, pos_weight_repeat)
    )


@torch.library.impl(LIBRARY, "elementwise_loss", "CompositeExplicitAutograd")
def _op(
    loss, input, target, weight, repeat, pos_weight, pos_repeat, reduction, denominator, gradient, backend
):
    dinput = _new_gradient(input) if gradient else None
    elements = _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat)
    value = _forward(elements, reduction, denominator, dinput, backend)
    return value, input.new_empty(0) if dinput is None else dinput


@torch.library.register_fake("superfine::elementwise_loss", lib=LIBRARY)
def _op_fake(
    loss, input, target, weight, repeat, pos_weight, pos_repeat, reduction, denominator, gradient, backend
):
    shape = input.shape if reduction == NONE else ()
    value = input.new_empty(shape, dtype=opmath_dtype(input.dtype))
    return value, input.new_empty(input.shape if gradient else 0)


@torch.library.impl(LIBRARY, "elementwise_loss_", "CompositeExplicitAutograd")
def _op_inplace(loss, input, target, weight, repeat, pos_weight, pos_repeat, denominator, backend):
    elements = _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat)
    value = _forward(elements, MEAN, denominator, input, backend)
    torch.autograd.graph.increment_version(input)  # autograd must notice, as after any in-place op
    return value


@torch.library.register_fake("superfine::elementwise_loss_", lib=LIBRARY)
def _op_inplace_fake(loss, input, target, weight, repeat, pos_weight, pos_repeat, denominator, backend):
    return input.new_empty((), dtype=opmath_dtype(input.dtype))


@torch.library.impl(LIBRARY, "elementwise_loss_backward", "CompositeExplicitAutograd")
def _op_backward(loss, input, target, weight, repeat, pos_weight, pos_repeat, scale, denominator, backend):
    elements, dinput = (
        _elements(loss, input, target, weight, repeat, pos_weight, pos_repeat),
        _new_gradient(input),
    )
    _run(elements, backend, gradient=dinput, scale=scale.contiguous(), denominator=denominator)
    return dinput


@torch.library.register_fake("superfine::elementwise_loss_backward", lib=LIBRARY)
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
        _times_upstream(ctx.saved_tensors[0], grad, ctx.loss) if ctx.fused else _two_phase_gradient(ctx, grad)
    )
    return None, dinput, *(None,) * 9


def _two_phase_gradient(ctx: Any, grad: Tensor) -> Tensor:
    input, target, weight, pos_weight = ctx.saved_tensors
    if torch.is_grad_enabled() and input.requires_grad:  # backward(create_graph=True)
        warn_once(f"{ctx.loss}: a second derivative is asked for; eager torch computes the gradient")
        weights = (
            Pattern(values, repeat).whole(input.shape)
            for values, repeat in ((weight, ctx.repeat), (pos_weight, ctx.pos_repeat))
        )
        loss = reference(ctx.loss, input, target, *weights, "none" if ctx.reduction == NONE else "sum")
        return torch.autograd.grad(loss / ctx.denominator, input, grad, create_graph=True)[0]
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
    def forward(ctx, loss, input, inplace, denominator, backend, target, *weights):
        ctx.loss = loss
        if inplace:
            dinput = input.detach()
            value = torch.ops.superfine.elementwise_loss_(
                loss, dinput, target, *weights, denominator, backend
            )
        else:
            value, dinput = _op(loss, input, target, *weights, MEAN, denominator, True, backend)
        ctx.save_for_backward(dinput)
        return value

    @staticmethod
    def backward(ctx, grad):
        return None, _times_upstream(ctx.saved_tensors[0], grad, ctx.loss), *(None,) * 8


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
    _check(loss, input, target, weight, pos_weight, reduction, num_items, inplace)
    if target.shape != input.shape:
        warnings.warn(
            f"mse: target has shape {tuple(target.shape)} and input {tuple(input.shape)}: both are broadcast, "
            "which is likely to be wrong",
            stacklevel=3,
        )
        input, target = torch.broadcast_tensors(input, target)
    if why := _why_no_kernel(input, target, weight, pos_weight):
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
    denominator = float(num_items or x.numel()) if reduction == "mean" else 1.0
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
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> str | None:
    if in_functional_transform():
        return "torch.func and forward-mode AD have no kernel"
    if torch.is_grad_enabled():
        for name, tensor in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
            if tensor is not None and tensor.requires_grad:
                return f"there is no kernel for the gradient of {name}"
    if input.device.type not in _backends.TABLE:
        return f"there is no kernel for tensors on {input.device.type}"
    return None


def _check(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    inplace: bool,
) -> None:
    def expect(
        condition: bool, argument: str, value: object, expected: str, error: type[Exception] = ValueError
    ) -> None:
        if not condition:
            reject(loss, argument, value, expected, error)

    for name, tensor in (("input", input), ("target", target)):
        expect(isinstance(tensor, Tensor), name, tensor, "a torch.Tensor", TypeError)
    expect(input.dtype in DTYPE_CODES, "input", input, "float32, bfloat16, float16 or float64", TypeError)
    expect(not target.is_complex(), "target", target, "real numbers", TypeError)
    expect(target.device == input.device, "target", target, f"a tensor on {input.device}")
    shape = tuple(input.shape)
    if loss == "mse" and target.shape != input.shape:
        try:
            shape = tuple(torch.broadcast_shapes(input.shape, target.shape))
        except RuntimeError:
            expect(False, "target", target, f"shape {shape}")
    expect(loss == "mse" or target.shape == input.shape, "target", target, f"shape {shape}")
    for name, weights in (("weight", weight), ("pos_weight", pos_weight)):
        if weights is None:
            continue
        expect(isinstance(weights, Tensor), name, weights, "a torch.Tensor", TypeError)
        expect(weights.is_floating_point(), name, weights, "a floating-point tensor", TypeError)
        sizes = (1,) * (len(shape) - weights.dim()) + tuple(weights.shape)
        fits = len(sizes) == len(shape) and all(w in (1, n) for w, n in zip(sizes, shape, strict=True))
        expect(fits, name, weights, f"a shape that broadcasts to {shape}")
        expect(weights.device == input.device, name, weights, f"a tensor on {input.device}")
    check_reduction(loss, input.device, reduction, num_items)
    if inplace:
        expect(reduction != "none", "reduction", reduction, "'mean' or 'sum' with inplace=True")
        expect(
            not (input.requires_grad and input.is_leaf), "input", "a leaf that requires grad",
            "the output of an op: inplace=True overwrites it",
        )  # fmt: skip
        own = not _overlaps_itself(input) and tuple(input.shape) == shape
        expect(
            own, "input", f"a tensor with strides {input.stride()}",
            "memory of its own for every element with inplace=True",
        )  # fmt: skip
        for name, other in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
            expect(
                other is None or not _shares_memory(input, other), name, "a tensor in the memory of input",
                "memory of its own with inplace=True",
            )  # fmt: skip


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return is_plain((a, b)) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
