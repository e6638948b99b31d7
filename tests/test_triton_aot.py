"""Every Triton kernel compiles for every GPU generation: no spills, shared memory within limits.

No GPU is needed. What these tests cannot show is that the machine code computes the right thing.
"""

from __future__ import annotations

import ast
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
import triton_interpreter
from superfine_bench.aot import CALLS, compile_triton
from superfine_bench.binaries import LIMITS, REGISTERS, capability_of

import superfine_kernels.triton

pytestmark = [
    pytest.mark.skipif(
        triton_interpreter.ACTIVE, reason="compiles in another process, the same with it or without"
    ),
    pytest.mark.slow,  # two minutes for each generation, until Triton's cache has it
]

SOURCES = Path(superfine_kernels.triton.__file__).parent


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def compiling():
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # each in a process of its own
        yield {arch: pool.submit(compile_triton, arch) for arch in ARCHITECTURES}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, compiling):
    return compiling[request.param].result()


def of_op(kernels, op, **constants):
    found = [
        kernel
        for kernel in kernels
        if kernel.op == op and all(kernel.constants.get(name) == value for name, value in constants.items())
    ]
    assert found, f"no kernel of {op} has {constants}"
    return found


def assert_16_bytes_wide(ptx: str) -> None:
    assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx), "no 16-byte load"
    assert re.search(r"st\.global\S*\.(v4\.b32|v2\.b64)", ptx), "no 16-byte store"


def test_no_kernel_spills_registers(kernels):
    # Other Tritons than the pinned one allocate otherwise: under 3.6 and 3.9 a few kernels lack two registers.
    most = 0 if triton.__version__.startswith("3.7.") else 8
    assert [kernel for kernel in kernels if kernel.stack > most] == []


def test_blocks_fit_into_a_multiprocessor(kernels):
    for kernel in kernels:
        assert kernel.shared <= LIMITS[capability_of(kernel.arch)].shared_per_block, kernel
        assert kernel.registers * 32 * kernel.warps <= REGISTERS, kernel


def test_adamw_loads_packs_where_tensors_are_aligned(kernels):
    for kernel in of_op(kernels, "adamw", ALIGNED="True"):
        assert re.search(r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v2\.b32)", kernel.ptx), kernel
    for state in ("fp32", "bf16", "uint8"):
        for kernel in of_op(kernels, "adamw", ALIGNED="True", PARAM="fp32", STATE=state):
            assert_16_bytes_wide(kernel.ptx)


def test_lamb_loads_packs_where_tensors_are_aligned(kernels):
    moments = [kernel for kernel in kernels if kernel.kernel == "_lamb_moments"]
    params = [kernel for kernel in kernels if kernel.kernel == "_lamb_param"]
    for state in ("fp32", "bf16", "uint8"):
        for kernel in of_op(moments, "lamb", ALIGNED="True", PARAM="fp32", STATE=state):
            assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", kernel.ptx), kernel
        for kernel in of_op(params, "lamb", ALIGNED="True", PARAM="fp32", STATE=state):
            assert_16_bytes_wide(kernel.ptx)


def test_codes_of_8_bit_moments_are_written_in_words_where_there_is_no_mask(kernels):
    for kernel in kernels:
        quantized = (kernel.constants.get("STATE"), kernel.constants.get("ALIGNED")) == ("uint8", "True")
        if quantized and kernel.kernel in ("_adamw", "_lamb_moments"):
            assert kernel.ptx.count("st.global.b8") == 2 * 4, kernel  # both moments, 4 elements a thread


@pytest.mark.skipif(
    triton.__version__.startswith("3.5."),
    reason="Triton 3.5's div_rn and sqrt_rn flush denormal numbers to zero",
)
def test_optimizers_round_as_the_cpu_kernels_do(kernels):
    for kernel in of_op(kernels, "adamw", OPMATH="fp32"):
        assert not re.search(r"\.f64|\.ftz|\.approx|div\.full", kernel.ptx), kernel
    for kernel in kernels:
        if kernel.op == "lamb":  # its sums are in float64
            assert not re.search(r"\.ftz|\.approx|div\.full", kernel.ptx), kernel


def test_cross_entropy_computes_in_float64_for_float64_only(kernels):
    for kernel in of_op(kernels, "cross_entropy", OPMATH="fp32"):
        assert ".f64" not in kernel.ptx, kernel


