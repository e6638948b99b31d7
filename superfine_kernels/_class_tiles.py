"""Tiles of classes, between a linear layer and its cross-entropy: what linear_cross_entropy.py does with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import opmath_dtype, threads
from superfine_kernels._losses import Rows, sum_of_weights

# On a CPU a tile stays in the caches between the product that makes it and those that use it; on a GPU it is large
# enough to fill the device.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# A narrower tile would make the product with it wait for memory.
LEAST_CLASSES = 1024


@dataclass(frozen=True)
class Problem:
    """Checked arguments: input is rows x features, target one label a row, int64."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    tile_bytes: int
    backend: str

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0]

    def tiles(self) -> Iterator[slice]:
        fit = self.tile_bytes // (max(1, self.input.shape[0]) * self.input.element_size())
        step = min(self.classes, max(LEAST_CLASSES, fit // 256 * 256))
        for first in range(0, self.classes, step):
            yield slice(first, min(first + step, self.classes))

    def new_buffer(self) -> Tensor:
        widest = next(self.tiles())
        return self.input.new_empty(self.input.shape[0] * widest.stop)

    def logits(self, tile: slice, buffer: Tensor) -> Tensor:
        """rows x classes of the tile, in the buffer."""
        rows, width = self.input.shape[0], tile.stop - tile.start
        out = buffer[: rows * width].view(rows, width)
        part = self.linear_weight[tile].t()
        if self.linear_bias is None:
            return torch.mm(self.input, part, out=out)
        return torch.addmm(self.linear_bias[tile], self.input, part, out=out)

    def without_ignored(self) -> tuple[Problem, Tensor | None]:
        """The problem of the rows that count, and their positions; None where all do, or to look would wait."""
        if self.input.device.type != "cpu":
            return self, None
        counted = self.target != self.ignore_index
        if counted.all():
            return self, None
        rows = counted.nonzero().flatten()
        return replace(self, input=self.input[rows], target=self.target[rows]), rows


def _arguments(p: Problem, logits: Tensor, tile: slice) -> dict[str, Any]:
    rows = Rows(logits, p.target, p.weight, p.ignore_index, p.label_smoothing)
    return {**rows.native(), "first_class": tile.start, "classes": p.classes}


def _part(p: Problem, logits: Tensor, tile: slice) -> Tensor:
    """What a tile adds to the losses: 4 x rows, as `_cpu.cross_entropy_part` says."""
    name, _, isa = _backends.choose("linear_cross_entropy", logits.device, p.backend).partition(":")
    if name == "cpu":
        out = logits.new_empty(4, logits.shape[0], dtype=opmath_dtype(logits.dtype))
        _cpu.cross_entropy_part(**_arguments(p, logits, tile), out=out.data_ptr(), threads=threads(), isa=isa)
        return out
    x = logits.to(opmath_dtype(logits.dtype))
    maximum = x.amax(1)
    exponentials = (x - torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]).exp()
    column, inside = _columns(p, tile)
    at_target = x.gather(1, column[:, None])[:, 0]
    smooth = torch.zeros_like(maximum)
    if p.label_smoothing > 0:
        smooth = (x if p.weight is None else x * p.weight[tile]).sum(1)
    return torch.stack([maximum, exponentials.sum(1), torch.where(inside, at_target, 0.0), smooth])


def to_gradient(p: Problem, logits: Tensor, tile: slice, lse: Tensor, scale: Tensor) -> None:
    """Overwrites a tile of logits with scale * dloss/dlogits."""
    name, _, isa = _backends.choose("linear_cross_entropy", logits.device, p.backend).partition(":")
    if name == "cpu":
        _cpu.cross_entropy_backward(
            **_arguments(p, logits, tile),
            lse=lse.data_ptr(),
            scale=scale.data_ptr(),
            scale_stride=scale.stride(0) if scale.dim() else 0,
            dlogits=logits.data_ptr(),
            threads=threads(),
            isa=isa,
        )
        return
    hard, per_class = _coefficients(p, lse.dtype)
    weights = torch.ones((), dtype=lse.dtype, device=lse.device) if p.weight is None else p.weight
    total = p.classes * weights if p.weight is None else weights.sum()
    x = (logits.to(lse.dtype) - lse[:, None]).exp() * (hard + per_class * total)[:, None]
    x -= per_class * (weights if p.weight is None else weights[tile])
    column, inside = _columns(p, tile)
    x.scatter_add_(1, column[:, None], torch.where(inside, -hard, 0.0)[:, None])
    x *= scale[:, None] if scale.dim() else scale
    logits.copy_(torch.where((p.target == p.ignore_index)[:, None], 0.0, x))


def _columns(p: Problem, tile: slice) -> tuple[Tensor, Tensor]:
    """Every row's column of its label in the tile, and whether the label is there; else the column is any."""
    column = p.target - tile.start
    inside = (column >= 0) & (p.target < tile.stop)
    return column.clamp(0, tile.stop - tile.start - 1), inside


def _coefficients(p: Problem, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(1 - s) w_t of every row, and s / C."""
    if p.weight is None:
        weight = torch.ones(p.target.shape, dtype=dtype, device=p.target.device)
    else:
        weight = p.weight[p.target.clamp(0, p.classes - 1)]
    return (1 - p.label_smoothing) * weight, p.label_smoothing / p.classes


def row_losses(p: Problem) -> tuple[Tensor, Tensor]:
    """(loss, lse) of every row, unreduced."""
    buffer = p.new_buffer()
    parts = torch.stack([_part(p, p.logits(tile, buffer), tile) for tile in p.tiles()])
    maxima, sums, at_target, smooth = parts.unbind(1)
    maximum = maxima.amax(0)
    shift = torch.where(maximum == -torch.inf, 0.0, maximum)
    log_sum = (sums * (maxima - shift).exp()).sum(0).log()
    hard, per_class = _coefficients(p, log_sum.dtype)
    # Differences of logits, not of lse, so that an offset common to a row costs no digits.
    loss = hard * (log_sum + (maximum - at_target.sum(0)))
    if p.label_smoothing > 0:
        total = p.classes if p.weight is None else p.weight.sum()
        loss = loss + per_class * (total * (log_sum + maximum) - smooth.sum(0))
    counted = p.target != p.ignore_index
    valid = (p.target >= 0) & (p.target < p.classes)  # a label out of range has a loss and gradients of NaN
    loss, lse = (torch.where(valid, x, torch.nan) for x in (loss, log_sum + maximum))
    return torch.where(counted, loss, 0.0), torch.where(counted, lse, 0.0)


def denominator(p: Problem, dtype: torch.dtype) -> Tensor:
    total = sum_of_weights(p.target, p.weight, p.ignore_index, dtype)
    return torch.where(total == 0, torch.nan, total)
