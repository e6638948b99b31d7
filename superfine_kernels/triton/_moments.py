"""What the optimizers' Triton kernels share: checks of lists of tensors, tables, and how a program finds its tensor.

Addresses, sizes and scalars travel in two small tables that the host copies at every step; a tensor's row ends with
the number of its first chunk.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import describe, opmath_dtype, reject
from superfine_kernels._moments import LISTS, OPTIONAL
from superfine_kernels._storage import random_key, scales_shape
from superfine_kernels.triton._storage import QUANT_BLOCK

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
}

#: The moments' dtypes that kernels take, by the parameter's.
STATE_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.uint8),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.uint8),
    torch.float16: (torch.float16, torch.float32, torch.uint8),
    torch.float64: (torch.float64,),
}

# Columns of the table of addresses (int64): LISTS without the steps, 0 where a list is absent; and these.
NUMEL = tl.constexpr(8)
FIRST_CHUNK = tl.constexpr(9)
RANDOM_KEY = tl.constexpr(10)  # of the step
COLUMNS = tl.constexpr(11)


# --- in the kernels ---------------------------------------------------------------------------------------


@triton.jit
def pointer(row, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def chunk_of(
    row, begin, CHUNK: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of the tensor of a row, from its element `begin` on.

    Returns addresses in the order of LISTS, the scales of both moments apart; how many elements of a chunk there are;
    and the random key.
    """
    param = pointer(row, 0, PARAM, ALIGNED) + begin
    grad = pointer(row, 1, PARAM, ALIGNED) + begin
    exp_avg = pointer(row, 2, STATE, ALIGNED) + begin
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED) + begin
    max_exp_avg_sq = pointer(row, 4, STATE, ALIGNED) + begin
    anchor = pointer(row, 5, PARAM, ALIGNED) + begin
    remainders = pointer(row, 6, PARAM if MASTER == "kahan" else tl.uint16, ALIGNED) + begin
    numel = tl.load(row + NUMEL)
    m_scales = pointer(row, 7, tl.float32, False) + begin // QUANT_BLOCK
    v_scales = m_scales + tl.cdiv(numel, QUANT_BLOCK)
    left = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    key = tl.load(row + RANDOM_KEY).to(tl.uint32)
    return param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, remainders, m_scales, v_scales, left, key


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