def test_cross_entropy_reads_and_writes_16_bytes_where_rows_are_aligned(kernels):
    whole_rows = {"input", "dlogits", "vocab", "row_stride", "dlogits_stride"}
    aligned = [kernel for kernel in of_op(kernels, "cross_entropy") if whole_rows <= set(kernel.aligned)]
    assert {kernel.kernel for kernel in aligned} == {"_forward", "_backward"}
    for kernel in aligned:
        assert_16_bytes_wide(kernel.ptx)


def test_elementwise_losses_compute_in_float64_for_float64_only(kernels):
    for kernel in of_op(kernels, "elementwise_loss", OPMATH="fp32"):
        assert ".f64" not in kernel.ptx, kernel


def test_elementwise_losses_read_and_write_16_bytes_where_tensors_are_aligned(kernels):
    aligned = [
        kernel for kernel in of_op(kernels, "elementwise_loss", GRADIENT="True") if "input" in kernel.aligned
    ]
    assert aligned
    for kernel in aligned:
        assert_16_bytes_wide(kernel.ptx)


def test_activations_read_and_write_16_bytes_and_compute_in_float64_for_float64_only(kernels):
    found = 0
    for kernel in of_op(kernels, "activation", OPMATH="fp32"):
        assert ".f64" not in kernel.ptx, kernel
        tensors = [n for n in ("gate", "up", "grad", "out", "dup") if kernel.constants.get(n) != "None"]
        if {"columns", *tensors} <= set(kernel.aligned):
            assert_16_bytes_wide(kernel.ptx)
            found += 1
    assert found


def test_norms_compute_in_float64_for_float64_only(kernels):
    for kernel in of_op(kernels, "layer_norm", OPMATH="fp32"):
        assert ".f64" not in kernel.ptx, kernel


def test_norms_read_and_write_16_bytes_where_rows_are_aligned(kernels):
    for kernel in of_op(kernels, "layer_norm"):
        if kernel.constants["BLOCK"] != "64" and kernel.constants.get("dinput") != "None":
            assert {"size"} <= set(kernel.aligned)
            assert_16_bytes_wide(kernel.ptx)


def test_cross_entropy_has_one_kernel_for_all_values_of_its_options(kernels):
    values = {
        "smoothing",
        "z_loss",
        "softcap",
        "scale",
        "ignore_index",
        "targets",
        "classes",
        "target_stride",
    }
    for kernel in of_op(kernels, "cross_entropy"):
        assert values & (kernel.constants.keys() | set(kernel.aligned)) == set(), kernel


def test_cross_entropy_of_plain_labels_holds_nothing_of_the_options(kernels):
    plain = {"TARGETS": "label", "TRANSFORM": "none", "SMOOTH": "False", "OPMATH": "fp32"}
    for kernel in of_op(kernels, "cross_entropy", **plain):
        assert kernel.registers <= 48, kernel
        of_forward = kernel.kernel == "_forward"
        writes = kernel.constants.get("dlogits") != "None"
        assert kernel.shared <= 32, kernel  # reductions across 8 warps; no probabilities to be laid out anew
        # Rescaling, the block of 8 a thread, and the 8 of the gradient.
        assert kernel.ptx.count("ex2.approx") <= 9 * of_forward + 8 * writes, kernel


def test_gradients_of_slots_wait_for_all_threads_before_they_overwrite_logits(kernels):
    for kernel in of_op(kernels, "cross_entropy", TARGETS="slots"):
        if kernel.constants.get("dlogits") != "None" and kernel.kernel == "_backward":
            assert kernel.ptx.count("bar.sync") >= 2, kernel


def jit_functions():
    """(file, function) -> the names that its code mentions, for everything that Triton compiles."""
    found = {}
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
                found[path.stem, node.name] = names
    return found


def test_every_triton_function_is_compiled(kernels):
    functions = jit_functions()
    assert len(functions) >= 6
    reached: set[tuple[str, str]] = set()
    ahead = [(kernel.op, kernel.kernel) for kernel in kernels]
    while ahead:
        if (function := ahead.pop()) in reached:
            continue
        reached.add(function)
        own = {other for file, other in functions if file == function[0]}
        for name in functions[function]:
            ahead += [
                other
                for other in functions
                if other[1] == name and (other[0] == function[0] or name not in own)
            ]
    missing = functions.keys() - reached
    assert missing == set(), f"superfine_bench.aot.CALLS ({', '.join(CALLS)}) launches none of these"


def test_an_unknown_architecture_or_op_is_an_error():
    with pytest.raises(ValueError, match=r"arch is 'h100'; expected one of sm_80, .*sm_90"):
        compile_triton("h100")
    with pytest.raises(ValueError, match=r"ops has 'adam'; expected some of activation, adamw"):
        compile_triton("sm_90", ["adam"])
