"""Parts of the classes: tiles of a linear layer and its cross-entropy, shards of a vocabulary; and their union."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels import _cross_entropy_backends as backends
from superfine_kernels._library import in_huge_pages, opmath_dtype, reject, threads
from superfine_kernels._losses import PART_RESULTS, PART_STATISTICS, Options, Rows, counted, denominator

# On a GPU a tile fills the device. On a CPU it stays in the caches between the product that makes it and those that
# use it, and takes so much together with the lower halves of the input gradient's sum (SplitSum): with a product's
# own scratch memory less than a twentieth of the logits of 1024 x 768 inputs and 50257 classes in bfloat16.
TILE_BYTES = {"cpu": 3 << 20, "cuda": 256 << 20}
# A narrower tile would make the product with it wait for memory.
LEAST_CLASSES = 768
# Of a product that is added to a sum of another type.
SUM_ROWS = 256
# oneDNN leaves one of two cores idle in 16-bit products of so many rows and fewer columns than these; not in blocks
# of MOST_ROWS, into which they are cut on any number of cores, so that bits do not depend on it.
IDLE_ROWS, IDLE_CLASSES, MOST_ROWS = range(768, 1537), 1280, 512


def checked_tile_bytes(op: str, tile_bytes: int | None, input: Tensor) -> int:
    """Of the tile of logits of a checked input; 0 for a CPU's default, which is `Problem.step`'s to find."""
    if tile_bytes is None:  # decided here, as under fake tensors an op sees no device
        return TILE_BYTES["cuda"] if input.device.type == "cuda" else 0
    least = max(1, input.numel() // input.shape[-1]) * input.element_size()
    if not isinstance(tile_bytes, int) or tile_bytes < least:
        reject(op, "tile_bytes", tile_bytes, f"at least {least}, the logits of one class")
    return tile_bytes


def spread(x: Tensor, rows: Tensor | None, whole: int, dim: int) -> Tensor:
    """`x` with all rows, `whole` along `dim`, from those at `rows`: zeros where a row was left out."""
    if rows is None:
        return x
    shape = list(x.shape)
    shape[dim] = whole
    return x.new_zeros(shape).index_copy_(dim, rows, x)


# --- union of parts -----------------------------------------------------------------------------------------


def join(parts: Tensor) -> Tensor:
    """(parts, results, rows) to (results, rows): PartResult of csrc/math/cross_entropy.h, of all their classes."""
    maxima, sums, masses, dots, *statistics = parts.unbind(1)
    maximum = maxima.amax(0)
    shifts, shift = (torch.where(x == -torch.inf, 0.0, x) for x in (maxima, maximum))
    factors = (maxima - shift).exp()
    joined = [
        maximum,
        (sums * factors).sum(0),
        masses.sum(0),
        (dots + masses * (shifts - shift)).sum(0),
    ]
    if statistics:
        weighted, at_target, best = statistics
        first = (maxima == maximum).int().argmax(0, keepdim=True)
        # Where a part lies below all that exp can tell from 0, its sum is exactly 0.
        below = torch.where(factors > 0, shifts - shift, 0.0)
        joined.append((factors * (weighted + sums * below)).sum(0))
        joined += [at_target.sum(0), best.gather(0, first)[0]]
    return torch.stack(joined)


def row_results(part: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """From the part that holds all classes: RowResult of csrc/math/cross_entropy.h, (results, rows)."""
    maximum, total, mass, dot = part[:4]
    log_sum = total.log()
    lse = maximum + log_sum
    # Relative to the maximum, so that an offset common to a row costs no digits; no term is negative.
    results = [(mass * log_sum - dot) + options.z_loss * lse.square(), lse, mass]
    if len(part) == PART_STATISTICS:
        weighted, at_target, best = part[4:]
        shift = torch.where(maximum == -torch.inf, 0.0, maximum)
        results += [at_target - shift - log_sum, log_sum - weighted / total]
        results.append(((best == cast(Tensor, target)) & ~total.isnan()).to(part.dtype))
    stacked = torch.stack(results)
    return stacked if target is None else torch.where(counted(target, options.ignore_index), stacked, 0.0)


# --- tiles --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Checked arguments of a linear layer and its loss: input is rows x features; targets as in `Rows`.

    The logits are input . linear_weight^T + linear_bias, with additions. `low_rank_input` (rows x rank) and
    `low_rank_weight` (classes x rank): their product is added. `columns` (rows x few) replaces the products of the
    classes `column_classes`, which are on the CPU.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    low_rank_input: Tensor | None
    low_rank_weight: Tensor | None
    columns: Tensor | None
    column_classes: Tensor | None
    target: Tensor | None
    probabilities: Tensor | None
    weight: Tensor | None
    options: Options
    tile_bytes: int  # 0 for a CPU's default
    skip_mass: float
    backend: str
    # Of a shard of the vocabulary: its place among all `classes`; 0 where there are no others.
    first_class: int = 0
    all_classes: int = 0
    # What tiles are measured by where they must not depend on the rows that count; 0: the rows of the input.
    whole_rows: int = 0

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0]

    def tiles(self) -> Iterator[slice]:
        for first in range(0, self.classes, self.step):
            yield slice(first, min(first + self.step, self.classes))

    @property
    def step(self) -> int:
        rows, x = self.whole_rows or self.input.shape[0], self.input
        lower_halves = rows * x.shape[1] * 2 if x.element_size() == 2 else 0
        size = self.tile_bytes or TILE_BYTES["cpu"] - lower_halves
        fit = size // (max(1, rows) * x.element_size())
        return min(self.classes, max(LEAST_CLASSES, fit // 256 * 256))

    def new_buffer(self) -> Tensor:
        return self.input.new_empty(self.input.shape[0] * self.step)

    def logits(self, tile: slice, buffer: Tensor) -> Tensor:
        """rows x classes of the tile, in the buffer."""
        rows, width = self.input.shape[0], tile.stop - tile.start
        out = buffer[: rows * width].view(rows, width)
        part = self.linear_weight[tile].t()
        idle = out.device.type == "cpu" and out.element_size() == 2
        idle = idle and rows in IDLE_ROWS and width < IDLE_CLASSES
        blocks = -(-rows // MOST_ROWS) if idle else 1
        for input, block in zip(self.input.chunk(blocks), out.chunk(blocks), strict=True):
            if self.linear_bias is None:
                torch.mm(input, part, out=block)
            else:
                torch.addmm(self.linear_bias[tile], input, part, out=block)
        if self.low_rank_input is not None and self.low_rank_weight is not None:
            out.addmm_(self.low_rank_input, self.low_rank_weight[tile].t())
        if self.columns is not None:
            places, inside = self.columns_of(tile)
            replaced = self.columns[:, places]
            if self.linear_bias is not None:
                replaced = replaced + self.linear_bias[tile][inside]
            out[:, inside] = replaced
        return out

    def columns_of(self, tile: slice) -> tuple[Tensor, Tensor]:
        """Of the classes with columns in the tile: their places among the columns, and in the tile."""
        classes = cast(Tensor, self.column_classes)
        places = ((classes >= tile.start) & (classes < tile.stop)).nonzero().flatten()
        device = self.input.device
        return places.to(device), (classes[places] - tile.start).to(device)

    def of_rows(self, rows: Tensor) -> Problem:
        """The problem of these rows alone."""
        names = ("input", "low_rank_input", "columns", "target", "probabilities")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t[rows] for name, t in tensors.items() if t is not None})

    def without_ignored(self) -> tuple[Problem, Tensor | None]:
        """The problem of the rows that count, and their positions; None where all do, or to look would wait."""
        if self.input.device.type != "cpu" or self.target is None:
            return self, None
        counts = counted(self.target, self.options.ignore_index)
        if counts.all():
            return self, None
        rows = counts.nonzero().flatten()
        return self.of_rows(rows), rows

    def rows_of(self, logits: Tensor, tile: slice) -> Rows:
        targets = (self.target, self.probabilities, self.weight, self.options)
        return Rows(logits, *targets, self.first_class + tile.start, self.all_classes or self.classes)

    def chosen_backend(self) -> str:
        return _backends.choose("linear_cross_entropy", self.input.device, self.backend)

    def parts(self, statistics: bool, keep: bool = False) -> tuple[Tensor, Tensor]:
        """(tiles, results, rows): what every tile adds to the results; and, to `keep`, the logits of the last one."""
        buffer, backend, tiles = self.new_buffer(), self.chosen_backend(), list(self.tiles())
        shape = (len(tiles), PART_STATISTICS if statistics else PART_RESULTS, self.input.shape[0])
        found = self.input.new_empty(shape, dtype=opmath_dtype(self.input.dtype))
        for tile, out in zip(tiles, found, strict=True):
            logits = self.logits(tile, buffer)
            backends.part(self.rows_of(logits, tile), statistics, backend, out)
        return found, logits if keep else logits.new_empty(0)

    def to_gradient(self, logits: Tensor, tile: slice, sums: Tensor, scale: Tensor, out: Tensor) -> None:
        """Writes scale * dloss/dlogits to `out`, which may be the logits; `sums`: lse and mass of all classes."""
        backends.gradient_to(self.rows_of(logits, tile), sums, scale, out, self.chosen_backend())

    def denominator(self, dtype: torch.dtype) -> Tensor:
        return denominator(self.target, self.probabilities, self.weight, self.options.ignore_index, dtype)

    def needed(self, parts: Tensor, lse: Tensor) -> Tensor:
        """(tiles, rows): where backward must look, so that what it leaves out of a row has at most `skip_mass`.

        The tiles of the targets are always needed.
        """
        maxima, sums = parts[:, 0], parts[:, 1]
        masses, order = (sums * (maxima - lse).exp()).sort(0)
        needed = torch.empty_like(order, dtype=torch.bool)
        needed.scatter_(0, order, ~(masses.cumsum(0) <= self.skip_mass))  # NaN is needed
        target = self.target if self.target is None or self.target.dim() == 2 else self.target[:, None]
        if target is not None:
            tiles = ((target.long() - self.first_class) // self.step).clamp(0, len(parts) - 1)
            needed.scatter_(0, tiles.t(), True)
        return needed


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, which is rounded to its own type first."""
    if total.dtype == a.dtype == opmath_dtype(a.dtype):
        total.addmm_(a, b)
    elif total.device.type == "cpu":  # a block of the product stays in the caches until it is added
        for block, rows in zip(total.split(SUM_ROWS), a.split(SUM_ROWS), strict=True):
            block += torch.mm(rows, b)
    else:
        total += torch.mm(a, b)


