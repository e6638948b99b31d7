"""Cross-entropy over logits, with the gradient of the logits from the same pass.

For one row of logits x over C classes, of which q is wanted (1 at the label, or probabilities), with class weights
w (1 without), label smoothing s and z-loss z:

    y_c  = softcap tanh(scale x_c / softcap), or scale x_c
    lse  = log sum_c exp(y_c)
    v_c  = w_c ((1 - s) q_c + s/C)
    loss = sum_c v_c (lse - y_c) + z lse^2
    dx_c = [(sum_c v_c + 2 z lse) exp(y_c - lse) - v_c] dy_c/dx_c

reduced as `torch.nn.functional.cross_entropy` does (the mean divides by the sum of w_t over the labels t that are
not ignored, with probabilities by the rows). Losses are float32 (float64 for float64 logits) whatever the dtype of
the logits. The z-loss is that of PaLM (Chowdhery et al. 2022), the softcap that of Gemma 2 (2024).

Two ways to the gradient. *Fused*: the forward pass writes dx while the row is still in the cache; only dx is
saved, and backward multiplies it by the upstream gradient unless that is known to be 1. *Two-phase*: lse and the sum
of v are saved beside the logits, and backward computes dx from them: for `reduction="none"`, where the upstream
gradient differs from row to row, for float16, whose loss scale must come before the rounding, and on GPUs, where
looking at the upstream gradient would wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends
from superfine_kernels._cross_entropy_backends import new_gradient, run_backward, run_forward
from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    in_functional_transform,
    is_plain,
    opmath_dtype,
    reject,
    warn_once,
)
from superfine_kernels._losses import (
    MEAN,
    NONE,
    OPTIONS_SCHEMA,
    REDUCTIONS,
    ROW_RESULTS,
    ROW_STATISTICS,
    Options,
    Rows,
    as_softcap,
    check_inplace,
    check_labels,
    check_options,
    check_targets,
    denominator,
    flat_targets,
    reduced,
    reference_rows,
    reference_statistics,
    times_upstream,
    with_statistics,
)


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
    **options: Any,
) -> Tensor:
    """Eager torch in float32 (float64 for float64), any number of derivatives: `_losses.reference_rows`, reduced."""
    rest = (weight, ignore_index, reduction, label_smoothing)
    return cross_entropy(input, target, *rest, num_items=num_items, **options, backend="reference")


def _rows(input: Tensor) -> Tensor:
    """(rows, classes) of logits or probabilities shaped (C), (N, C) or (N, C, d1, ...): a view where one can be."""
    if input.dim() == 2:
        return input
    return input.movedim(min(1, input.dim() - 1), -1).reshape(-1, input.shape[min(1, input.dim() - 1)])


# --- ops and autograd -----------------------------------------------------------------------------------------

_TARGETS = "Tensor? target, Tensor? probabilities, Tensor? weight"
_ARGUMENTS = f"{_TARGETS}, {OPTIONS_SCHEMA}, int reduction, float num_items, bool statistics"
LIBRARY.define(
    f"cross_entropy(Tensor input, {_ARGUMENTS}, bool gradient, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"cross_entropy_(Tensor(a!) input, {_ARGUMENTS}, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    f"cross_entropy_backward(Tensor input, {_TARGETS}, {OPTIONS_SCHEMA}, Tensor sums, Tensor upstream, str backend) "
    "-> Tensor"
)
_OPTIONS = len(Options._fields)


def _parse(input: Tensor, *arguments: Any) -> tuple[Rows, int, float, bool]:
    """What ops take: rows, reduction, num_items, statistics."""
    target, probabilities, weight, *rest = arguments
    rows = Rows(input, target, probabilities, weight, Options(*rest[:_OPTIONS]))
    reduction, num_items, statistics = rest[_OPTIONS:]
    return rows, reduction, num_items, statistics


@torch.library.impl(LIBRARY, "cross_entropy", "CompositeExplicitAutograd")
def _op(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *settings, gradient, backend = arguments
    rows, reduction, num_items, statistics = _parse(input, *settings)
    dlogits = new_gradient(input) if gradient else None
    loss, out = run_forward(rows, reduction, num_items, dlogits, statistics, backend)
    if reduction == NONE:
        loss = loss.clone()  # results of an op share no memory
    return loss, out, input.new_empty(0) if dlogits is None else dlogits


@torch.library.impl(LIBRARY, "cross_entropy", "Meta")
def _op_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *settings, gradient, _ = arguments
    rows, reduction, _, statistics = _parse(input, *settings)
    out = rows.new_results(ROW_STATISTICS if statistics else ROW_RESULTS)
    loss = out.new_empty(input.shape[:1] if reduction == NONE else ())
    return loss, out, input.new_empty(input.shape if gradient else 0)


@torch.library.impl(LIBRARY, "cross_entropy_", "CompositeExplicitAutograd")
def _op_inplace(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *settings, backend = arguments
    rows, reduction, num_items, statistics = _parse(input, *settings)
    results = run_forward(rows, reduction, num_items, input, statistics, backend)
    torch.autograd.graph.increment_version(input)  # autograd must notice, as after any in-place op
    return results


@torch.library.impl(LIBRARY, "cross_entropy_", "Meta")
def _op_inplace_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _op_fake(input, *arguments[:-1], False, "")[:2]


@torch.library.impl(LIBRARY, "cross_entropy_backward", "CompositeExplicitAutograd")
def _op_backward(*arguments: Any) -> Tensor:
    input, target, probabilities, weight, *options, sums, scale, backend = arguments
    return run_backward(Rows(input, target, probabilities, weight, Options(*options)), sums, scale, backend)


@torch.library.impl(LIBRARY, "cross_entropy_backward", "Meta")
def _op_backward_fake(input: Tensor, *_: Any) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, target, probabilities, weight, *rest = inputs
    ctx.options, (ctx.reduction, ctx.num_items, _, ctx.fused, ctx.backend) = rest[:_OPTIONS], rest[_OPTIONS:]
    _, out, dlogits = output
    ctx.mark_non_differentiable(out, dlogits)
    ctx.set_materialize_grads(False)
    if ctx.fused:
        ctx.save_for_backward(dlogits)
    else:
        ctx.save_for_backward(input, target, probabilities, weight, out)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_OPTIONS + 8)
    if grad is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    dinput = (
        times_upstream(ctx.saved_tensors[0], grad, "cross_entropy")
        if ctx.fused
        else _two_phase_gradient(ctx, grad)
    )
    return dinput, *nothing


def _two_phase_gradient(ctx: Any, grad: Tensor) -> Tensor:
    input, target, probabilities, weight, out = ctx.saved_tensors
    options = Options(*ctx.options)
    scale = grad.to(out.dtype)
    if ctx.reduction == MEAN:
        counted = (target, probabilities, weight, options.ignore_index, out.dtype)
        scale = scale / (ctx.num_items or denominator(*counted))
    if torch.is_grad_enabled() and input.requires_grad:  # backward(create_graph=True)
        warn_once("cross_entropy: a second derivative is asked for; eager torch computes the gradient")
        losses, _ = reference_rows(input.to(out.dtype), target, probabilities, weight, options)
        return torch.autograd.grad(losses, input, scale.expand_as(losses), create_graph=True)[0]
    sums = out[1:ROW_RESULTS]
    arguments = (input, target, probabilities, weight, *options, sums, scale, ctx.backend)
    return torch.ops.superfine.cross_entropy_backward(*arguments)


torch.library.register_autograd(
    "superfine::cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)


class _Fused(torch.autograd.Function):
    """The fused way without the dispatcher, which for a small classifier costs more than the loss.

    In place, the logits' memory becomes the gradient and their version counts up.
    """

    @staticmethod
    def forward(ctx, input, inplace, arguments, backend):
        if inplace:
            dlogits = input.detach()
            loss, out = torch.ops.superfine.cross_entropy_(dlogits, *arguments, backend)
        else:
            loss, out, dlogits = _op(input, *arguments, True, backend)
        ctx.mark_non_differentiable(out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogits)
        return loss, out

    @staticmethod
    def backward(ctx, grad, _):
        return (
            None if grad is None else times_upstream(ctx.saved_tensors[0], grad, "cross_entropy"),
            None,
            None,
            None,
        )


# --- public ---------------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    probabilities: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    shift: bool = False,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy as `torch.nn.functional.cross_entropy`, reading each logit once and writing its gradient once.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, bfloat16, float16 or float64, any strides.
        target: classes (), (N) or (N, d1, ...), int64 or int32; or probabilities of all classes, floats of the shape
            of `input`; or, with `probabilities`, K classes for each of these: (..., K).
        weight: one weight a class, 0 or above, shape (C).
        ignore_index: rows with this label have no loss and a gradient of exactly zero, whatever their logits. Beside
            `probabilities` it marks a place among the K that does not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        probabilities: of the K classes in `target`, of its shape: for instance the largest of a teacher. They need
            not add up to 1; a class may occur twice. "mean" divides by the rows with a class that counts.
        z_loss: adds `z_loss * logsumexp(row)**2` to the loss of every row that counts.
        softcap: the logits become `softcap * tanh(logits / softcap)`.
        scale: what the logits are multiplied by before that.
        shift: position i of the last dimension of `target` is scored against the label at i + 1, as in a causal
            language model, and the last position has no loss. Logits are not copied for that.
        num_items: what "mean" divides the sum of the losses by, instead of what counts in this call: for instance the
            labels of all steps of accumulation, on all processes. A number or a tensor of one element, above 0; on
            a GPU it is not waited for. With every label ignored the loss is then 0.
        inplace: the gradient may overwrite the memory of `input`, which then no longer holds the logits; needs a
            reduction and an input that is not a leaf. Saves a buffer of the size of the logits where the logits
            are a matrix with contiguous rows and not float16, whose loss scale arrives only in backward.
        return_stats: also return a `CrossEntropyStats` of the labels, from the same reading of the logits.
        check: on a GPU, wait for the device to raise for a label out of range, as on the CPU always.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or for "none" the shape of `target` (without K).
        With "mean" and every label ignored it is NaN, as in torch, and the gradient zero. With `return_stats`, a
        pair: the loss, and (logprob, entropy, correct) of the shape of `target`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also a label outside [0, C),
            named with its position. On a GPU such a label gives NaN without waiting for the device. Nothing has
            been written then.
    """
    options = Options(
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        as_softcap("cross_entropy", softcap),
        float(scale),
    )
    _check(input, target, probabilities, weight, reduction, options, num_items, shift, return_stats)
    if inplace:
        check_inplace("cross_entropy", input, reduction)
    dtype, shape = (
        opmath_dtype(input.dtype),
        input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size(),
    )
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    wanted = target if not target.is_floating_point() or target.dim() < 2 else target.movedim(1, -1)
    labels, probabilities = flat_targets(wanted, probabilities, ignore_index, shift, dtype)
    logits = _rows(input)
    divide_by = None
    if isinstance(num_items, Tensor) and (num_items.device.type != "cpu" or torch.compiler.is_compiling()):
        divide_by, num_items, reduction = num_items.reshape(()), None, "sum"
    backend = _without_kernel(input.device, probabilities) or backend or ""
    eager = backend == "reference"
    if labels is not None and (check or (eager and labels.device.type == "cpu" and is_plain([labels]))):
        check_labels("cross_entropy", labels, logits.shape[1], ignore_index)
    if eager:
        loss, stats = _by_reference(
            logits, labels, probabilities, weight, options, reduction, num_items, return_stats
        )
    else:
        loss, stats = _by_kernel(
            logits,
            labels,
            probabilities,
            weight,
            options,
            reduction,
            num_items,
            return_stats,
            inplace,
            backend,
        )
    if divide_by is not None:
        loss = loss / divide_by
    elif reduction == "none":
        loss = loss.reshape(shape)
    return with_statistics(loss, stats, shape, return_stats)