# --- on the host ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; the interpreter on none."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class Launch:
    """Tensors that one launch steps: those of one storage, aligned to 16 bytes or not.

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
    stochastic_rounding: bool,
    seed: int,
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
    scalars_of, key_of = functools.cache(scalars_of), functools.cache(functools.partial(random_key, seed))
    kinds: dict[tuple[torch.dtype, torch.dtype, str, bool], list[int]] = defaultdict(list)
    for i in sorted(set(range(len(params))) - set(rest)):
        aligned = all(tensors[i].data_ptr() % 16 == 0 for tensors in lists[:-1] if tensors)
        remainder = named["remainders"][i] if named["remainders"] else None
        master = _master(params[i], remainder, stochastic_rounding)
        kinds[params[i].dtype, states[i].dtype, master, aligned].append(i)
        steps[i] += 1
    launches = []
    for (param_dtype, state_dtype, master, aligned), positions in kinds.items():
        rows: list[list[int]] = []
        scalars: list[list[float]] = []
        chunks = 0
        for i in positions:
            if (numel := params[i].numel()) > 0:
                step = float(steps[i])
                addresses = [tensors[i].data_ptr() if tensors else 0 for tensors in lists[:-1]]
                rows.append([*addresses, numel, chunks, key_of(int(step))])
                scalars.append(scalars_of(step))
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
                        "OPMATH": TRITON_DTYPES[opmath], "MASTER": master,
                        "ANCHORED": len(named["anchors"]) > 0, "ALIGNED": aligned,
                    },
                )
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # autograd must notice, as after any in-place op
    if zero_grads:
        torch.autograd.graph.increment_version(named["grads"])
    return rest, launches


def _master(param: Tensor, remainder: Tensor | None, stochastic_rounding: bool) -> str:
    """What keeps the part of a parameter that rounding would lose: `Master` of csrc/math/moments.h."""
    if remainder is None:
        return "stochastic" if stochastic_rounding and param.dtype == torch.bfloat16 else "none"
    return "split" if remainder.dtype == torch.int16 else "kahan"


def check(op: str, lists: Mapping[str, Sequence[Tensor]], zero_grads: bool) -> list[int]:
    """The checks of csrc/bind/moment_lists.h; returns the positions that the kernel does not take."""
    params = lists["params"]
    present = {name: tensors for name, tensors in lists.items() if tensors or name not in OPTIONAL}
    for name, tensors in present.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors; expected {len(params)}, one for each of params"
            )
    rest: list[int] = []
    written: list[tuple[int, int]] = []
    for i, param in enumerate(params):
        if param.device != params[0].device:
            reject(op, f"params[{i}]", param, f"a tensor on {params[0].device}, as params[0]")
        own = {name: tensors[i] for name, tensors in present.items()}
        _check_one(op, i, own)
        step, scales = own.pop("steps"), own.pop("scales", None)
        if step.numel() != 1 or step.dtype != torch.float32 or step.device.type != "cpu":
            reject(op, f"steps[{i}]", step, "float32 () on cpu")
        if (
            param.dtype not in STATE_DTYPES
            or not _is_dense(param)
            or not all(_same_order(t, param) for t in own.values())
        ):
            rest.append(i)
        elif param.numel() > 0:
            read_only = ("anchors",) if zero_grads else ("grads", "anchors")
            stored = [t for name, t in own.items() if name not in read_only]
            stored += [] if scales is None else [scales]
            written += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in stored]
    if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(written))):
        raise ValueError(
            f"{op}: params and optimizer state overlap in memory; expected every tensor to have memory of "
            "its own (is a parameter, or a view of it, given twice?)"
        )
    return rest


def _check_one(op: str, i: int, own: Mapping[str, Tensor]) -> None:
    """That what belongs to the `i`-th parameter has the shape, device and dtype that it should have."""
    param, exp_avg = own["params"], own["exp_avgs"]

    def refuse(name: str, expected: str) -> NoReturn:
        reject(op, f"{name}[{i}]", own[name], expected)

    def fits(t: Tensor) -> bool:
        return t.shape == param.shape and t.device == param.device

    if param.dtype not in STATE_DTYPES and not param.is_complex():
        refuse("params", "a float32, bfloat16, float16, float64 or complex tensor")
    if not fits(exp_avg) or exp_avg.dtype not in STATE_DTYPES.get(param.dtype, (param.dtype,)):
        refuse("exp_avgs", describe(param))
    for name in ("grads", "exp_avg_sqs", "max_exp_avg_sqs", "anchors"):
        like = param if name in ("grads", "anchors") else exp_avg
        if name in own and not (fits(own[name]) and own[name].dtype == like.dtype):
            refuse(name, describe(like))
    if "remainders" in own:
        remainder = own["remainders"]
        kinds = {torch.bfloat16: (torch.int16, torch.bfloat16), torch.float16: (torch.float16,)}
        if not fits(remainder) or remainder.dtype not in kinds.get(param.dtype, ()):
            place = describe(param).partition(" ")[2]
            refuse(
                "remainders",
                f"int16 {place} beside a bfloat16 parameter, or the dtype of a bfloat16 or float16 one",
            )
    if exp_avg.dtype != torch.uint8:
        if "scales" in own:
            refuse("scales", "none beside moments that are not uint8")
        return
    shape = scales_shape(param.numel())
    expected = f"a contiguous float32 {shape} on the device of the parameter, for uint8 moments"
    if "scales" not in own:
        raise ValueError(f"{op}: scales[{i}] is missing; expected {expected}")
    scales = own["scales"]
    if (
        scales.dtype != torch.float32
        or scales.device != param.device
        or scales.shape != shape
        or not scales.is_contiguous()
    ):
        refuse("scales", expected)
    if "max_exp_avg_sqs" in own:
        refuse("max_exp_avg_sqs", "none beside uint8 moments, which AMSGrad does not have")


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
