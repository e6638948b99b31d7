"""Cross-entropy over logits, with the gradient of the logits from the same pass.

For one row of logits x, label t, class weights w (1 without) and label smoothing s over C classes:

    lse     = log sum_c exp(x_c)
    loss    = (1 - s) w_t (lse - x_t) + s/C sum_c w_c (lse - x_c)
    dx_c    = [(1 - s) w_t + s/C sum_c w_c] exp(x_c - lse) - (1 - s) w_t [c = t] - s/C w_c

reduced as `torch.nn.functional.cross_entropy` does (the mean divides by the sum of w_t over the rows that are
not ignored). Losses are float32 (float64 for float64 logits) whatever the dtype of the logits.

Two ways to the gradient. *Fused*: the forward pass writes dx while the row is still in the cache; only dx is
saved, and backward multiplies it by the upstream gradient unless that is known to be 1. *Two-phase*: lse is
saved beside the logits, and backward computes dx from them: for `reduction="none"`, where the upstream gradient
differs from row to row, for float16, whose loss scale must come before the rounding, and on GPUs, where looking at
the upstream gradient would wait for the device.
"""

from __future__ import annotations

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
from superfine_kernels._losses import MEAN, NONE, REDUCTIONS, Rows, check_options, sum_of_weights

# Smaller buffers come from the heap, whose pages have mostly been touched before.
HUGE_PAGE_BYTES = 4 << 20


def cost(rows: int, vocab: int, dtype: torch.dtype = torch.float32, backward: bool = True) -> Cost:
    """Bytes and flops over `rows` x `vocab` logits: each read once and, with backward, each gradient written once."""
    elements = rows * vocab
    return Cost(bytes=elements * dtype.itemsize * (2 if backward else 1), flops=elements * (4 + 3 * backward))


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Eager torch in float32 (float64 for float64): every input that torch takes, any number of derivatives."""
    if num_items is not None:
        return reference(input, target, weight, ignore_index, "sum", label_smoothing) / num_items
    dtype = opmath_dtype(input.dtype)
    return torch.nn.functional.cross_entropy(
        input.to(dtype),
        target.to(dtype if target.is_floating_point() else torch.int64),
        weight if weight is None else weight.to(dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


# --- backends ---------------------------------------------------------------------------------------------


def _cpu_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, isa: str
) -> tuple[Tensor, Tensor]:
    arguments = rows.native()
    labels = {
        k: arguments[k] for k in ("target", "target_is_int64", "target_stride", "rows", "vocab", "weight")
    }
    bad, weight_sum = _cpu.check_labels(
        **labels, weight_is_f64=rows.input.dtype == torch.float64, ignore_index=rows.ignore_index
    )
    if bad >= 0:
        raise ValueError(
            f"cross_entropy: target[{bad}] is {int(rows.target[bad])}; expected a class in "
            f"[0, {rows.input.shape[1]}) or ignore_index ({rows.ignore_index})"
        )
    denominator = (num_items or weight_sum) if reduction == MEAN else 1.0
    losses, lse = rows.new_rows(), rows.new_rows()
    total = _cpu.cross_entropy_forward(
        **arguments,
        losses=losses.data_ptr(),
        lse=lse.data_ptr(),
        dlogits=0 if dlogits is None else dlogits.data_ptr(),
        scale=1 / denominator if denominator else float("inf"),
        threads=threads(),
        isa=isa,
    )
    if reduction == NONE:
        return losses, lse
    mean = total / denominator if denominator else float("nan")
    return torch.tensor(mean, dtype=lse.dtype, device=lse.device), lse  # not torch's default device


def _cuda_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    from superfine_kernels import _cuda

    arguments, where = rows.native(), _where(rows.input)
    losses, lse = rows.new_rows(), rows.new_rows()
    denominator = losses.new_ones(2)  # and its reciprocal, which scales the gradient
    if reduction == MEAN and num_items:
        denominator[0], denominator[1] = num_items, 1 / num_items
    elif reduction == MEAN:
        labels = {k: v for k, v in arguments.items() if k not in ("input", "row_stride", "label_smoothing")}
        _cuda.cross_entropy_denominator(**labels, out=denominator.data_ptr(), **where)
    _cuda.cross_entropy_forward(
        **arguments,
        losses=losses.data_ptr(),
        lse=lse.data_ptr(),
        dlogits=0 if dlogits is None else dlogits.data_ptr(),
        scale=denominator[1].data_ptr(),
        scale_stride=0,
        **where,
    )
    if reduction == NONE:
        return losses, lse
    loss = losses.new_empty(())
    _cuda.cross_entropy_reduce(
        losses=losses.data_ptr(),
        rows=losses.numel(),
        dtype=DTYPE_CODES[losses.dtype],
        denominator=denominator.data_ptr() if reduction == MEAN else 0,
        out=loss.data_ptr(),
        **where,
    )
    return loss, lse


def _triton_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    from superfine_kernels.triton import cross_entropy as kernels

    one = rows.input.new_ones((), dtype=opmath_dtype(rows.input.dtype))
    counted = (rows.target, rows.weight, rows.ignore_index, one.dtype)
    denominator = one
    if reduction == MEAN:
        denominator = one * num_items if num_items else sum_of_weights(*counted)
    losses, lse = kernels.cross_entropy_forward(**vars(rows), dlogits=dlogits, scale=denominator.reciprocal())
    return (losses if reduction == NONE else losses.sum() / denominator), lse


def _where(tensor: Tensor) -> dict[str, Any]:
    return {"stream": torch.cuda.current_stream(tensor.device).cuda_stream, "device": tensor.device.index}


def _run_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, lse); fills dlogits, which may be the input itself, with the gradient of the reduced loss."""
    name, _, isa = _backends.choose("cross_entropy", rows.input.device, backend).partition(":")
    if name == "cpu":
        return _cpu_forward(rows, reduction, num_items, dlogits, isa)
    return (_triton_forward if name == "triton" else _cuda_forward)(rows, reduction, num_items, dlogits)


