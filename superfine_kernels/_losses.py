"""What the losses over classes share: options, targets and rows of logits as kernels take them, checks, results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from superfine_kernels._library import (
    DTYPE_CODES,
    is_batched,
    is_plain,
    no_second_derivative,
    opmath_dtype,
    reject,
)

_CPU = torch.device("cpu")
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NONE, MEAN = REDUCTIONS["none"], REDUCTIONS["mean"]
_INTEGERS = (torch.int64, torch.int32)


class Options(NamedTuple):
    """Numbers of a loss over classes, in the order in which ops take them: `OPTIONS_SCHEMA`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    scale: float = 1.0

    def transform(self, x: Tensor) -> Tensor:
        """The logits that the softmax is of."""
        x = x if self.scale == 1 else x * self.scale
        return torch.tanh(x / self.softcap) * self.softcap if self.softcap else x


#: Of `softcap` and `scale`, and 1 / this the largest: float32 holds them and their quotient.
LEAST_SCALE = 1e-18
OPTIONS_SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap, float scale"


class CrossEntropyStats(NamedTuple):
    """Of every row, beside its loss: zeros where the label is ignored."""

    logprob: Tensor  # log of the label's probability; of the type of the loss
    entropy: Tensor  # of the probabilities, in nats; of the type of the loss
    correct: Tensor  # bool: the first of the largest logits is the label's


def with_statistics(loss: Tensor, statistics: Any, shape: torch.Size, wanted: bool) -> Any:
    """What a loss returns: itself, and if wanted its statistics, (3, rows), in the shape of the labels."""
    if not wanted:
        return loss
    logprob, entropy, correct = (x.reshape(shape) for x in statistics)
    return loss, CrossEntropyStats(
        logprob, entropy, correct > 0
    )  # NaN where a label is out of range on a GPU


# Numbers a row that kernels write, by csrc/math/cross_entropy.h: without and with statistics.
ROW_RESULTS, ROW_STATISTICS = 3, 6  # loss, lse, mass; logprob, entropy, correct
PART_RESULTS, PART_STATISTICS = 4, 7  # maximum, sum, mass, dot; weighted, at_target, best


@dataclass(frozen=True)
class Rows:
    """Checked arguments: input is rows x vocab with unit stride within a row.

    `target` holds class indices: (rows) labels, or (rows, targets) with `probabilities` (rows, targets); None where
    `probabilities` are of all classes, (rows, classes). Probabilities and weight are dense, of the type of the loss.
    """

    input: Tensor
    target: Tensor | None
    probabilities: Tensor | None
    weight: Tensor | None
    options: Options
    # The input may be a part of a wider matrix: the classes from `first_class` on, of `classes`.
    first_class: int = 0
    classes: int = 0  # 0: those of the input

    def native(self) -> dict[str, Any]:
        """The arguments of `_cpu.CrossEntropy` and `_cuda.CrossEntropy`."""
        target, probabilities = self.target, self.probabilities
        return {
            "input": self.input.data_ptr(),
            "rows": self.input.shape[0],
            "vocab": self.input.shape[1],
            "row_stride": self.input.stride(0),
            "dtype": DTYPE_CODES[self.input.dtype],
            "target": 0 if target is None else target.data_ptr(),
            "target_is_int64": target is not None and target.dtype == torch.int64,
            "target_stride": 0 if target is None else target.stride(0),
            "targets": 0 if target is None else 1 if target.dim() == 1 else target.shape[1],
            "probabilities": 0 if probabilities is None else probabilities.data_ptr(),
            "probabilities_stride": 0 if probabilities is None else probabilities.stride(0),
            "weight": 0 if self.weight is None else self.weight.data_ptr(),
            **self.options._asdict(),
            "first_class": self.first_class,
            "classes": self.classes or self.input.shape[1],
        }

    def new_results(self, count: int) -> Tensor:
        """Room for `count` numbers of every row, one row of the tensor each."""
        return self.input.new_empty((count, self.input.shape[0]), dtype=opmath_dtype(self.input.dtype))