def _without_kernel(device: torch.device, probabilities: Tensor | None) -> str | None:
    if in_functional_transform():
        warn_once("cross_entropy: torch.func and forward-mode AD have no kernel; eager torch computes them")
        return "reference"
    if probabilities is not None and probabilities.requires_grad and torch.is_grad_enabled():
        warn_once("cross_entropy: probabilities that require grad have no kernel; eager torch computes them")
        return "reference"
    return "reference" if _backends.only_reference(device) else None


def _by_reference(logits, labels, probabilities, weight, options, reduction, num_items, statistics):
    x = logits.to(opmath_dtype(logits.dtype))
    losses, _ = reference_rows(x, labels, probabilities, weight, options)
    stats = reference_statistics(x, labels, options) if statistics else ()
    counts = (labels, probabilities, weight, options.ignore_index, num_items)
    return reduced(losses, REDUCTIONS[reduction], *counts), stats


def _by_kernel(
    logits, labels, probabilities, weight, options, reduction, num_items, statistics, inplace, backend
):
    if not torch.compiler.is_compiling() and logits.is_neg():
        logits = logits.resolve_neg()
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    numbers = (REDUCTIONS[reduction], float(num_items or 0), statistics)
    arguments = (labels, probabilities, weight, *options, *numbers)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    # float16 gradients want the loss scale before they are rounded, and it is known only in backward.
    early = reduction != "none" and logits.dtype != torch.float16
    fused = needs_gradient and early and logits.device.type == "cpu"
    inplace = inplace and early and not torch.compiler.is_compiling()  # the compiler plans memory itself
    tensors = [t for t in (logits, labels, probabilities) if t is not None]
    if needs_gradient and (inplace or (fused and is_plain(tensors))):
        loss, out = _Fused.apply(logits, inplace, arguments, backend)
    else:
        loss, out, _ = torch.ops.superfine.cross_entropy(logits, *arguments, fused, backend)
    return loss, out[ROW_RESULTS:] if statistics else ()


def _check(
    input: Tensor,
    target: Tensor,
    probabilities: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    options: Options,
    num_items: float | Tensor | None,
    shift: bool,
    return_stats: bool,
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
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    check_targets(
        "cross_entropy", target, probabilities, shape, input.shape, shift=shift, return_stats=return_stats
    )
    expect(target.device == input.device, "target", target, f"a tensor on {input.device}")
    check_options("cross_entropy", classes, input.device, weight, reduction, options, num_items)
