"""What kernels of elementwise losses take: dense elements, patterns of weights, checked arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superfine_kernels._library import DTYPE_CODES, is_plain, reject
from superfine_kernels._losses import REDUCTIONS, check_inplace, check_num_items

#: Codes of the losses, as in csrc/math/elementwise_loss.h.
CODES = {"bce_with_logits": 0, "mse": 1}

#: Patterns are at least this long, so that what a kernel reads at a time holds at most one of their ends.
WINDOW = 4096
#: Values repeated fewer times than this are written out: runs so short would cost more than they save.
SHORTEST_RUN = 16


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

    @property
    def cycle(self) -> int:
        return 1 if self.values is None else self.values.numel() * self.repeat

    def part(self, elements: slice) -> Pattern:
        """The pattern of those elements alone."""
        start, count = elements.start % self.cycle, elements.stop - elements.start
        if self.values is None or (start == 0 and self.cycle <= count):
            return self
        if start % self.repeat + count <= self.repeat:
            return Pattern(self.values[start // self.repeat, None], count)
        if self.repeat == 1 and start + count <= self.cycle:
            return Pattern(self.values[start : start + count], 1)
        index = torch.arange(elements.start, elements.stop, device=self.values.device) // self.repeat
        return Pattern(self.values[index % self.values.numel()], 1)

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

    def part(self, elements: slice) -> Elements:
        """Those elements alone, flat."""
        input, target = (t.view(-1)[elements] for t in (self.input, self.target))
        return Elements(self.loss, input, target, self.weight.part(elements), self.pos_weight.part(elements))

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


def check(
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
        constant = loss == "mse" or not weights.requires_grad  # as in torch
        expect(constant, name, "a tensor that requires grad", "constant weights")
    expect(reduction in REDUCTIONS, "reduction", reduction, "'none', 'mean' or 'sum'")
    if num_items is not None:
        check_num_items(loss, input.device, reduction, num_items)
    if inplace:
        check_inplace(loss, input, reduction)
        expect(
            tuple(input.shape) == shape, "input", f"a tensor with strides {input.stride()}",
            "memory of its own for every element with inplace=True",
        )  # fmt: skip
        for name, other in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
            expect(
                other is None or not _shares_memory(input, other), name, "a tensor in the memory of input",
                "memory of its own with inplace=True",
            )  # fmt: skip


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return is_plain((a, b)) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