def _run_backward(rows: Rows, lse: Tensor, scale: Tensor, backend: str) -> Tensor:
    """The gradient of the logits; `scale` holds the upstream gradient of every row, or one for all."""
    name, _, isa = _backends.choose("cross_entropy", rows.input.device, backend).partition(":")
    if name == "triton":
        from superfine_kernels.triton import cross_entropy as kernels

        return kernels.cross_entropy_backward(**vars(rows), lse=lse, scale=scale)
    dlogits = _new_gradient(rows.input)
    addresses: dict[str, Any] = {
        "lse": lse.data_ptr(),
        "scale": scale.data_ptr(),
        "scale_stride": scale.stride(0) if scale.dim() else 0,
        "dlogits": dlogits.data_ptr(),
    }
    if name == "cpu":
        whole: dict[str, Any] = {"first_class": 0, "classes": rows.input.shape[1]}
        _cpu.cross_entropy_backward(**rows.native(), **whole, **addresses, threads=threads(), isa=isa)
    else:
        from superfine_kernels import _cuda

        _cuda.cross_entropy_backward(**rows.native(), **addresses, **_where(rows.input))
    return dlogits


def _new_gradient(input: Tensor) -> Tensor:
    dlogits = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if input.device.type == "cpu" and dlogits.nbytes >= HUGE_PAGE_BYTES:
        _cpu.advise_huge_pages(dlogits.data_ptr(), dlogits.nbytes)
    return dlogits


# --- ops and autograd -----------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor target, Tensor? weight, int ignore_index, int reduction, float num_items, float label_smoothing"
)
LIBRARY.define(
    f"cross_entropy(Tensor input, {_ARGUMENTS}, bool gradient, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"cross_entropy_(Tensor(a!) input, {_ARGUMENTS}, str backend) -> Tensor")
LIBRARY.define(
    "cross_entropy_backward(Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "Tensor lse, Tensor scale, str backend) -> Tensor"
)


@torch.library.impl(LIBRARY, "cross_entropy", "CompositeExplicitAutograd")
def _op(input, target, weight, ignore_index, reduction, num_items, label_smoothing, gradient, backend):
    dlogits = _new_gradient(input) if gradient else None
    rows = Rows(input, target, weight, ignore_index, label_smoothing)
    loss, lse = _run_forward(rows, reduction, num_items, dlogits, backend)
    return loss, lse, input.new_empty(0) if dlogits is None else dlogits


@torch.library.register_fake("superfine::cross_entropy", lib=LIBRARY)
def _op_fake(input, target, weight, ignore_index, reduction, num_items, label_smoothing, gradient, backend):
    lse = input.new_empty(input.shape[0], dtype=opmath_dtype(input.dtype))
    loss = torch.empty_like(lse) if reduction == NONE else lse.new_empty(())
    return loss, lse, input.new_empty(input.shape if gradient else 0)