def counted(target: Tensor, ignore_index: int) -> Tensor:
    """Which rows have a label that is not ignored."""
    counts = target.long() != ignore_index  # int32 would wrap an ignore_index that it cannot hold
    return counts if target.dim() == 1 else counts.any(1)


def without_ignored(input: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """Zeros for rows that do not count, which may hold NaN: products over all rows would spread it."""
    if target is None:
        return input
    return torch.where(counted(target, ignore_index)[:, None], input, 0.0)


def denominator(
    target: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """What "mean" divides by: the weights of the labels that count; with probabilities the rows that count.

    NaN for 0. Without waiting for the device or trusting a label.
    """
    if target is None:
        dense = cast(Tensor, probabilities)
        return torch.full((), dense.shape[0], dtype=dtype, device=dense.device)
    counts = counted(target, ignore_index)
    if weight is None or probabilities is not None:
        total = counts.sum(dtype=dtype)
    else:
        total = torch.where(counts, weight[target.long().clamp(0, len(weight) - 1)], 0.0).sum()
    return torch.where(total == 0, torch.nan, total)


def reduced(
    losses: Tensor,
    reduction: int,
    target: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Losses of rows, summed and divided as `reduction` says; `num_items` takes the place of `denominator`."""
    if reduction == NONE:
        return losses
    if reduction != MEAN:
        return losses.sum()
    if num_items is not None:
        return losses.sum() / torch.as_tensor(num_items).reshape(())
    return losses.sum() / denominator(target, probabilities, weight, ignore_index, losses.dtype)


# --- targets --------------------------------------------------------------------------------------------


def flat_targets(
    target: Tensor, probabilities: Tensor | None, ignore_index: int, shift: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Checked targets, classes last, as `Rows` takes them; `shift` moves every sequence by one."""
    if target.is_floating_point():
        return None, target.reshape(-1, target.shape[-1]).to(dtype).contiguous()
    if shift:
        target = _next(target.long(), ignore_index, target.dim() - (probabilities is not None))
    if probabilities is None:
        return target.reshape(-1), None
    if shift:
        probabilities = _next(probabilities, 0, target.dim() - 1)
    targets = target.shape[-1]
    flat = probabilities.reshape(-1, targets).to(dtype).contiguous()
    return target.reshape(-1, targets).contiguous(), flat


def _next(x: Tensor, fill: float, dims: int) -> Tensor:
    """Moves the last of the first `dims` dimensions one to the left."""
    dim, size = dims - 1, x.shape[dims - 1]
    if size == 0:
        return x
    return torch.cat([x.narrow(dim, 1, size - 1), torch.full_like(x.narrow(dim, 0, 1), fill)], dim)


# --- reference ------------------------------------------------------------------------------------------


def reference_rows(
    x: Tensor, target: Tensor | None, probabilities: Tensor | None, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """The unreduced losses of logits (rows, classes) in eager torch, and which rows count."""
    cross_entropy = torch.nn.functional.cross_entropy
    counts = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if target is not None:
        counts = counted(target, options.ignore_index)
    y = options.transform(without_ignored(x, target, options.ignore_index))
    lse = torch.logsumexp(y, 1) if options.z_loss else None
    settings: dict[str, Any] = {"reduction": "none", "label_smoothing": options.label_smoothing}
    if target is None:
        losses = cross_entropy(y, cast(Tensor, probabilities), weight, **settings)
    elif probabilities is None:
        losses = cross_entropy(y, target.long(), weight, ignore_index=options.ignore_index, **settings)
    else:
        slots = target.long() != options.ignore_index
        index = torch.where(slots, target.long(), 0)
        wanted = torch.where(slots, probabilities, 0.0) * (1 if weight is None else weight[index])
        log_p = torch.log_softmax(y, 1)
        losses = -(1 - options.label_smoothing) * torch.where(
            slots, wanted * log_p.gather(1, index), 0.0
        ).sum(1)
        if options.label_smoothing:
            smooth = (log_p if weight is None else log_p * weight).sum(1)
            losses = losses - options.label_smoothing / y.shape[1] * smooth
    if lse is not None:
        losses = losses + options.z_loss * lse.square()
    return torch.where(counts, losses, 0.0), counts


@torch.no_grad()
def reference_statistics(x: Tensor, target: Tensor, options: Options) -> Tensor:
    """(3, rows): logprob, entropy, correct as 0 or 1, of logits (rows, classes)."""
    counts = counted(target, options.ignore_index)
    y = options.transform(x)
    log_p = torch.log_softmax(y, 1)
    label = torch.where(counts, target.long(), 0)
    logprob = log_p.gather(1, label[:, None])[:, 0]
    entropy = torch.special.entr(log_p.exp()).sum(1)
    correct = (y == y.amax(1, keepdim=True)).int().argmax(1) == label
    return torch.where(counts, torch.stack([logprob, entropy, correct.to(y.dtype)]), 0.0)


# --- backward -------------------------------------------------------------------------------------------


def times_upstream(dlogits: Tensor, grad: Tensor, op: str) -> Tensor:
    """The gradient that a forward pass has computed, times the upstream gradient unless that is 1."""
    # Reading the value is free on the CPU only, and only where nothing traces or batches.
    readable = type(grad) is Tensor and not is_batched(grad)
    if not readable or grad.device.type != "cpu":
        dlogits = dlogits * grad
    elif not math.isfinite(value := grad.item()):
        dlogits = torch.where(dlogits == 0, dlogits, dlogits * grad)  # ignored rows have none
    elif value != 1:
        dlogits = dlogits * grad
    elif _graph_is_kept():
        dlogits = dlogits.clone()  # a later backward needs it as it is, whatever the caller does
    if torch.is_grad_enabled() and readable:  # backward(create_graph=True)
        fail = torch._C._functions.DelayedError(
            str(no_second_derivative(op, "backend='reference': the fused backward keeps no logits")), 1
        )
        return fail(dlogits.detach().requires_grad_())
    return dlogits


def _graph_is_kept() -> bool:
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


# --- checks -----------------------------------------------------------------------------------------------


def check_targets(
    op: str,
    target: Tensor,
    probabilities: Tensor | None,
    shape: torch.Size,
    dense: tuple[int, ...],
    *,
    shift: bool,
    return_stats: bool,
) -> None:
    """Of labels of `shape`, or of more classes by index with probabilities, or probabilities of shape `dense`."""
    by_index = not target.is_floating_point()
    if probabilities is not None:
        if not isinstance(probabilities, Tensor):
            reject(op, "probabilities", probabilities, "a torch.Tensor", TypeError)
        few = f"int64 or int32 classes of shape {(*shape, 'K')}, beside probabilities"
        if target.dtype not in _INTEGERS or target.dim() != len(shape) + 1 or target.shape[:-1] != shape:
            reject(op, "target", target, few)
        if target.shape[-1] == 0:
            reject(op, "target", target, "at least one class a row")
        fits = probabilities.shape == target.shape and probabilities.is_floating_point()
        if not fits or probabilities.device != target.device:
            reject(op, "probabilities", probabilities, f"as many as classes: float {tuple(target.shape)}")
    elif by_index:
        if target.dtype not in _INTEGERS:
            reject(op, "target", target, "int64 or int32 classes", TypeError)
        if target.shape != shape:
            reject(op, "target", target, f"classes of shape {tuple(shape)}")
    elif target.shape != dense:
        reject(op, "target", target, f"classes of shape {tuple(shape)}, or probabilities {tuple(dense)}")
    labels = by_index and probabilities is None
    if return_stats and not labels:
        reject(
            op, "return_stats", return_stats, "False beside probabilities: statistics are those of a label"
        )
    if shift and not (by_index and len(shape) > 0):
        reject(op, "shift", shift, "False beside a target that is no sequence of classes")


def check_inplace(op: str, input: Tensor, reduction: str) -> None:
    """That the gradient may overwrite `input`."""
    if reduction == "none":
        reject(op, "reduction", reduction, "'mean' or 'sum' with inplace=True")
    if overlaps_itself(input):
        strides = f"a tensor with strides {input.stride()}"
        reject(op, "input", strides, "memory of its own for every element with inplace=True")
    base = input._base if input._is_view() else input
    if input.requires_grad and base is not None and base.requires_grad and base.is_leaf:
        leaf = "a leaf that requires grad, or a view of one"
        reject(op, "input", leaf, "the output of an op: inplace=True overwrites it")


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory: each stride must step over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def as_softcap(op: str, softcap: float | None) -> float:
    """As kernels take it: 0 for none."""
    if softcap is not None and not LEAST_SCALE <= softcap <= 1 / LEAST_SCALE:
        expected = f"None or a number above 0, from {LEAST_SCALE:g} to {1 / LEAST_SCALE:g}"
        reject(op, "softcap", softcap, expected)
    return float(softcap or 0)


def check_labels(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Names the first label outside [0, classes) that is not ignored. Waits for a GPU."""
    bad = ((target < 0) | (target >= classes)) & (target.long() != ignore_index)
    if bad.any():
        reject_label(op, target, int(bad.flatten().nonzero()[0]), classes, ignore_index)


def reject_label(op: str, target: Tensor, index: int, classes: int, ignore_index: int) -> None:
    """Raises for the label at `index` of the flattened target."""
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), target.shape)) or (0,)
    where = ", ".join(map(str, position))
    raise ValueError(
        f"{op}: target[{where}] is {int(target.reshape(-1)[index])}; expected a class in [0, {classes}) or "
        f"ignore_index ({ignore_index})"
    )


def check_options(
    op: str,
    classes: int,
    device: torch.device,
    weight: Tensor | None,
    reduction: str,
    options: Options,
    num_items: float | Tensor | None,
) -> None:
    """Of a loss over classes: what is not input and target."""
    if weight is not None:
        if not isinstance(weight, Tensor):
            reject(op, "weight", weight, "a torch.Tensor", TypeError)
        if not weight.is_floating_point():
            reject(op, "weight", weight, "a floating-point tensor", TypeError)
        if weight.shape != (classes,):
            reject(op, "weight", weight, f"shape ({classes},), one weight a class")
        if weight.device != device:
            reject(op, "weight", weight, f"a tensor on {device}")
        if weight.requires_grad:
            reject(op, "weight", "a tensor that requires grad", "constant weights")
        if device == _CPU and is_plain([weight]) and (weight < 0).any():
            reject(op, "weight", f"a tensor with {weight.min().item():g}", "weights of 0 or above")
    if reduction not in REDUCTIONS:
        reject(op, "reduction", reduction, "'none', 'mean' or 'sum'")
    if not 0 <= options.label_smoothing <= 1:
        reject(op, "label_smoothing", options.label_smoothing, "a number in [0, 1]")
    if not 0 <= options.z_loss < math.inf:
        reject(op, "z_loss", options.z_loss, "a finite number, 0 or above")
    if not LEAST_SCALE <= options.scale <= 1 / LEAST_SCALE:
        reject(op, "scale", options.scale, f"a number above 0, from {LEAST_SCALE:g} to {1 / LEAST_SCALE:g}")
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        reject(op, "ignore_index", options.ignore_index, "an int", TypeError)
    if not -(2**63) <= options.ignore_index < 2**63:
        reject(op, "ignore_index", options.ignore_index, "64 bits")
    if num_items is None:
        return
    check_num_items(op, device, reduction, num_items)


def check_num_items(op: str, device: torch.device, reduction: str, num_items: float | Tensor) -> None:
    """Of any loss: what a mean divides by."""
    if reduction != "mean":
        reject(op, "num_items", num_items, "None beside a reduction that is not 'mean'")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.is_complex() or num_items.device not in (device, _CPU):
            reject(op, "num_items", num_items, f"a number, or a tensor of one element on {device}")
        if num_items.requires_grad:
            reject(op, "num_items", "a tensor that requires grad", "a constant")
    on_host = not isinstance(num_items, Tensor) or (
        num_items.device == _CPU and not torch.compiler.is_compiling()
    )
    if on_host and not 0 < num_items < math.inf:
        reject(op, "num_items", num_items, "a finite number above 0")
