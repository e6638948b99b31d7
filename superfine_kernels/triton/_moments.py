"""What the optimizers' Triton kernels share: checks of lists of tensors, and how a program finds its tensor.

Addresses, sizes and scalars travel in two small tables that the host copies at every step; a tensor's row ends with
the number of its first chunk.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import describe, reject

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def pointer(table, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def find_tensor(table, count, chunk, TABLE_COLUMNS: tl.constexpr):
    """The last tensor whose first chunk is not after this one."""
    index = tl.full((), 0, tl.int32)
    end = tl.full((), 0, tl.int32) + count
    while end - index > 1:
        middle = (index + end) // 2
        before = tl.load(table + middle * TABLE_COLUMNS + TABLE_COLUMNS - 1) <= chunk
        index = tl.where(before, middle, index)
        end = tl.where(before, end, middle)
    return index


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; the interpreter on none."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def check(
    op: str, params: Sequence[Tensor], lists: Mapping[str, Sequence[Tensor]], steps: Sequence[Tensor]
) -> list[int]:
    """The checks of csrc/bind/moment_lists.h; returns the positions that the kernel does not take.

    `lists` holds `grads`, `exp_avgs` and further moments, in this order, by name.
    """
    for name, tensors in (*lists.items(), ("steps", steps)):
        if len(tensors) != len(params):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors; expected {len(params)}, one for each of params"
            )
    rest: list[int] = []
    written: list[tuple[int, int]] = []
    for i, (param, step) in enumerate(zip(params, steps, strict=True)):
        if param.device != params[0].device:
            reject(op, f"params[{i}]", param, f"a tensor on {params[0].device}, as params[0]")
        if step.numel() != 1 or step.dtype != torch.float32 or step.device.type != "cpu":
            reject(op, f"steps[{i}]", step, "float32 () on cpu")
        for name, tensors in lists.items():
            t = tensors[i]
            like = param if name in ("grads", "exp_avgs") else lists["exp_avgs"][i]
            dtype_agrees = t.dtype == like.dtype or name == "exp_avgs"
            if t.shape != param.shape or t.device != param.device or not dtype_agrees:
                reject(op, f"{name}[{i}]", t, describe(like))
        all_of_it = [param, *(tensors[i] for tensors in lists.values())]
        if not (
            _has_kernel(param.dtype, lists["exp_avgs"][i].dtype)
            and _is_dense(param)
            and all(_same_order(t, param) for t in all_of_it)
        ):
            rest.append(i)
        elif param.numel() > 0:
            stored = [param, *all_of_it[2:]]
            written += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in stored]
    if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(written))):
        raise ValueError(
            f"{op}: params and optimizer state overlap in memory; expected every tensor to have memory of "
            "its own (is a parameter, or a view of it, given twice?)"
        )
    return rest


def _has_kernel(param: torch.dtype, state: torch.dtype) -> bool:
    wide_state = state == torch.float32 and param in (torch.bfloat16, torch.float16)
    return param in TRITON_DTYPES and (state == param or wide_state)


def _is_dense(t: Tensor) -> bool:
    """The elements fill one stretch of memory without gaps or overlap, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(a: Tensor, b: Tensor) -> bool:
    return all(s == r for s, r, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n != 1)
