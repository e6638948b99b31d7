"""Activations and gated linear units, element by element in one pass: `gelu`, `silu`, `swiglu`, `geglu`.

For gates x and, behind a gated linear unit, another projection u of the same input (ones without):

    out = f(x) u        f = gelu, x Phi(x), or its tanh form, or silu, x sigmoid(x)
    dx  = g u f'(x)     g: the gradient of out
    du  = g f(x)

csrc/math/activation.h has the form that is computed. Elements are computed in float32 (float64 for float64) and
rounded once, when the result is stored: eager modules round f(x) before the product.

Saved for backward: x, and u if x needs a gradient; nothing else, and nothing where no input needs one. Backward
computes both gradients in one pass from them.

Sources: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from superfine_kernels import _backends, _cpu
from superfine_kernels._library import (
    DTYPE_CODES,
    LIBRARY,
    Cost,
    direct,
    in_functional_transform,
    in_huge_pages,
    is_batched,
    is_plain,
    opmath_dtype,
    reject,
    threads,
    warn_once,
)

#: Codes of the functions, as in csrc/math/activation.h.
CODES = {"gelu": 0, "gelu_tanh": 1, "silu": 2}

#: Floating-point operations for an element, forward and backward: exponential, quotient, polynomials.
FLOPS = {"gelu": (32, 54), "gelu_tanh": (26, 33), "silu": (22, 27)}

#: Rows shorter than this are copied rather than read where they lie: every row begins a strip of its own.
SHORTEST_ROW = 128


def cost(
    elements: int,
    dtype: torch.dtype = torch.float32,
    function: str = "gelu",
    gated: bool = False,
    backward: bool = True,
) -> Cost:
    """Bytes and flops: every input read and every result written once in each pass.

    Forward reads gate and up and writes the result; backward reads these and the gradient of the result and writes
    theirs: 8 + 12 bytes an element in float32, 12 + 20 for a gated unit.
    """
    tensors = 2 + gated + (3 + 2 * gated) * backward
    forward, of_slope = FLOPS[function]
    products = gated + (1 + 2 * gated) * backward
    return Cost(
        bytes=elements * dtype.itemsize * tensors,
        flops=elements * (forward + of_slope * backward + products),
    )


def reference(function: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Eager torch in float32 (float64 for float64), rounded once: any number of derivatives."""
    x = gate.to(opmath_dtype(gate.dtype))
    approximate = "tanh" if function == "gelu_tanh" else "none"
    out = F.silu(x) if function == "silu" else F.gelu(x, approximate=approximate)
    return (out if up is None else out * up.to(out.dtype)).to(gate.dtype)


