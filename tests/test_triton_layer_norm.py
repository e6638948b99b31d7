"""The Triton kernels of layer_norm and rms_norm, in Triton's interpreter, against float64 and the CPU's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from layer_norm_cases import TOLERANCE, assert_agrees, inputs
from support import one_warning, same_bits

from superfine_kernels import rms_norm
from superfine_kernels.triton import layer_norm as kernels

pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(not triton_interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("uninitialized_memory_is_nan"),
]

OPS = ["layer_norm", "rms_norm"]


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    triton_interpreter.install()


# Several rows in a program, the last one not full; a row that fills its block but in part; a long row of its own.
@pytest.mark.parametrize("shape", [(37, 64), (2, 3, 100), (2, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_float64(op, dtype, shape):
    assert_agrees(op, inputs(op, shape, dtype, True, "weight bias"), backend="triton")
    assert_agrees(op, inputs(op, shape, dtype, False, ""), backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_frozen_parts(op):
    for trained in (("weight",), ("bias", "input"), ("input",), ("bias",)):
        case = inputs(op, (20, 48), torch.float32, True, "weight bias", trained=trained)
        assert_agrees(op, case, backend="triton")


def test_many_rows_are_added_up_by_few_programs(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_SUMS", 2)
    monkeypatch.setattr(kernels, "LONGEST_WITH_SUMS", 0)  # two launches
    assert_agrees(
        "layer_norm", inputs("layer_norm", (50, 300), torch.float32, True, "weight bias"), backend="triton"
    )


def test_a_large_mean_does_not_cancel():
    case = inputs("layer_norm", (4, 768), torch.float32, False, "weight bias", offset=1e4)
    assert_agrees("layer_norm", case, tolerance=3e-6, backend="triton")


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_llama(weight_dtype):
    x, weight = torch.randn(9, 96).bfloat16(), torch.randn(96).to(weight_dtype)
    ours, cpu = (rms_norm(x, weight, cast_before_weight=True, backend=name) for name in ("triton", "cpu"))
    assert ours.dtype == weight_dtype
    torch.testing.assert_close(ours, cpu, rtol=2**-7, atol=0)
    assert (ours != cpu).float().mean() < 0.01


def test_gemmas_weights_are_one_more():
    case = inputs("rms_norm", (9, 130), torch.float64, False, "weight")
    assert_agrees("rms_norm", case, tolerance=TOLERANCE[torch.float64], backend="triton", weight_offset=1.0)


def test_nan_and_infinity_spoil_their_row_alone():
    x = torch.randn(6, 70)
    x[1, 3], x[3, 69] = torch.nan, torch.inf
    for op in OPS:
        case = inputs(op, (6, 70), torch.float32, False, "")
        case.tensors[0].data.copy_(x)
        for found in case.results(backend="triton"):
            assert found.isnan().any(-1).tolist() == [False, True, False, True, False, False]


def test_rows_that_no_program_holds_go_to_torch_with_a_warning():
    x = torch.randn(1, 8193)
    with one_warning("takes rows of up to 8192 elements"):
        y = rms_norm(x, backend="triton")
    assert same_bits(y, rms_norm(x, backend="reference"))
