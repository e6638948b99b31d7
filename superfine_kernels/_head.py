"""The linear layer of a linear loss: its parts that train, and what is expected of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from superfine_kernels._library import DTYPE_CODES, reject


class LoRA(NamedTuple):
    """A head's low-rank addition (Hu et al. 2021): its weight is linear_weight + scale * b @ a."""

    a: Tensor  # (rank, features)
    b: Tensor  # (classes, rank)
    scale: float = 1.0


class TrainableRows(NamedTuple):
    """Rows of a head that stand in for those of linear_weight, and alone have a gradient."""

    indices: Tensor  # (few), int64, each once
    weight: Tensor  # (few, features)


def parts_of(op: str, name: str, value: Any, count: int) -> Any:
    """`lora` or `rows`, which may be any sequence of their parts; None where there is none."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != count:
        found = f"a {type(value).__name__}" + (
            f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        )
        reject(op, name, found, f"None or a tuple of {count}", TypeError)
    return value


class Head(NamedTuple):
    """Input and all tensors of the layer, None for what it has not."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    row_index: Tensor | None
    row_weight: Tensor | None

    def autocast(self) -> Head:
        """In the dtype of autocast, where that is on."""
        device = self.input.device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        return Head._make(
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in self
        )

    def check_tensors(self, op: str) -> None:
        for name, tensor in zip(_NAMES, self, strict=True):
            if tensor is None and self._may_be_none(name):
                continue
            if not isinstance(tensor, Tensor):
                reject(op, name, tensor, "a torch.Tensor", TypeError)
            if tensor.device != self.input.device and name != "rows.indices":
                reject(op, name, tensor, f"a tensor on {self.input.device}")

    def _may_be_none(self, name: str) -> bool:
        pairs = {
            "lora.a": self.b,
            "lora.b": self.a,
            "rows.indices": self.row_weight,
            "rows.weight": self.row_index,
        }
        return name == "linear_bias" or (name in pairs and pairs[name] is None)

    def check_shapes(self, op: str) -> None:
        input = self.input
        if input.dtype not in DTYPE_CODES:
            reject(op, "input", input, "float32, bfloat16, float16 or float64", TypeError)
        if input.dim() < 1 or input.shape[-1] == 0:
            reject(op, "input", input, "(features) or (..., features)")
        features = input.shape[-1]
        if self.weight.dim() != 2 or self.weight.shape[1] != features or self.weight.shape[0] == 0:
            reject(
                op, "linear_weight", self.weight, f"{_name(input.dtype)} (classes, {features}), as the input"
            )
        classes = self.weight.shape[0]
        shapes: dict[str, tuple[Any, ...]] = {"linear_weight": (classes, features), "linear_bias": (classes,)}
        if self.a is not None and self.b is not None:
            rank = self.a.shape[0] if self.a.dim() == 2 else "rank"
            shapes |= {"lora.a": (rank, features), "lora.b": (classes, rank)}
        if self.row_index is not None:
            shapes["rows.weight"] = (self.row_index.numel(), features)
        for name, tensor in zip(_NAMES, self, strict=True):
            if tensor is None or name not in shapes:
                continue
            if tensor.shape != shapes[name] or tensor.dtype != input.dtype:
                like = ", ".join(map(str, shapes[name])) + ("," if len(shapes[name]) == 1 else "")
                reject(op, name, tensor, f"{_name(input.dtype)} ({like}), as the input")
        if self.row_index is not None:
            _check_index(op, self.row_index, classes)


_NAMES = ("input", "linear_weight", "linear_bias", "lora.a", "lora.b", "rows.indices", "rows.weight")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_index(op: str, index: Tensor, classes: int) -> None:
    if index.dim() != 1 or index.dtype != torch.int64:
        reject(op, "rows.indices", index, "int64 (few)", TypeError)
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return  # not waited for
    if index.numel() > 0 and not 0 <= int(index.min()) <= int(index.max()) < classes:
        reject(
            op, "rows.indices", f"from {int(index.min())} to {int(index.max())}", f"rows in [0, {classes})"
        )
    if len(index.unique()) < len(index):
        reject(op, "rows.indices", "not unique", "every row once")
