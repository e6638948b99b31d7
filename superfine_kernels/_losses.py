"""What the losses over classes share: rows of logits as kernels take them, reductions, checks of options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels._library import DTYPE_CODES, opmath_dtype, reject

_CPU = torch.device("cpu")
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NONE, MEAN = REDUCTIONS["none"], REDUCTIONS["mean"]


@dataclass(frozen=True)
class Rows:
    """Checked arguments: input is rows x vocab with unit stride within a row, target one label a row."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def native(self) -> dict[str, Any]:
        return {
            "input": self.input.data_ptr(),
            "rows": self.input.shape[0],
            "vocab": self.input.shape[1],
            "row_stride": self.input.stride(0),
            "dtype": DTYPE_CODES[self.input.dtype],
            "target": self.target.data_ptr(),
            "target_is_int64": self.target.dtype == torch.int64,
            "target_stride": self.target.stride(0),
            "weight": 0 if self.weight is None else self.weight.data_ptr(),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    def new_rows(self) -> Tensor:
        return self.input.new_empty(self.input.shape[0], dtype=opmath_dtype(self.input.dtype))


def sum_of_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Of the labels that count, without waiting for the device or trusting a label."""
    target = target.long()  # int32 would wrap an ignore_index that it cannot hold
    counts = target != ignore_index
    if weight is None:
        return counts.sum(dtype=dtype)
    return torch.where(counts, weight[target.clamp(0, len(weight) - 1)], 0.0).sum()


def check_options(
    op: str,
    classes: int,
    device: torch.device,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
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
    if reduction not in REDUCTIONS:
        reject(op, "reduction", reduction, "'none', 'mean' or 'sum'")
    if not 0 <= label_smoothing <= 1:
        reject(op, "label_smoothing", label_smoothing, "a number in [0, 1]")
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
    if not (isinstance(num_items, Tensor) and num_items.device != _CPU) and not 0 < num_items < math.inf:
        reject(op, "num_items", num_items, "a finite number above 0")