@torch.library.impl(LIBRARY, "cross_entropy_", "CompositeExplicitAutograd")
def _op_inplace(input, target, weight, ignore_index, reduction, num_items, label_smoothing, backend):
    rows = Rows(input, target, weight, ignore_index, label_smoothing)
    loss = _run_forward(rows, reduction, num_items, input, backend)[0]
    torch.autograd.graph.increment_version(input)  # autograd must notice, as after any in-place op
    return loss


@torch.library.register_fake("superfine::cross_entropy_", lib=LIBRARY)
def _op_inplace_fake(input, target, weight, ignore_index, reduction, num_items, label_smoothing, backend):
    return input.new_empty((), dtype=opmath_dtype(input.dtype))


@torch.library.impl(LIBRARY, "cross_entropy_backward", "CompositeExplicitAutograd")
def _op_backward(input, target, weight, ignore_index, label_smoothing, lse, scale, backend):
    return _run_backward(Rows(input, target, weight, ignore_index, label_smoothing), lse, scale, backend)


@torch.library.register_fake("superfine::cross_entropy_backward", lib=LIBRARY)
def _op_backward_fake(input, target, weight, ignore_index, label_smoothing, lse, scale, backend):
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, target, weight, ctx.ignore_index, ctx.reduction, *options = inputs
    ctx.num_items, ctx.label_smoothing, ctx.fused, ctx.backend = options
    _, lse, dlogits = output
    ctx.mark_non_differentiable(lse, dlogits)
    ctx.set_materialize_grads(False)
    if ctx.fused:
        ctx.save_for_backward(dlogits)
    else:
        ctx.save_for_backward(input, target, weight, lse)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 9
    dinput = _times_upstream(ctx.saved_tensors[0], grad) if ctx.fused else _two_phase_gradient(ctx, grad)
    return dinput, *(None,) * 8


def _two_phase_gradient(ctx: Any, grad: Tensor) -> Tensor:
    input, target, weight, lse = ctx.saved_tensors
    if torch.is_grad_enabled() and input.requires_grad:  # backward(create_graph=True)
        warn_once("cross_entropy: a second derivative is asked for; eager torch computes the gradient")
        reduction = next(name for name, code in REDUCTIONS.items() if code == ctx.reduction)
        rest = (ctx.ignore_index, reduction, ctx.label_smoothing, ctx.num_items or None)
        loss = reference(input, target, weight, *rest)
        return torch.autograd.grad(loss, input, grad, create_graph=True)[0]
    scale = grad.to(lse.dtype)
    if ctx.reduction == MEAN:
        scale = scale / (ctx.num_items or sum_of_weights(target, weight, ctx.ignore_index, lse.dtype))
    arguments = (input, target, weight, ctx.ignore_index, ctx.label_smoothing, lse, scale, ctx.backend)
    return torch.ops.superfine.cross_entropy_backward(*arguments)


def _times_upstream(dlogits: Tensor, grad: Tensor, op: str = "cross_entropy") -> Tensor:
    # Reading the value is free on the CPU only, and only where nothing traces or batches.
    batched = in_functional_transform() or torch._C._functorch.is_legacy_batchedtensor(grad)
    readable = type(grad) is Tensor and not batched
    if not readable or grad.device.type != "cpu" or grad.item() != 1:
        dlogits = dlogits * grad
    elif _graph_is_kept():
        dlogits = dlogits.clone()  # a later backward needs it as it is, whatever the caller does
    if torch.is_grad_enabled() and readable:  # backward(create_graph=True)
        fail = torch._C._functions.DelayedError(
            f"{op}: a second derivative is asked for, and the fused backward keeps no logits; "
            "pass backend='reference'",
            1,
        )
        return fail(dlogits.detach().requires_grad_())
    return dlogits


def _graph_is_kept() -> bool:
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


