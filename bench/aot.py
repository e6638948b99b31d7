"""Every Triton kernel compiled for GPUs that are not here: what it uses, and its PTX.

An op's launch code decides on block sizes, warps and specialisations. So that nothing repeats those decisions,
:data:`CALLS` calls that code on CPU tensors while a recorder compiles whatever it launches; nothing runs. That
needs a process of its own, with Triton's driver and launch replaced and its interpreter off.

    python -m superfine_bench.aot sm_90 [OP ...]     one line of JSON for each kernel
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from superfine_kernels._losses import Options, Rows

from .binaries import Usage, capability_of, first_error, resource_usage


@dataclass(frozen=True)
class TritonKernel:
    """One specialisation of one kernel.

    Attributes:
        pointers: element types of the pointer arguments, as Triton writes them.
        constants: constexpr arguments, and run-time ones of which Triton made a constant (None, 1); as text.
        aligned: run-time arguments known to be divisible by 16.
        shared: bytes per block, dynamic ones included.
    """

    op: str
    kernel: str
    arch: str
    pointers: dict[str, str]
    constants: dict[str, str]
    aligned: list[str]
    warps: int
    registers: int
    stack: int
    shared: int
    ptx: str = field(repr=False)


@dataclass(frozen=True)
class Uncompiled:
    """A kernel that does not compile, or, with an empty name, an op that does not come to launch any; and why."""

    op: str
    kernel: str
    reason: str


# --- what the ops can be asked for -------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _unaligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor that starts one element after a 16-byte boundary, in rows of odd length."""
    return torch.empty(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., 1:]


#: (parameter, moments, what keeps the rest of a 16-bit parameter); fp16 stands for bf16 where only those differ.
STORAGES = [
    *((dtype, dtype, "none") for dtype in DTYPES),
    *((torch.float32, state, "none") for state in (torch.bfloat16, torch.uint8)),
    *((torch.bfloat16, state, "none") for state in (torch.float32, torch.uint8)),
    *((torch.float16, state, "none") for state in (torch.float32, torch.uint8)),
    *((torch.bfloat16, state, "split") for state in (torch.bfloat16, torch.float32, torch.uint8)),
    *((torch.bfloat16, state, "kahan") for state in (torch.bfloat16, torch.uint8)),
    *((torch.bfloat16, state, "stochastic") for state in (torch.bfloat16, torch.uint8)),
    (torch.float16, torch.float16, "kahan"),
]


def _moments(amsgrad: bool) -> Iterator[tuple[list[Any], dict[str, Any], bool]]:
    """An optimizer's lists and hyperparameters for each storage, alone and with all else (True), aligned and not."""
    ways: list[tuple[Any, bool]] = [(torch.empty, False), (torch.empty, True), (_unaligned, True)]
    for (param, state, master), (empty, extras) in itertools.product(STORAGES, ways):
        if empty is _unaligned and master != "none":  # how elements are read does not depend on it
            continue
        remainder = {"split": torch.int16, "kahan": param}.get(master)
        v_max = state if amsgrad and extras and state != torch.uint8 else None
        dtypes = [param, param, state, state, v_max, param if extras else None, remainder]
        lists = [[empty(4096, dtype=dtype)] if dtype else [] for dtype in dtypes]
        scales = [torch.empty(2, 16)] if state == torch.uint8 else []
        options = {"stochastic_rounding": master == "stochastic", "seed": 0, "gradient_scale": 1.0}
        yield [*lists, scales, [torch.zeros(())]], {**options, "zero_grads": extras}, extras