# --- backends ---------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Tensors of one shape as kernels read them: rows of adjacent elements, each tensor's a stride apart."""

    tensors: list[Tensor | None]
    rows: int
    columns: int
    strides: list[int]

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Layout:
        """Of the tensors where they lie, as halves of a projection do, or of dense copies."""
        given = [t for t in tensors if t is not None]
        shape = given[0].shape
        if all(t.is_contiguous() for t in given):
            count = given[0].numel()
            return cls(list(tensors), 1, count, [count] * len(tensors))
        columns = shape[-1] if shape else 1
        if columns < SHORTEST_ROW:
            return cls.of(*(t if t is None else t.contiguous() for t in tensors))
        laid = [t if t is None or _row_stride(t) is not None else t.contiguous() for t in tensors]
        strides = [columns if t is None else _row_stride(t) or 0 for t in laid]
        return cls(laid, given[0].numel() // columns, columns, strides)


def _row_stride(tensor: Tensor) -> int | None:
    """From row to row, where all rows are that far apart and each is dense; None elsewhere."""
    sizes, strides = tensor.shape, tensor.stride()
    if strides[-1] != 1:
        return None
    between, reach = sizes[-1], None
    for size, stride in zip(reversed(sizes[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if reach is None:
            between, reach = stride, stride
        if stride != reach:
            return None
        reach *= size
    return between


def _backend(op: str, device: torch.device, backend: str) -> str:
    """The backend's name, with its instruction set; there is no CUDA C++ kernel."""
    if backend == "cuda":
        reject(op, "backend", backend, "cpu, triton or reference: there is no CUDA C++ kernel")
    return _backends.choose(op, device, backend or ("triton" if device.type == "cuda" else ""))


def _new(like: Tensor) -> Tensor:
    """Dense, not set, of that shape."""
    return in_huge_pages(like.new_empty(like.shape))


def _run(
    function: str,
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    grad: Tensor | None,
    out: Tensor | None,
    dup: Tensor | None,
) -> None:
    """Without `grad` fills `out` with f(gate) * up, with it `out` and `dup` with the gradients of gate and up."""
    chosen = "cpu" if not backend and gate.is_cpu else _backend(function, gate.device, backend)
    name, _, isa = chosen.partition(":")
    layout = Layout.of(gate, up, grad)
    if name == "triton":
        from superfine_kernels.triton import activation as kernels

        kernels.activation(function, layout, out, dup)
        return
    x, u, g = [0 if t is None else t.data_ptr() for t in layout.tensors]
    x_stride, u_stride, g_stride = layout.strides
    _cpu.activation(
        CODES[function], layout.rows, layout.columns, DTYPE_CODES[gate.dtype],
        x, x_stride, u, u_stride, g, g_stride,
        0 if out is None else out.data_ptr(), 0 if dup is None else dup.data_ptr(), threads(), isa,
    )  # fmt: skip


# --- ops and autograd -------------------------------------------------------------------------------------

LIBRARY.define("activation(str function, Tensor gate, Tensor? up, str backend) -> Tensor")
LIBRARY.define(
    "activation_backward(str function, Tensor grad, Tensor gate, Tensor? up, bool of_gate, bool of_up, str backend)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "activation", "CompositeExplicitAutograd")
def _op(function: str, gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
    out = _new(gate)
    if out.numel() > 0:
        _run(function, backend, gate, up, None, out, None)
    return out


@torch.library.impl(LIBRARY, "activation", "Meta")
def _op_fake(function: str, gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.impl(LIBRARY, "activation_backward", "CompositeExplicitAutograd")
def _op_backward(
    function: str, grad: Tensor, gate: Tensor, up: Tensor | None, of_gate: bool, of_up: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dgate, dup = _both(function, grad, gate, up, of_gate, of_up, backend)
    return gate.new_empty(0) if dgate is None else dgate, gate.new_empty(0) if dup is None else dup


def _both(
    function: str, grad: Tensor, gate: Tensor, up: Tensor | None, of_gate: bool, of_up: bool, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that are wanted."""
    dgate = _new(gate) if of_gate else None
    dup = _new(gate) if of_up else None
    if gate.numel() > 0:
        _run(function, backend, gate, up, grad, dgate, dup)
    return dgate, dup


@torch.library.impl(LIBRARY, "activation_backward", "Meta")
def _op_backward_fake(
    function: str, grad: Tensor, gate: Tensor, up: Tensor | None, of_gate: bool, of_up: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if of_gate else 0), gate.new_empty(gate.shape if of_up else 0)


def _save(ctx: Any, gate: Tensor, up: Tensor | None, of_gate: bool, of_up: bool) -> None:
    """The gradient of up needs the gate alone."""
    ctx.set_materialize_grads(False)
    if of_gate or of_up:
        ctx.save_for_backward(gate, up if of_gate else None)


def _gradients(
    ctx: Any, grad: Tensor | None, of_gate: bool, of_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    if grad is None or not (of_gate or of_up):
        return None, None
    gate, up = ctx.saved_tensors
    again = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (grad, gate, up)
    )  # backward(create_graph=True)
    if not again and is_plain((grad, gate)) and not is_legacy_batchedtensor(grad):
        return _both(ctx.function, grad, gate, up, of_gate, of_up, ctx.backend)
    if again or is_batched(grad):
        return _differentiable(ctx.function, grad, gate, up, of_gate, of_up, again)
    dgate, dup = torch.ops.superfine.activation_backward(
        ctx.function, grad, gate, up, of_gate, of_up, ctx.backend
    )
    return dgate if of_gate else None, dup if of_up else None


def _differentiable(
    function: str,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    of_gate: bool,
    of_up: bool,
    again: bool,
) -> tuple[Tensor | None, Tensor | None]:
    why = "a second derivative is asked for" if again else "many gradients are asked for at once"
    warn_once(f"{function}: {why}; eager torch computes the gradient")
    with torch.enable_grad():
        gate = gate.view_as(gate)  # a name of its own, should it be up, too
        if up is None and of_up:
            up = torch.ones_like(gate, requires_grad=True)  # the gradient of up does not depend on it
        elif up is not None:
            up = up.view_as(up)
        out = reference(function, gate, up)
    of = [t for t, wanted in ((gate, of_gate), (up, of_up)) if wanted and t is not None]
    gradients = list(torch.autograd.grad(out, of, grad, create_graph=again))
    return gradients.pop(0) if of_gate else None, gradients.pop(0) if of_up else None


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.function, gate, up, ctx.backend = inputs
    of_gate, of_up = ctx.needs_input_grad[1:3]
    _save(ctx, gate, up, of_gate, of_up)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    of_gate, of_up = ctx.needs_input_grad[1:3]
    return None, *_gradients(ctx, grad, of_gate, of_up), None


torch.library.register_autograd("superfine::activation", _backward, setup_context=_setup_context, lib=LIBRARY)


class _Direct(torch.autograd.Function):
    """The op without the dispatcher, which for few elements costs more than the activation."""

    @staticmethod
    def forward(ctx, function, gate, up, backend):
        _setup_context(ctx, (function, gate, up, backend), gate)
        return _op(function, gate, up, backend)

    backward = staticmethod(_backward)


_apply = direct(_Direct)


# --- public -----------------------------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Gaussian error linear unit, as `torch.nn.functional.gelu`.

    Args:
        input: of any shape and strides; float32, bfloat16, float16 or float64.
        approximate: "none" for x Phi(x), or "tanh" for its tanh form, which Hugging Face calls gelu_new,
            gelu_fast and gelu_pytorch_tanh.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        A dense tensor of the shape and dtype of `input`. Backward keeps `input` alone. Infinities have the limits inf
        and -0, where torch has NaN for -inf.

    Raises:
        ValueError, TypeError: no such tensor, approximation or backend.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units".
    """
    return _activation("gelu", _approximated("gelu", approximate), input, None, backend)


def silu(input: Tensor, *, backend: str | None = None) -> Tensor:
    """x sigmoid(x), also known as swish, as `torch.nn.functional.silu`; arguments and result as of `gelu`."""
    return _activation("silu", "silu", input, None, backend)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up in one pass: what is between the products of a Llama-like MLP.

    Args:
        gate, up: of one shape, dtype and device, any strides: the halves of one projection, too, which are read where
            they lie. float32, bfloat16, float16 or float64.
        backend: None for the best one; see `superfine_kernels.backends()`.

    Returns:
        A dense tensor of that shape and dtype, rounded once: eager modules in low precision round silu(gate) first.
        Backward keeps `gate`, and `up` if `gate` needs a gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing is broadcast.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    _check_up("swiglu", gate, up)
    return _activation("swiglu", "silu", gate, up, backend)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """gelu(gate) * up in one pass: what is between the products of a T5- or Gemma-like MLP.

    Arguments, result and errors as of `swiglu`; `approximate` as of `gelu` (these models take "tanh").
    """
    function = _approximated("geglu", approximate)
    _check_up("geglu", gate, up)
    return _activation("geglu", function, gate, up, backend)


def _approximated(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        reject(op, "approximate", approximate, "'none' or 'tanh'")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _activation(op: str, function: str, gate: Tensor, up: Tensor | None, backend: str | None) -> Tensor:
    if up is None:
        _check(op, "input", gate)
    plain = is_plain((gate,) if up is None else (gate, up))
    if not (plain and backend is None and gate.is_cpu):  # else there is a kernel, and asking costs as much
        if backend and not torch.compiler.is_compiling():
            _backend(op, gate.device, backend)
        if why := _why_no_kernel(gate, backend):
            warn_once(f"{op}: {why}; eager torch computes it")
            backend = "reference"
        if backend == "reference":
            return reference(function, gate, up)
    if not plain:
        traced: Tensor = torch.ops.superfine.activation(function, gate, up, backend or "")
        return traced
    gate = unwrap_if_dead(gate)  # what torch.func has left behind has no memory of its own
    up = None if up is None else unwrap_if_dead(up)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        out: Tensor = _apply(function, gate, up, backend or "")
        return out
    return _op(function, gate, up, backend or "")


def _check_up(op: str, gate: Tensor, up: Tensor) -> None:
    _check(op, "gate", gate)
    _check(op, "up", up)
    if up.dtype != gate.dtype:
        reject(op, "up", up, f"{str(gate.dtype).removeprefix('torch.')}, as gate", TypeError)
    if up.shape != gate.shape or up.device != gate.device:
        reject(op, "up", up, f"shape {tuple(gate.shape)} on {gate.device}, as gate")


def _check(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        reject(op, name, tensor, "a torch.Tensor", TypeError)
    if tensor.dtype not in DTYPE_CODES:
        reject(op, name, tensor, "float32, bfloat16, float16 or float64", TypeError)


def _why_no_kernel(gate: Tensor, backend: str | None) -> str | None:
    if backend == "reference":
        return None
    if in_functional_transform():
        return "torch.func and forward-mode AD have no kernel"
    if gate.device.type not in _backends.TABLE:
        return f"there is no kernel for tensors on {gate.device.type}"
    if gate.device.type == "cuda" and not backend and not torch.compiler.is_compiling():
        missing = _backends.why_unavailable("triton")
        return missing and f"there is no kernel that is usable here: {missing}"
    return None