torch.library.register_autograd(
    "superfine::cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)


class _Fused(torch.autograd.Function):
    """The fused way without the dispatcher, which for a small classifier costs more than the loss.

    In place, the logits' memory becomes the gradient and their version counts up.
    """

    @staticmethod
    def forward(ctx, input, inplace, target, weight, ignore_index, reduction, num_items, smoothing, backend):
        arguments = (target, weight, ignore_index, reduction, num_items, smoothing)
        if inplace:
            dlogits = input.detach()
            loss = torch.ops.superfine.cross_entropy_(dlogits, *arguments, backend)
        else:
            loss, _, dlogits = _op(input, *arguments, True, backend)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return _times_upstream(ctx.saved_tensors[0], grad), *(None,) * 8


# --- public ---------------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy as `torch.nn.functional.cross_entropy`, reading each logit once and writing its gradient once.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, bfloat16, float16 or float64, any strides.
        target: classes (), (N) or (N, d1, ...), int64 or int32, or class probabilities of the shape of `input`
            (eager torch computes those, with one warning).
        weight: one weight a class, shape (C).
        ignore_index: rows with this label have no loss and a gradient of exactly zero, whatever their logits.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        num_items: what "mean" divides the sum of the losses by, instead of what counts in this call: for instance the
            labels of all steps of accumulation, on all processes. A number or a tensor of one element, above 0; on
            a GPU it is not waited for. With every label ignored the loss is then 0.
        inplace: the gradient may overwrite the memory of `input`, which then no longer holds the logits; needs a
            reduction and an input that is not a leaf. Saves a buffer of the size of the logits where the logits
            are a matrix with contiguous rows and not float16, whose loss scale arrives only in backward.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or the shape of `target` for "none". With "mean"
        and every label ignored it is NaN, as in torch, and the gradient zero.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also a label outside [0, C),
            named with its position. On a GPU such a label gives NaN without waiting for the device. Nothing has
            been written then.
    """
    _check(input, target, weight, reduction, label_smoothing, num_items, inplace)
    if target.is_floating_point():
        warn_once("cross_entropy: class probabilities have no kernel yet; eager torch computes them")
        backend = "reference"
    if in_functional_transform():
        warn_once("cross_entropy: torch.func and forward-mode AD have no kernel; eager torch computes them")
        backend = "reference"
    if backend == "reference":
        return reference(input, target, weight, ignore_index, reduction, label_smoothing, num_items)
    if isinstance(num_items, Tensor) and num_items.device.type != "cpu":
        rest = (weight, ignore_index, "sum", label_smoothing)
        return cross_entropy(input, target, *rest, inplace=inplace, backend=backend) / num_items.reshape(())
    logits = input if input.dim() <= 2 else input.movedim(1, -1)
    logits = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    labels = target.reshape(-1)
    if weight is not None:
        weight = weight.to(opmath_dtype(input.dtype)).contiguous()
    options = (REDUCTIONS[reduction], float(num_items or 0), float(label_smoothing))
    arguments = (labels, weight, ignore_index, *options)
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    # float16 gradients want the loss scale before they are rounded, and it is known only in backward.
    early = reduction != "none" and input.dtype != torch.float16
    fused = needs_gradient and early and input.device.type == "cpu"
    inplace = inplace and early and not torch.compiler.is_compiling()  # the compiler plans memory itself
    if needs_gradient and (inplace or (fused and is_plain((logits, labels)))):
        return _Fused.apply(logits, inplace, *arguments, backend or "")
    loss = torch.ops.superfine.cross_entropy(logits, *arguments, fused, backend or "")[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    num_items: float | Tensor | None,
    inplace: bool,
) -> None:
    def expect(
        condition: bool, argument: str, value: object, expected: str, error: type[Exception] = ValueError
    ) -> None:
        if not condition:
            reject("cross_entropy", argument, value, expected, error)

    for name, tensor in (("input", input), ("target", target)):
        expect(isinstance(tensor, Tensor), name, tensor, "a torch.Tensor", TypeError)
    expect(input.dtype in DTYPE_CODES, "input", input, "float32, bfloat16, float16 or float64", TypeError)
    expect(input.dim() >= 1, "input", input, "(C), (N, C) or (N, C, d1, ...)")
    classes = input.shape[0 if input.dim() == 1 else 1]
    expect(classes > 0, "input", input, "at least one class")
    if target.is_floating_point():
        expect(target.shape == input.shape, "target", target, f"probabilities of shape {tuple(input.shape)}")
    else:
        expect(
            target.dtype in (torch.int64, torch.int32), "target", target, "int64 or int32 classes", TypeError
        )
        shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
        expect(target.shape == shape, "target", target, f"classes of shape {tuple(shape)}")
    expect(target.device == input.device, "target", target, f"a tensor on {input.device}")
    check_options("cross_entropy", classes, input.device, weight, reduction, label_smoothing, num_items)
    if inplace:
        expect(reduction != "none", "reduction", reduction, "'mean' or 'sum' with inplace=True")
        expect(
            not (input.requires_grad and input.is_leaf), "input", "a leaf that requires grad",
            "the output of an op: inplace=True overwrites it",
        )  # fmt: skip
        expect(
            not _overlaps_itself(input),
            "input",
            f"a tensor with strides {input.stride()}",
            "memory of its own for every element with inplace=True",
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory: each stride must step over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
