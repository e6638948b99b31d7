"""What the optimizers' Triton kernels share: checks of lists of tensors, tables, and how a program finds its tensor.

Addresses and sizes travel in a small table that the host copies when they change; a tensor's row ends with the number
of its first chunk. All else of a step is computed on the device, by a first small launch: from the counts of steps,
which it counts up, and the hyperparameters follow the scalars of each tensor's step, as csrc/math computes them.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803 (constexpr parameters are written in capitals, as in Triton's own code)
from __future__ import annotations

import array
import functools
import itertools
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from superfine_kernels._library import describe, opmath_dtype, reject
from superfine_kernels._moments import LISTS, OPTIONAL
from superfine_kernels._storage import scales_shape
from superfine_kernels.triton import on
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

# Columns of the table of addresses (int64): LISTS, 0 where a list is absent; and these.
STEP = tl.constexpr(8)
NUMEL = tl.constexpr(9)
FIRST_CHUNK = tl.constexpr(10)
COLUMNS = tl.constexpr(11)

#: Hyperparameters that may be tensors on the device.
TENSOR_HYPERPARAMETERS = ("lr", "beta1", "beta2", "gradient_scale")
#: All of them, in the order in which the launch that counts steps takes them.
HYPERPARAMETERS = (*TENSOR_HYPERPARAMETERS, "eps", "weight_decay")
# A kernel for each of their values would be the same but for its time to compile.
UNSPECIALIZED = ["count", "seed", *HYPERPARAMETERS]

#: Tensors per program of the launch that counts steps.
COUNTED = 128


# --- in the kernels ---------------------------------------------------------------------------------------


@triton.jit
def pointer(row, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _times(high, low, other_high, other_low):
    product = high * other_high
    rest = tl.fma(high, other_low, tl.fma(low, other_high, tl.fma(high, other_high, -product)))
    total = product + rest
    return total, rest - (total - product)


@triton.jit
def power(base, exponent):
    """`power` of csrc/math/power.h for counts of steps: whole numbers of up to 2^24, as float32 counts no further."""
    high = tl.full(exponent.shape, 1.0, tl.float64)
    low = tl.zeros(exponent.shape, tl.float64)
    square, rest = high * base, low
    bits = exponent.to(tl.int32)
    for _ in range(25):
        next_high, next_low = _times(high, low, square, rest)
        odd = bits & 1 != 0
        high, low = tl.where(odd, next_high, high), tl.where(odd, next_low, low)
        square, rest = _times(square, rest, square, rest)
        bits >>= 1
    return high


@triton.jit
def chunk_of(
    row, begin, CHUNK: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of the tensor of a row, from its element `begin` on.

    Returns addresses in the order of LISTS, how many scales further those of the second moment are (with one address
    more ptxas spills), and how many elements of a chunk there are.
    """
    param = pointer(row, 0, PARAM, ALIGNED) + begin
    grad = pointer(row, 1, PARAM, ALIGNED) + begin
    exp_avg = pointer(row, 2, STATE, ALIGNED) + begin
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED) + begin
    max_exp_avg_sq = pointer(row, 4, STATE, ALIGNED) + begin
    anchor = pointer(row, 5, PARAM, ALIGNED) + begin
    remainders = pointer(row, 6, PARAM if MASTER == "kahan" else tl.uint16, ALIGNED) + begin
    numel = tl.load(row + NUMEL)
    scales = pointer(row, 7, tl.float32, False) + begin // QUANT_BLOCK
    second = tl.cdiv(numel, QUANT_BLOCK).to(tl.int32)
    left = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    return param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, remainders, scales, second, left


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
def zero_chunk(
    row, begin, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARAM: tl.constexpr, ALIGNED: tl.constexpr
):
    """Leaves zeros in the gradient of a step that is not taken."""
    grad = pointer(row, 1, PARAM, ALIGNED) + begin
    left = tl.load(row + NUMEL) - begin
    for start in range(0, CHUNK, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(grad + offsets, tl.zeros((BLOCK,), PARAM), mask=offsets < left)


@triton.jit
def count_step(table, index, count, gradient_scale):
    """Counts one step more for each of the tensors; returns the counts, in double, and whether the step is taken.

    It is not where the gradient scale is a tensor that is not finite, as after an overflow of scaled gradients.
    """
    is_one = index < count
    steps = tl.load(table + index * COLUMNS + STEP, mask=is_one, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=is_one, other=0.0)
    taken = tl.full((), True, tl.int1)
    if gradient_scale.dtype.is_ptr():
        scale = tl.load(gradient_scale)
        taken = scale - scale == 0
    step = tl.where(taken, step + 1, step)
    tl.store(steps, step, mask=is_one)
    return step.to(tl.float64), taken


@triton.jit
def as_bits(scalar):
    """The address of a scalar that is not a number but 32 bits."""
    return scalar.to(tl.pointer_type(tl.uint32), bitcast=True)


@triton.jit
def number(x):
    """What `arguments` made a hyperparameter into, in double."""
    return tl.load(x).to(tl.float64) if x.dtype.is_ptr() else x.to(tl.int64).to(tl.float64, bitcast=True)


# --- on the host ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Tensors that one launch steps: those of one storage, aligned to 16 bytes or not.

    Attributes:
        table: a row for each tensor, on the device.
        chunks: of all tensors; 0 where none has an element.
        opmath: the type of computation.
        constants: what every kernel over the tensors is specialised by.
    """

    table: Tensor
    chunks: int
    opmath: torch.dtype
    constants: dict[str, Any]


def arguments(hyper: Mapping[str, Any]) -> list[int | Tensor]:
    """HYPERPARAMETERS for a kernel: tensors, or the bits of doubles; a float argument would become a float32."""
    values = [hyper[name] for name in HYPERPARAMETERS]
    return [x if isinstance(x, Tensor) else struct.unpack("<q", struct.pack("<d", x))[0] for x in values]


def prepare(
    op: str,
    lists: Sequence[Sequence[Tensor]],
    hyper: Mapping[str, Any],
    *,
    chunk: int,
    zero_grads: bool,
    stochastic_rounding: bool,
) -> tuple[list[int], list[Launch]]:
    """Checks the lists and the hyperparameters, and makes the tables of the launches.

    Args:
        lists: in the order of `superfine_kernels._moments.LISTS`.
        chunk: elements per program.

    Returns:
        The positions that no kernel takes, and the launches for the others.
    """
    named = dict(zip(LISTS, lists, strict=True))
    params, states = named["params"], named["exp_avgs"]
    rest = check(op, named, zero_grads)
    if not params:
        return rest, []
    device = params[0].device
    _check_hyperparameters(op, hyper, device)
    reject_capture(op, device)
    kinds: dict[tuple[torch.dtype, torch.dtype, str, bool], list[int]] = defaultdict(list)
    for i in sorted(set(range(len(params))) - set(rest)):
        aligned = all(tensors[i].data_ptr() % 16 == 0 for tensors in lists[:-1] if tensors)
        remainder = named["remainders"][i] if named["remainders"] else None
        master = _master(params[i], remainder, stochastic_rounding)
        kinds[params[i].dtype, states[i].dtype, master, aligned].append(i)
    launches = []
    for (param_dtype, state_dtype, master, aligned), positions in kinds.items():
        rows = array.array("q")
        chunks = 0
        for i in positions:
            numel = params[i].numel()
            rows.extend(tensors[i].data_ptr() if tensors else 0 for tensors in lists)
            rows.extend((numel, chunks))
            chunks += triton.cdiv(numel, chunk)
        opmath = opmath_dtype(param_dtype)
        launches.append(
            Launch(
                _on_device(rows.tobytes(), device, _stream(device)),
                chunks,
                opmath,
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


@functools.lru_cache(maxsize=16)  # kinds of tensors of a few optimizers that take turns
def _on_device(rows: bytes, device: torch.device, stream: int) -> Tensor:
    """The table of these rows, which is not copied again while addresses stay as they are.

    Only for `stream`, the current one: on another nothing would wait for the copy.
    """
    table = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, COLUMNS.value)
    if device.type == "cuda":
        table = table.pin_memory()  # else the copy could wait for the device
    return table.to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def reject_capture(op: str, device: torch.device) -> None:
    """A graph would keep the address of a table that is freed one day."""
    with on(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{op}: the current stream of {device} is being captured into a CUDA graph; expected a backend that "
                "can be: cuda can, triton cannot, as the host copies its tables"
            )


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
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != param.device:
            reject(op, f"steps[{i}]", step, f"float32 () on {param.device}")
        if (
            param.dtype not in STATE_DTYPES
            or not _is_dense(param)
            or not all(_same_order(t, param) for t in own.values())
        ):
            rest.append(i)
        elif param.numel() > 0:
            read_only = ("anchors",) if zero_grads else ("grads", "anchors")
            stored = [t for name, t in own.items() if name not in read_only]
            stored += [step] if scales is None else [step, scales]
            written += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in stored]
    if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(written))):
        raise ValueError(
            f"{op}: params and optimizer state overlap in memory; expected every tensor to have memory of "
            "its own (is a parameter, or a view of it, given twice?)"
        )
    return rest


def _check_hyperparameters(op: str, hyper: Mapping[str, Any], device: torch.device) -> None:
    for name in TENSOR_HYPERPARAMETERS:
        x = hyper[name]
        if isinstance(x, Tensor) and (
            x.numel() != 1 or x.dtype not in (torch.float32, torch.float64) or x.device != device
        ):
            expected = f"a number, or a float32 or float64 tensor of one element on {device}"
            reject(op, name, x, expected)


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