def _on_device(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Hyperparameters of which those that may be tensors are."""
    tensors = {name: torch.zeros((), dtype=dtype) for name in ("lr", "beta1", "beta2", "gradient_scale")}
    return {**options, **tensors}


def _adamw(kernels: Any) -> None:
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    for lists, options, extras in _moments(amsgrad=True):
        for decoupled in (True, False)[: 1 + extras]:
            kernels.adamw_(*lists, **hyper, **options, decoupled=decoupled)
    for dtype in (torch.float32, torch.float64):
        kernels.adamw_(*lists, **_on_device({**hyper, **options}, dtype), decoupled=True)


def _lamb(kernels: Any) -> None:
    hyper = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True,
        "grad_averaging": True, "adapt": True, "trust_clip": False,
    }  # fmt: skip
    for lists, options, _ in _moments(amsgrad=False):
        kernels.lamb_(*lists, **hyper, **options)
    for dtype in (torch.float32, torch.float64):
        kernels.lamb_(*lists, **_on_device({**hyper, **options}, dtype))


def _cross_entropy(kernels: Any) -> None:
    # 32000 and 30522 (BERT) have the largest block; few classes have one warp, and 1 becomes a constant.
    sizes = [(dtype, vocab) for dtype in DTYPES for vocab in (32000, 30522)]
    for dtype, vocab in [*sizes, *((torch.float32, few) for few in (1, 3, 1000))]:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        empty = torch.empty if vocab % 16 == 0 else _unaligned
        logits, dlogits = (empty(2, vocab, dtype=dtype) for _ in range(2))
        label, slots = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)
        weight, of_slots, of_all = (
            torch.ones(*shape, dtype=real) for shape in ((vocab,), (2, 64), (2, vocab))
        )
        sums, scale = torch.empty(2, 2, dtype=real), torch.ones((), dtype=real)
        plain, smooth = Options(), Options(label_smoothing=0.1)
        for rows in (Rows(logits, label, None, None, plain), Rows(logits, label, None, weight, smooth)):
            kernels.cross_entropy_forward(rows)
            kernels.cross_entropy_forward(rows, dlogits=dlogits, scale=scale)
            kernels.cross_entropy_backward(rows, sums, scale, dlogits)
        # The rest once for each dtype, half of them aligned.
        if vocab != (32000 if dtype in (torch.bfloat16, torch.float64) else 30522) and vocab != 3:
            continue
        every = Options(label_smoothing=0.1, softcap=30.0)
        kernels.cross_entropy_part(Rows(logits, label, None, None, plain))
        for rows in (
            Rows(logits, label, None, None, Options(scale=0.5)),
            Rows(logits, label, None, None, Options(softcap=30.0)),
            Rows(logits, label, None, weight, every),
            Rows(logits, slots, of_slots, None, plain),
            Rows(logits, slots, None, weight, every),
            Rows(logits, None, of_all, None, plain),
            Rows(logits, None, of_all, weight, every),
        ):
            statistics = rows.target is label
            kernels.cross_entropy_forward(rows, statistics=statistics, dlogits=dlogits, scale=scale)
            kernels.cross_entropy_part(rows, statistics=statistics)
            kernels.cross_entropy_backward(rows, sums, scale, dlogits)


def _elementwise_loss(kernels: Any) -> None:
    op = importlib.import_module("superfine_kernels._elements")
    layouts: list[tuple[torch.dtype, Any]] = [(dtype, torch.empty) for dtype in DTYPES]
    layouts.append((torch.float32, _unaligned))
    for (dtype, empty), loss in itertools.product(layouts, op.CODES):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        x, t, gradient = (empty(8192, dtype=dtype) for _ in range(3))
        plain = op.Elements(loss, x, t, op.Pattern(None, 1), op.Pattern(None, 1))
        kernels.elementwise_loss(plain, total=True)
        kernels.elementwise_loss(plain, gradient=gradient, scale=torch.ones((), dtype=real))
        values = torch.ones(8192, dtype=real)  # one for each class, and for each row of thousands or of a few
        weighted = op.Elements(loss, x, t.to(real), op.Pattern(values, 4096), op.Pattern(values, 1))
        kernels.elementwise_loss(weighted, losses=values)
        kernels.elementwise_loss(weighted, gradient=gradient, scale=values)
        short = op.Elements(loss, x, t, op.Pattern(values, 20), op.Pattern(values, 20))
        kernels.elementwise_loss(short, gradient=gradient, denominator=2.0, total=True)


def _layer_norm(kernels: Any) -> None:
    # Short rows share a program; 768 fills a block but in part; the longest rows need the most registers.
    sizes = [(dtype, 4096 if dtype == torch.float64 else 8192) for dtype in DTYPES]
    for dtype, size in [*sizes, *itertools.product((torch.float32, torch.bfloat16), (64, 768))]:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        x, y, more = (torch.empty(4096, size, dtype=dtype) for _ in range(3))
        weight, dweight, dbias = (torch.empty(size, dtype=kind) for kind in (dtype, real, real))
        for rms in (False, True):
            statistics = torch.empty(2 - rms, 4096, dtype=real)
            bias = None if rms else weight
            kernels.layer_norm(rms, x, weight, bias, None, 1e-5, 0.0, rms, None, y, None)
            kernels.layer_norm(rms, x, weight, bias, more, 1e-5, 1.0, False, more, y, statistics)
            kept = (x, weight, statistics, 0.0)
            kernels.layer_norm_gradient(rms, y, None, *kept, x, None, None)
            kernels.layer_norm_gradient(rms, y, more, *kept, x, dweight, None if rms else dbias)
        kernels.layer_norm_gradient(True, y, None, None, None, None, 0.0, None, None, dbias)


def _activation(kernels: Any) -> None:
    op = importlib.import_module("superfine_kernels.activation")
    layouts: list[tuple[torch.dtype, Any]] = [(dtype, torch.empty) for dtype in DTYPES]
    layouts.append((torch.float32, _unaligned))
    for (dtype, empty), function in itertools.product(layouts, op.CODES):
        gate, up = empty(64, 8192, dtype=dtype).chunk(2, -1)
        dense, grad, out, dup = (empty(64 * 4096, dtype=dtype).view(64, 4096) for _ in range(4))
        kernels.activation(function, op.Layout.of(dense, None, None), out, None)
        kernels.activation(function, op.Layout.of(dense, None, grad), out, None)
        kernels.activation(function, op.Layout.of(gate, up, None), out, None)
        kernels.activation(function, op.Layout.of(gate, up, grad), out, dup)
        kernels.activation(function, op.Layout.of(gate, None, grad), None, dup)


#: For each file of superfine_kernels/triton: calls that launch every kernel in every specialisation that matters.
CALLS: dict[str, Callable[[Any], None]] = {
    "activation": _activation,
    "adamw": _adamw,
    "cross_entropy": _cross_entropy,
    "elementwise_loss": _elementwise_loss,
    "lamb": _lamb,
    "layer_norm": _layer_norm,
}


# --- compiling ---------------------------------------------------------------------------------------------


def compile_triton(arch: str, ops: Sequence[str] | None = None) -> list[TritonKernel]:
    """Compile the Triton kernels of `ops` (default: all) for `arch`, such as `"sm_90"`, in another process.

    Raises:
        ValueError: `arch` or an op is unknown.
        RuntimeError: a kernel does not compile.
    """
    kernels, failed = try_triton(arch, ops)
    if failed:
        reasons = "; ".join(f"{one.op}: {one.kernel}: {one.reason}" for one in failed)
        raise RuntimeError(f"compile_triton: {arch} failed; expected kernels that compile: {reasons}")
    return kernels


def try_triton(arch: str, ops: Sequence[str] | None = None) -> tuple[list[TritonKernel], list[Uncompiled]]:
    """:func:`compile_triton`, which goes on where a kernel does not compile.

    Raises:
        ValueError: `arch` or an op is unknown.
    """
    capability_of(arch)
    for op in ops or ():
        if op not in CALLS:
            raise ValueError(f"compile_triton: ops has {op!r}; expected some of {', '.join(CALLS)}")
    done = subprocess.run(
        [sys.executable, "-m", "superfine_bench.aot", arch, *(CALLS if ops is None else ops)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [Uncompiled(**record) for record in records if "reason" in record]
    if done.returncode != 0:
        failed.append(Uncompiled("", "", (done.stderr.strip() or "no output").splitlines()[-1]))
    return [TritonKernel(**record) for record in records if "reason" not in record], failed


def _main(arch: str, *ops: str) -> None:
    for op in ops:
        found: list[TritonKernel | Uncompiled] = []
        with _recording(capability_of(arch)) as (compiled, failed):
            try:
                CALLS[op](importlib.import_module(f"superfine_kernels.triton.{op}"))
            except Exception as error:
                failed[""] = error
        found += [_described(op, arch, kernel) for kernel in compiled.values()]
        for name, reason in failed.items():
            # Triton puts the source before what it has to say of it.
            said = getattr(reason, "error_message", None) or str(reason) or type(reason).__name__
            found.append(Uncompiled(op, name, first_error(said)))
        for one in found:
            print(json.dumps(dataclasses.asdict(one)))


@contextmanager
def _recording(capability: int) -> Iterator[tuple[dict[str, Any], dict[str, Exception]]]:
    """Compile what is launched, for a GPU of `capability`, and launch nothing.

    Yields what was compiled, and by its function's name, why a kernel was not.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    compiled: dict[str, Any] = {}
    failed: dict[str, Exception] = {}
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            failed.setdefault(self.fn.__name__, error)
        else:
            compiled[kernel.hash] = kernel

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = run
    try:
        yield compiled, failed
    finally:
        JITFunction.run = launch


def _described(op: str, arch: str, kernel: Any) -> TritonKernel:
    names = kernel.src.fn.arg_names
    usage = _usage(kernel.asm["cubin"])
    return TritonKernel(
        op=op,
        kernel=kernel.src.fn.__name__,
        arch=arch,
        pointers={name: kind[1:] for name, kind in kernel.src.signature.items() if kind.startswith("*")},
        constants={names[path[0]]: str(value) for path, value in kernel.src.constants.items()},
        aligned=[
            names[path[0]] for path, what in kernel.src.attrs.items() if ["tt.divisibility", 16] in what
        ],
        warps=kernel.metadata.num_warps,
        registers=usage.registers,
        stack=usage.stack,
        shared=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
    )


def _usage(cubin: bytes) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (usage,) = resource_usage(file.name).values()
    return usage


if __name__ == "__main__":
    _main(*sys.argv[1:])
