"""The backends of cross_entropy.py: results and gradients of checked rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import DTYPE_CODES, in_huge_pages, opmath_dtype, threads
from superfine_kernels._losses import (
    MEAN,
    NONE,
    PART_RESULTS,
    PART_STATISTICS,
    ROW_RESULTS,
    ROW_STATISTICS,
    Rows,
    denominator,
    reject_label,
)


def _cpu_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, statistics: bool, isa: str
) -> tuple[Tensor, Tensor]:
    arguments = _cpu.CrossEntropy(**rows.native())
    bad, divisor = _cpu.check_labels(arguments)
    if bad >= 0:
        reject_label(
            "cross_entropy", cast(Tensor, rows.target), bad, rows.input.shape[1], rows.options.ignore_index
        )
    divisor = (num_items or divisor) if reduction == MEAN else 1.0
    out = rows.new_results(ROW_STATISTICS if statistics else ROW_RESULTS)
    total = _cpu.cross_entropy_forward(
        arguments,
        out=out.data_ptr(),
        statistics=statistics,
        dlogits=0 if dlogits is None else dlogits.data_ptr(),
        scale=1 / divisor if divisor else float("inf"),
        threads=threads(),
        isa=isa,
    )
    if reduction == NONE:
        return out[0], out
    mean = total / divisor if divisor else float("nan")
    return torch.tensor(mean, dtype=out.dtype, device=out.device), out  # not torch's default device


def _cuda_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor]:
    from superfine_kernels import _cuda

    arguments, where = _cuda.CrossEntropy(**rows.native()), cuda_place(rows.input)
    out = rows.new_results(ROW_STATISTICS if statistics else ROW_RESULTS)
    divisor = out.new_ones(2)  # and its reciprocal, which scales the gradient
    if reduction == MEAN and num_items:
        divisor[0], divisor[1] = num_items, 1 / num_items
    elif reduction == MEAN:
        _cuda.cross_entropy_denominator(arguments, out=divisor.data_ptr(), **where)
    _cuda.cross_entropy_forward(
        arguments,
        out=out.data_ptr(),
        statistics=statistics,
        dlogits=0 if dlogits is None else dlogits.data_ptr(),
        scale=divisor[1].data_ptr(),
        scale_stride=0,
        **where,
    )
    if reduction == NONE:
        return out[0], out
    loss = out.new_empty(())
    _cuda.cross_entropy_reduce(
        losses=out.data_ptr(),
        rows=out.shape[1],
        dtype=DTYPE_CODES[out.dtype],
        denominator=divisor.data_ptr() if reduction == MEAN else 0,
        out=loss.data_ptr(),
        **where,
    )
    return loss, out


def _triton_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor]:
    from superfine_kernels.triton import cross_entropy as kernels

    divisor = rows.input.new_ones((), dtype=opmath_dtype(rows.input.dtype))
    if reduction == MEAN:
        counted = (rows.target, rows.probabilities, rows.weight, rows.options.ignore_index, divisor.dtype)
        divisor = divisor * num_items if num_items else denominator(*counted)
    out = kernels.cross_entropy_forward(
        rows, statistics=statistics, dlogits=dlogits, scale=divisor.reciprocal()
    )
    return (out[0] if reduction == NONE else out[0].sum() / divisor), out


def cuda_place(tensor: Tensor) -> dict[str, Any]:
    """The stream and device on which CUDA kernels run."""
    return {"stream": torch.cuda.current_stream(tensor.device).cuda_stream, "device": tensor.device.index}


def run_forward(
    rows: Rows, reduction: int, num_items: float, dlogits: Tensor | None, statistics: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, results of every row); fills dlogits, which may be the input, with the gradient of the reduced loss."""
    name, _, isa = _backends.choose("cross_entropy", rows.input.device, backend).partition(":")
    arguments = (rows, reduction, num_items, dlogits, statistics)
    if name == "cpu":
        return _cpu_forward(*arguments, isa)
    return _triton_forward(*arguments) if name == "triton" else _cuda_forward(*arguments)


def run_backward(rows: Rows, sums: Tensor, scale: Tensor, backend: str) -> Tensor:
    """The gradient of the logits; `scale` holds the upstream gradient of every row, or one for all."""
    dlogits = new_gradient(rows.input)
    gradient_to(rows, sums, scale, dlogits, _backends.choose("cross_entropy", rows.input.device, backend))
    return dlogits


def gradient_to(rows: Rows, sums: Tensor, scale: Tensor, dlogits: Tensor, backend: str) -> None:
    """Fills dlogits, which may be the input; `sums` are lse and mass of all classes, (2, rows)."""
    name, _, isa = backend.partition(":")
    if name == "triton":
        from superfine_kernels.triton import cross_entropy as kernels

        kernels.cross_entropy_backward(rows, sums, scale, dlogits)
        return
    addresses: dict[str, Any] = {
        "sums": sums.data_ptr(),
        "scale": scale.data_ptr(),
        "scale_stride": scale.stride(0) if scale.dim() else 0,
        "dlogits": dlogits.data_ptr(),
    }
    if name == "cpu":
        _cpu.cross_entropy_backward(
            _cpu.CrossEntropy(**rows.native()), **addresses, threads=threads(), isa=isa
        )
        return
    from superfine_kernels import _cuda

    _cuda.cross_entropy_backward(_cuda.CrossEntropy(**rows.native()), **addresses, **cuda_place(rows.input))


def new_gradient(input: Tensor) -> Tensor:
    return in_huge_pages(torch.empty(input.shape, dtype=input.dtype, device=input.device))


def part(rows: Rows, statistics: bool, backend: str, out: Tensor | None = None) -> Tensor:
    """What a part of the classes adds to the results of every row, (results, rows), in `out` or a new tensor."""
    name, _, isa = backend.partition(":")
    out = rows.new_results(PART_STATISTICS if statistics else PART_RESULTS) if out is None else out
    if name == "triton":
        from superfine_kernels.triton import cross_entropy as kernels

        kernels.cross_entropy_part(rows, statistics=statistics, out=out)
    elif name == "cpu":
        arguments = _cpu.CrossEntropy(**rows.native())
        _cpu.cross_entropy_part(
            arguments, out=out.data_ptr(), statistics=statistics, threads=threads(), isa=isa
        )
    else:
        from superfine_kernels import _cuda

        where = cuda_place(rows.input)
        _cuda.cross_entropy_part(
            _cuda.CrossEntropy(**rows.native()), out=out.data_ptr(), statistics=statistics, **where
        )
    return out
