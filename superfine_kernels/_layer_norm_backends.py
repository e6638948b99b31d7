"""How layer_norm and rms_norm run: which backend, and its call with dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import (
    DTYPE_CODES,
    in_functional_transform,
    in_huge_pages,
    opmath_dtype,
    reject,
    threads,
)

#: Bytes of a row as it is computed on that Triton's programs hold in registers.
MOST_TRITON = 32768


def output_dtype(input: Tensor, weight: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    return input.dtype if weight is None or not cast_before_weight else weight.dtype


def _empty_like(input: Tensor, dtype: torch.dtype) -> Tensor:
    return in_huge_pages(
        torch.empty_like(input) if dtype == input.dtype else torch.empty_like(input, dtype=dtype)
    )


def _reals(like: Tensor, *shape: int) -> Tensor:
    """Not set, of the type in which a kernel computes; what is passed costs as much as the call."""
    if like.dtype.itemsize > 2:
        return like.new_empty(shape)
    return like.new_empty(shape, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def _statistics_addresses(rms: bool, statistics: Tensor | None, rows: int) -> tuple[int, int]:
    """Of mean and rstd, the rows of `statistics`; indexing it would take as long as a small norm."""
    if statistics is None:
        return 0, 0
    address = statistics.data_ptr()
    return (0, address) if rms else (address, address + rows * statistics.itemsize)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rms: bool,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output; the sum with a residual; and the rows' rstd (1, rows), in a layer norm mean and rstd (2, rows)."""
    size = input.shape[-1]
    rows = input.numel() // size
    dtype = input.dtype
    output = _empty_like(input, output_dtype(input, weight, cast_before_weight))
    sums = None if residual is None else _empty_like(input, dtype)
    statistics = None
    mean = rstd = 0
    if keep:
        statistics = _reals(input, 2 - rms, rows)
        mean, rstd = _statistics_addresses(rms, statistics, rows)
    name, _, isa = backend.partition(":")
    if name == "triton":
        from superfine_kernels.triton import layer_norm as kernels

        kernels.layer_norm(
            rms, input, weight, bias, residual, eps, weight_offset, cast_before_weight, sums, output, statistics
        )  # fmt: skip
    else:
        _cpu.layer_norm(
            rms, rows, size, eps, weight_offset, cast_before_weight,
            input.data_ptr(), DTYPE_CODES[dtype], _address(residual), _address(weight), _code(weight),
            _address(bias), _code(bias), _address(sums), output.data_ptr(), DTYPE_CODES[output.dtype],
            mean, rstd, threads(), isa,
        )  # fmt: skip
    return output, sums, statistics


def gradients(
    rms: bool,
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor | None,
    weight_offset: float,
    wanted: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those `wanted` of input, weight and bias; the latter two as float32 (float64)."""
    like = grad if input is None else input
    size = grad.shape[-1]
    rows = grad.numel() // size
    dinput = _empty_like(like, like.dtype) if wanted[0] else None
    dweight = _reals(like, size) if wanted[1] else None
    dbias = _reals(like, size) if wanted[2] else None
    name, _, isa = backend.partition(":")
    if name == "triton":
        from superfine_kernels.triton import layer_norm as kernels

        kernels.layer_norm_gradient(
            rms, grad, grad_sum, input, weight, statistics, weight_offset, dinput, dweight, dbias
        )
    else:
        _cpu.layer_norm_gradient(
            rms, rows, size, weight_offset, grad.data_ptr(), DTYPE_CODES[grad.dtype], _address(grad_sum),
            _address(input), DTYPE_CODES[like.dtype], _address(weight), _code(weight),
            *_statistics_addresses(rms, statistics, rows),
            _address(dinput), _address(dweight), _address(dbias), threads(), isa,
        )  # fmt: skip
    return dinput, dweight, dbias


def kernel_for(op: str, input: Tensor, backend: str | None) -> str:
    """The backend that runs: there is no CUDA C++ for norms, which Triton serves as well."""
    if not backend:
        return "cpu" if input.device.type == "cpu" else "triton"
    name = backend.partition(":")[0]
    if name not in ("cpu", "triton"):
        reject(op, "backend", backend, "cpu, triton or reference")
    return _backends.choose(op, input.device, backend)


def why_no_kernel(input: Tensor, backend: str | None) -> str | None:
    if in_functional_transform():
        return "torch.func and forward-mode AD have no kernel"
    device = input.device.type
    if device not in _backends.TABLE:
        return f"there is no kernel for tensors on {device}"
    if (
        device == "cuda" and not backend and not torch.compiler.is_compiling()
    ):  # which cannot follow the search
        why = _backends.why_unavailable("triton")
        if why is not None:
            return why
    if device == "cuda" or backend == "triton":
        most = MOST_TRITON // opmath_dtype(input.dtype).itemsize
        if input.shape[-1] > most:
            return f"Triton's kernel takes rows of up to {most} elements"
    return None