class Sum:
    """Of products over tiles, in float32 (float64) whatever their type, some of a few rows only."""

    def __init__(self, like: Tensor, dtype: torch.dtype, reduce: Callable[[Tensor], None] | None) -> None:
        self.dtype, self.reduce = like.dtype, reduce
        self.total = torch.zeros(like.shape, dtype=dtype, device=like.device)

    def add(self, a: Tensor, b: Tensor, rows: Tensor | None) -> None:
        if rows is not None:
            self.total.index_add_(0, rows, torch.mm(a, b).to(self.total.dtype))
        else:
            add_product(self.total, a, b)

    def result(self) -> Tensor:
        if self.reduce is not None:
            self.reduce(self.total)
        return self.total.to(self.dtype)


class SplitSum:
    """The same of all rows, in bfloat16 on a CPU: the upper halves of the numbers are where the result will be."""

    def __init__(self, like: Tensor, isa: str) -> None:
        self.isa = isa
        self.high = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self.low = torch.zeros(like.shape, dtype=torch.int16, device=like.device)

    def add(self, a: Tensor, b: Tensor, _: Tensor | None) -> None:
        for high, low, part in zip(*(x.split(SUM_ROWS) for x in (self.high, self.low, a)), strict=True):
            block = torch.mm(part, b)
            addresses = (high.data_ptr(), low.data_ptr(), block.data_ptr())
            _cpu.add_to_split(*addresses, block.numel(), threads(), self.isa)
            del block  # before the next one is made

    def result(self) -> Tensor:
        _cpu.round_split(self.high.data_ptr(), self.low.data_ptr(), self.high.numel(), threads(), self.isa)
        return self.high


