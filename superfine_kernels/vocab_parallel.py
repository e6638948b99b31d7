"""Cross-entropy of logits that lie in parts of the vocabulary on the processes of a group.

    part of a process:  M = max y_c, sum exp(y_c - M), sum v_c, sum v_c (y_c - M)     over its classes
    loss, lse:          from the parts of all, exchanged in one all-gather: 4 numbers a row
    gradients:          of a process's own logits, weight and bias: without communication; of the input of the linear
                        layer: summed over the group in float32

The formula is that of cross_entropy.py; input and targets are the same on all processes, as in tensor-parallel
training (Megatron-LM, Shoeybi et al. 2019). Every process gets the whole loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from superfine_kernels import _backends
from superfine_kernels import _cross_entropy_backends as backends
from superfine_kernels._class_tiles import (
    TRAINABLE,
    Problem,
    checked_tile_bytes,
    gradients,
    join,
    row_results,
    spread,
)
from superfine_kernels._head import Head
from superfine_kernels._library import DTYPE_CODES, no_second_derivative, opmath_dtype, reject
from superfine_kernels._losses import (
    REDUCTIONS,
    ROW_RESULTS,
    Options,
    Rows,
    as_softcap,
    check_labels,
    check_options,
    check_targets,
    flat_targets,
    reduced,
    with_statistics,
)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Any:
    """`cross_entropy` of logits whose classes lie on the processes of a group, in the order of their ranks.

    Args:
        input: this process's logits, (..., classes of this process), at least one; the numbers of classes may differ.
        target: classes among those of all processes, (...); or (..., K) beside `probabilities`; or probabilities of
            all classes. The same on every process.
        weight: one weight a class, of all classes.
        ignore_index, reduction, label_smoothing: as in `cross_entropy`.
        group: of torch.distributed; None for the default one.
        options: probabilities, z_loss, softcap, scale, shift, num_items, return_stats, check, as in `cross_entropy`.

    Returns:
        The loss, the same on every process; with `return_stats` a pair. Gradients reach `input`; backward does not
        communicate.

    Raises:
        ValueError, TypeError: as `cross_entropy`, on every process alike where the arguments are alike.
    """
    op = "vocab_parallel_cross_entropy"
    if not isinstance(input, Tensor):
        reject(op, "input", input, "a torch.Tensor", TypeError)
    if input.dtype not in DTYPE_CODES or input.dim() < 1 or input.shape[-1] == 0:
        reject(op, "input", input, "floating-point logits (..., classes of this process)", TypeError)
    call = _Call(
        op, input, input.shape[-1], group, weight, ignore_index, reduction, label_smoothing, **options
    )
    call.take_targets(target)
    logits = input.reshape(-1, input.shape[-1])
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    targets = (call.labels, call.probabilities, call.weight, call.options, call.first_class, call.classes)
    return call.reduce(_LogitsLoss.apply(logits, targets, call.statistics, group))


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    tile_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Any:
    """`linear_cross_entropy` of a layer whose rows lie on the processes of a group, in the order of their ranks.

    Args:
        input: (..., features), the same on every process.
        linear_weight, linear_bias: this process's rows, at least one; their numbers may differ.
        target, weight, group, options: as in `vocab_parallel_cross_entropy`; the others as in `linear_cross_entropy`.

    Returns:
        The loss, the same on every process; with `return_stats` a pair. Backward sums the gradient of `input` over
        the group where that trains, so that every process must then call it.
    """
    op = "vocab_parallel_linear_cross_entropy"
    head = Head(input, linear_weight, linear_bias, None, None, None, None)
    head.check_tensors(op)
    head = head.autocast()
    head.check_shapes(op)
    input, linear_weight, linear_bias = head.input, head.weight, head.bias
    tile_bytes = checked_tile_bytes(op, tile_bytes, input)
    classes = linear_weight.shape[0]
    call = _Call(op, input, classes, group, weight, ignore_index, reduction, label_smoothing, **options)
    call.take_targets(target)
    flat = input.reshape(-1, input.shape[-1])
    rest = (None, None, None, None, call.labels, call.probabilities, call.weight, call.options)
    places = (tile_bytes, 0.0, "", call.first_class, call.classes)
    found = _LinearLoss.apply(flat, linear_weight, linear_bias, (*rest, *places), call.statistics, group)
    return call.reduce(found)


class _Call:
    """Checked options, targets and this process's place among the classes; and what is made of the rows' losses."""

    def __init__(
        self,
        op: str,
        input: Tensor,
        classes: int,
        group: dist.ProcessGroup | None,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        *,
        probabilities: Tensor | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        scale: float = 1.0,
        shift: bool = False,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
        check: bool = False,
    ) -> None:
        cap = as_softcap(op, softcap)
        self.options = Options(ignore_index, float(label_smoothing), float(z_loss), cap, float(scale))
        counts = [
            torch.zeros(1, dtype=torch.int64, device=input.device) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(counts, torch.tensor([classes], device=input.device), group)
        self.first_class = int(sum(counts[: dist.get_rank(group)]))
        self.classes = int(sum(counts))
        check_options(op, self.classes, input.device, weight, reduction, self.options, num_items)
        if _backends.only_reference(input.device):
            reject(op, "input", input, "a device with kernels: see superfine_kernels.backends()")
        if probabilities is not None and isinstance(probabilities, Tensor) and probabilities.requires_grad:
            reject(op, "probabilities", "a tensor that requires grad", "constants")
        self.op, self.input, self.reduction, self.num_items = op, input, reduction, num_items
        self.shift, self.statistics, self.check = shift, return_stats, check
        self.weight = None if weight is None else weight.to(opmath_dtype(input.dtype)).contiguous()
        self.probabilities = probabilities
        self.labels: Tensor | None = None

    def take_targets(self, target: Tensor) -> None:
        shape = self.input.shape[:-1]
        if not isinstance(target, Tensor):
            reject(self.op, "target", target, "a torch.Tensor", TypeError)
        if target.requires_grad:
            reject(self.op, "target", "a tensor that requires grad", "constants")
        dense = (*shape, self.classes)
        flags = {"shift": self.shift, "return_stats": self.statistics}
        check_targets(self.op, target, self.probabilities, shape, dense, **flags)
        if target.device != self.input.device:
            reject(self.op, "target", target, f"a tensor on {self.input.device}")
        ignore_index, dtype = self.options.ignore_index, opmath_dtype(self.input.dtype)
        self.labels, self.probabilities = flat_targets(
            target, self.probabilities, ignore_index, self.shift, dtype
        )
        if self.labels is not None and (self.check or self.labels.device.type == "cpu"):
            check_labels(self.op, self.labels, self.classes, ignore_index)

    def reduce(self, found: tuple[Tensor, Tensor]) -> Any:
        losses, statistics = found
        shape = self.input.shape[:-1]
        counts = (self.labels, self.probabilities, self.weight, self.options.ignore_index, self.num_items)
        loss = reduced(losses, REDUCTIONS[self.reduction], *counts)
        loss = loss.reshape(shape) if self.reduction == "none" else loss
        return with_statistics(loss, statistics, shape, self.statistics)


def _of_all(part: Tensor, target: Tensor | None, options: Options, group: dist.ProcessGroup | None) -> Tensor:
    """Results of every row from the parts of all processes."""
    parts = part.new_empty((dist.get_world_size(group), *part.shape))
    dist.all_gather(list(parts.unbind()), part.contiguous(), group)
    return row_results(join(parts), target, options)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, targets, statistics, group):
        rows = Rows(input, *targets)
        backend = _backends.choose("vocab_parallel_cross_entropy", input.device)
        results = _of_all(backends.part(rows, statistics, backend), rows.target, rows.options, group)
        ctx.save_for_backward(input, results[1:ROW_RESULTS].contiguous(), *targets[:3])
        ctx.rest, ctx.backend = targets[3:], backend
        ctx.mark_non_differentiable(statistic := results[ROW_RESULTS:].clone())
        return results[0].clone(), statistic

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise no_second_derivative("vocab_parallel_cross_entropy", "create_graph=False")
        input, sums, *targets = ctx.saved_tensors
        dlogits = backends.new_gradient(input)
        backends.gradient_to(Rows(input, *targets, *ctx.rest), sums, grad.contiguous(), dlogits, ctx.backend)
        return dlogits, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, rest, statistics, group):
        whole = Problem(input, linear_weight, linear_bias, *rest)
        p, rows = whole.without_ignored()
        part = join(p.parts(statistics)[0])
        results = _of_all(part, p.target, p.options, group)
        sums = results[1:ROW_RESULTS].contiguous()
        ctx.save_for_backward(input, linear_weight, linear_bias, sums, *rest[:7])
        ctx.rest, ctx.group = rest[7:], group
        results = spread(results, rows, len(input), 1)
        ctx.mark_non_differentiable(statistic := results[ROW_RESULTS:].clone())
        return results[0].clone(), statistic

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise no_second_derivative("vocab_parallel_linear_cross_entropy", "create_graph=False")
        input, linear_weight, linear_bias, sums, *rest = ctx.saved_tensors
        whole = Problem(input, linear_weight, linear_bias, *rest, *ctx.rest)
        p, rows = whole.without_ignored()
        scale = (grad if rows is None else grad[rows]).contiguous()
        wants = dict.fromkeys(TRAINABLE, False) | dict(zip(TRAINABLE, ctx.needs_input_grad[:3], strict=False))
        with torch.autocast(input.device.type, enabled=False):  # forward has cast what is to be cast
            found = gradients(
                p, sums, scale, None, None, wants, None, lambda total: dist.all_reduce(total, group=ctx.group)
            )
        if "input" in found:
            found["input"] = spread(found["input"], rows, len(input), 0)
        return *(found.get(name) for name in TRAINABLE[:3]), None, None, None
