"""Every Triton kernel compiles for every GPU generation: no spills, shared memory within limits.

No GPU is needed. What these tests cannot show is that the machine code computes the right thing.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
import triton.language as tl
import triton_interpreter
from triton_aot import SHARED_MEMORY_LIMIT, Usage, compile_for

from superfine_kernels.triton import adamw, cross_entropy

pytestmark = pytest.mark.skipif(triton_interpreter.ACTIVE, reason="the interpreter replaces the compiler")

CAPABILITIES = [80, 90, 100, 120]
NAMES = {tl.float32: "fp32", tl.bfloat16: "bf16", tl.float16: "fp16", tl.float64: "fp64"}
ADAMW_DTYPES = [
    (tl.float32, tl.float32),
    (tl.bfloat16, tl.bfloat16),
    (tl.bfloat16, tl.float32),
    (tl.float16, tl.float16),
    (tl.float16, tl.float32),
    (tl.float64, tl.float64),
]
BIG_VOCAB = 30522  # makes the largest block


def opmath(dtype: tl.dtype) -> tl.dtype:
    return tl.float64 if dtype == tl.float64 else tl.float32


def check(usage: Usage, capability: int, warps: int) -> None:
    assert usage.stack == 0, "registers spilled"
    assert usage.shared <= SHARED_MEMORY_LIMIT[capability]
    assert usage.registers * 32 * warps <= 65536, "does not fit into a multiprocessor's registers"


def assert_16_bytes_wide(ptx: str) -> None:
    assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx), "no 16-byte load"
    assert re.search(r"st\.global\S*\.(v4\.b32|v2\.b64)", ptx), "no 16-byte store"


def compile_adamw(capability: int, param: tl.dtype, state: tl.dtype, amsgrad: bool, aligned: bool) -> Usage:
    constants = {
        "PARAM": param, "STATE": state, "OPMATH": opmath(param), "AMSGRAD": amsgrad, "ALIGNED": aligned,
        "TABLE_COLUMNS": adamw.TABLE_COLUMNS, "SCALAR_COLUMNS": adamw.SCALAR_COLUMNS,
        "CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK,
    }  # fmt: skip
    signature = {"table": "*i64", "scalars": f"*{NAMES[opmath(param)]}", "count": "i32"}
    return compile_for(
        capability, adamw._adamw, signature, constants, ["table", "scalars"],
        num_warps=adamw.WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES, ids=lambda dtype: NAMES[dtype])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adamw(capability, param, state):
    for amsgrad in (False, True):
        for aligned in (False, True):
            usage = compile_adamw(capability, param, state, amsgrad, aligned)
            check(usage, capability, adamw.WARPS)
    wide = re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v2\.b32)", usage.ptx)
    assert wide, "the aligned kernel loads element by element"
    if param == state == tl.float32:
        assert_16_bytes_wide(usage.ptx)
    if opmath(param) == tl.float32:
        assert not re.search(r"\.f64|\.approx|div\.full", usage.ptx), (
            "rounds otherwise than csrc/math/adamw.h"
        )


def compile_cross_entropy(
    capability: int, kernel: str, dtype: tl.dtype, vocab: int, *, full: bool, aligned: bool
) -> tuple[Usage, int]:
    """`full`: with class weights, label smoothing and the gradient; otherwise plain losses, or backward."""
    real = NAMES[opmath(dtype)]
    block, warps = cross_entropy._block(vocab)
    signature = {
        "input": f"*{NAMES[dtype]}", "target": "*i64", "weight": f"*{real}", "losses": f"*{real}",
        "lses": f"*{real}", "dlogits": f"*{NAMES[dtype]}", "scale": f"*{real}", "vocab": "i32",
        "row_stride": "i32", "target_stride": "i32", "scale_stride": "i32", "dlogits_stride": "i32",
        "ignore_index": "i32",
    }  # fmt: skip
    constants = {
        "LABEL_SMOOTHING": 0.1 if full else 0.0, "HAS_WEIGHT": full, "OPMATH": opmath(dtype),
        "BLOCK": block, "target_stride": 1,
    }  # fmt: skip
    if vocab == 1:  # Triton makes a constant of an argument that is 1
        constants["vocab"] = 1
    if not full:
        constants["weight"] = None
    if kernel == "_forward":
        constants["WRITE"] = full
        if not full:
            constants.update(dlogits=None, scale=None)
    names = ["input", "dlogits", "vocab", "row_stride", "dlogits_stride"] if aligned else []
    jitted = getattr(cross_entropy, kernel)
    signature = {name: kind for name, kind in signature.items() if name in jitted.arg_names}
    divisible = [name for name in names if name not in constants]
    return compile_for(capability, jitted, signature, constants, divisible, num_warps=warps), warps


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cross_entropy(capability, dtype, kernel):
    for full in (False, True):
        for aligned in (False, True):
            usage, warps = compile_cross_entropy(
                capability, kernel, dtype, BIG_VOCAB, full=full, aligned=aligned
            )
            check(usage, capability, warps)
            if opmath(dtype) == tl.float32:
                assert ".f64" not in usage.ptx, "computes in float64"
    assert_16_bytes_wide(usage.ptx)


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 1000])
def test_cross_entropy_over_few_classes(vocab, kernel):
    for full in (False, True):
        usage, warps = compile_cross_entropy(90, kernel, tl.float32, vocab, full=full, aligned=False)
        check(usage, 90, warps)
