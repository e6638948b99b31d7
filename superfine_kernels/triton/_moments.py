"""What the optimizers' Triton kernels share: checks of lists of tensors, tables, and how a program finds its tensor.

Addresses, sizes and scalars travel in two small tables that the host copies at every step; a tensor's row ends with
the number of its first chunk.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import describe, opmath_dtype, reject
from superfine_kernels._moments import LISTS, OPTIONAL

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# Columns of the table of addresses (int64): LISTS without the steps, 0 where a list is absent; and these two.
NUMEL = tl.constexpr(7)
FIRST_CHUNK = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


# --- in the kernels ---------------------------------------------------------------------------------------


@triton.jit
def pointer(row, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def find_tensor(table, count, chunk):
    """The last tensor whose first chunk is not after this one."""
    index = tl.full((), 0, tl.int32)
    end = tl.full((), 0, tl.int32) + count
    while end - index > 1:
        middle = (index + end) // 2
        before = tl.load(table + middle * COLUMNS + FIRST_CHUNK) <= chunk
        index = tl.where(before, middle, index)
        end = tl.where(before, end, middle)
    return index


@triton.jit
def load_param(param, remainders, offsets, mask, SPLIT: tl.constexpr, OPMATH: tl.constexpr):
    """The parameter; with SPLIT joined with its lower bits, as `join` of csrc/core/dtype.h does."""
    high = tl.load(param + offsets, mask=mask)
    if SPLIT:
        low = tl.load(remainders + offsets, mask=mask).to(tl.uint32)
        bits = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low
        rounded_up = tl.where((bits & 0x7FFF0000) != 0, (low >> 15) << 16, 0)
        p = (bits - rounded_up).to(tl.float32, bitcast=True)
    else:
        p = high.to(OPMATH)
    return p


@triton.jit
def store_param(param, remainders, offsets, p, mask, SPLIT: tl.constexpr):
    """Stores the parameter rounded; with SPLIT in two halves, as `split` of csrc/core/dtype.h does."""
    if SPLIT:
        bits = p.to(tl.uint32, bitcast=True)
        bits = tl.where(p != p, tl.full(bits.shape, 0x7FC00000, tl.uint32), bits)
        high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(param + offsets, high, mask=mask)
        tl.store(remainders + offsets, (bits & 0xFFFF).to(tl.uint16), mask=mask)
    else:
        tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)


# --- on the host ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; the interpreter on none."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class Launch:
    """Tensors that one launch steps: those of one pair of dtypes, aligned to 16 bytes or not.

    Attributes:
        table, scalars: a row for each tensor, on the device.
        chunks: of all tensors.
        constants: what every kernel over the tensors is specialised by.
    """

    table: Tensor
    scalars: Tensor
    chunks: int
    constants: dict[str, Any]


def prepare(
    op: str,
    lists: Sequence[Sequence[Tensor]],
    *,
    chunk: int,
    scalars_of: Callable[[float], list[float]],
    scalar_dtype: torch.dtype | None = None,
    zero_grads: bool,
) -> tuple[list[int], list[Launch]]:
    """Checks the lists, counts one step more, and makes the tables of the launches.

    Args:
        lists: in the order of `superfine_kernels._moments.LISTS`.
        chunk: elements per program.
        scalars_of: what a kernel takes for a tensor at the given step.
        scalar_dtype: of the table of scalars; None: that of the computation.

    Returns:
        The positions that no kernel takes, and the launches for the others.
    """
    named = dict(zip(LISTS, lists, strict=True))
    params, states, steps = named["params"], named["exp_avgs"], named["steps"]
    rest = check(op, named, zero_grads)
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = defaultdict(list)
    for i in sorted(set(range(len(params))) - set(rest)):
        aligned = all(tensors[i].data_ptr() % 16 == 0 for tensors in lists[:-1] if tensors)
        kinds[params[i].dtype, states[i].dtype, aligned].append(i)
        steps[i] += 1
    launches = []
    for (param_dtype, state_dtype, aligned), positions in kinds.items():
        rows: list[list[int]] = []
        scalars: list[list[float]] = []
        chunks = 0
        for i in positions:
            if (numel := params[i].numel()) > 0:
                addresses = [tensors[i].data_ptr() if tensors else 0 for tensors in lists[:-1]]
                rows.append([*addresses, numel, chunks])
                scalars.append(scalars_of(float(steps[i])))
                chunks += triton.cdiv(numel, chunk)
        if chunks > 0:
            device, opmath = params[0].device, opmath_dtype(param_dtype)
            launches.append(
                Launch(
                    torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
                    torch.tensor(scalars, dtype=scalar_dtype or opmath).to(device, non_blocking=True),
                    chunks,
                    {
                        "PARAM": TRITON_DTYPES[param_dtype], "STATE": TRITON_DTYPES[state_dtype],
                        "OPMATH": TRITON_DTYPES[opmath], "ALIGNED": aligned,
                        "ANCHORED": len(named["anchors"]) > 0, "SPLIT": len(named["remainders"]) > 0,
                    },
                )
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # autograd must notice, as after any in-place op
    if zero_grads:
        torch.autograd.graph.increment_version(named["grads"])
    return rest, launches


def check(op: str, lists: Mapping[str, Sequence[Tensor]], zero_grads: bool) -> list[int]:
    """The checks of csrc/bind/moment_lists.h; returns the positions that the kernel does not take."""
    params, steps = lists["params"], lists["steps"]
    present = {name: tensors for name, tensors in lists.items() if tensors or name not in OPTIONAL}
    for name, tensors in present.items():
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
        own = {name: tensors[i] for name, tensors in present.items() if name != "steps"}
        for name, t in own.items():
            fits = t.shape == param.shape and t.device == param.device
            if name == "remainders":
                if not fits or t.dtype != torch.int16 or param.dtype != torch.bfloat16:
                    place = describe(param).partition(" ")[2]
                    reject(op, f"{name}[{i}]", t, f"int16 {place} beside a bfloat16 parameter")
            elif name == "exp_avgs":
                if not fits or not _may_be_state(param.dtype, t.dtype):
                    reject(op, f"{name}[{i}]", t, describe(param))
            else:
                like = param if name in ("params", "grads", "anchors") else own["exp_avgs"]
                if not fits or t.dtype != like.dtype:
                    reject(op, f"{name}[{i}]", t, describe(like))
        if not (
            _has_kernel(param.dtype, own["exp_avgs"].dtype)
            and _is_dense(param)
            and all(_same_order(t, param) for t in own.values())
        ):
            rest.append(i)
        elif param.numel() > 0:
            read_only = ("anchors",) if zero_grads else ("grads", "anchors")
            stored = [t for name, t in own.items() if name not in read_only]
            written += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in stored]
    if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(written))):
        raise ValueError(
            f"{op}: params and optimizer state overlap in memory; expected every tensor to have memory of "
            "its own (is a parameter, or a view of it, given twice?)"
        )
    return rest


def _may_be_state(param: torch.dtype, state: torch.dtype) -> bool:
    if param in TRITON_DTYPES or state in TRITON_DTYPES:
        return _has_kernel(param, state)
    return True  # the eager reference takes them


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