#: The tensors of a Problem that gradients may reach, in the order of the ops' arguments.
TRAINABLE = ("input", "linear_weight", "linear_bias", "low_rank_input", "low_rank_weight", "columns")


def gradients(
    p: Problem,
    sums: Tensor,
    scale: Tensor,
    needed: Tensor | None,
    kept: Tensor | None,
    wants: dict[str, bool],
    accumulate_into: Tensor | None,
    reduce: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Of the tensors that are wanted, from lse and mass of every row, (2, rows), and one scale a row or one for all.

    `needed` by `Problem.needed`, None for everywhere; `kept`: the logits, where they are one tile and were kept;
    `reduce` is called with sums over the classes, in float32 (float64), before they are rounded.
    """
    dtype, buffer = sums.dtype, p.new_buffer()
    wants = {k: v and getattr(p, k) is not None for k, v in wants.items()}
    name, _, isa = p.chosen_backend().partition(":")

    def sum_of(like: Tensor) -> Sum | SplitSum:
        if name == "cpu" and like.dtype == torch.bfloat16 and needed is None and reduce is None:
            return SplitSum(like, isa)
        return Sum(like, dtype, reduce)

    by_row = {k: sum_of(getattr(p, k)) for k in ("input", "low_rank_input") if wants[k]}
    into = accumulate_into if wants["linear_weight"] else None
    by_class = {
        k: in_huge_pages(torch.empty_like(getattr(p, k)))
        for k in ("linear_weight", "linear_bias", "low_rank_weight")
        if wants[k] and not (k == "linear_weight" and into is not None)
    }
    d_columns = torch.zeros_like(p.columns) if p.columns is not None else None
    for number, tile in enumerate(p.tiles()):
        part, part_sums, part_scale, rows = p, sums, scale, None
        if needed is not None and not (here := needed[number]).all():
            rows = here.nonzero().flatten()
            part, part_sums = p.of_rows(rows), sums[:, rows]
            part_scale = scale[rows] if scale.dim() else scale
        if rows is not None and len(rows) == 0:
            for gradient in by_class.values():
                gradient[tile] = 0
            continue
        source = part.logits(tile, buffer) if kept is None else kept
        logits = source if kept is None else buffer[: kept.numel()].view_as(kept)
        part.to_gradient(source, tile, part_sums.contiguous(), part_scale.contiguous(), logits)
        if "linear_bias" in by_class:
            by_class["linear_bias"][tile] = logits.sum(0, dtype=dtype)
        if d_columns is not None:
            places, inside = p.columns_of(tile)
            if rows is None:
                d_columns[:, places] = logits[:, inside]
            else:
                d_columns[rows[:, None], places] = logits[:, inside]
            logits[:, inside] = 0  # no gradient of the products that the columns replace
        if "input" in by_row:
            by_row["input"].add(logits, p.linear_weight[tile], rows)
        if "low_rank_input" in by_row and p.low_rank_weight is not None:
            by_row["low_rank_input"].add(logits, p.low_rank_weight[tile], rows)
        if into is not None:
            add_product(into[tile], logits.t(), part.input)
        elif "linear_weight" in by_class:
            torch.mm(logits.t(), part.input, out=by_class["linear_weight"][tile])
        if "low_rank_weight" in by_class and part.low_rank_input is not None:
            torch.mm(logits.t(), part.low_rank_input, out=by_class["low_rank_weight"][tile])
    if into is not None:
        torch.autograd.graph.increment_version(into)
    found = {**{k: v.result() for k, v in by_row.items()}, **by_class}
    if d_columns is not None and wants["columns"]:
        found["columns"] = d_columns
    return found
