"""total_norm against float64; the same bits on every instruction set, and whichever way tensors are read."""

from __future__ import annotations

import math

import pytest
import torch
from support import ISAS, random_like, threads

from superfine_kernels import _cpu, total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_norm_agrees_with_float64(dtype):
    tensors = random_like([torch.empty(n, dtype=dtype) for n in (0, 1, 31, 33, 2047, 2049, 65_537, 200_000)])
    exact = torch.cat([t.double() for t in tensors]).norm().item()
    assert total_norm(tensors) == pytest.approx(exact, rel=1e-6)
    assert total_norm(tensors, backend="reference") == pytest.approx(exact, rel=1e-5)
    assert total_norm([]) == 0.0


def test_the_norm_has_the_same_bits_where_tensors_are_read_through_attributes():
    tensors = random_like([torch.empty(n) for n in (0, 1, 2049, 65_537)])
    reader = _cpu.TensorReader(torch)
    expected = _cpu.sum_of_squares(reader, tensors, threads=2, isa="")
    reader.use_attributes()
    assert _cpu.sum_of_squares(reader, tensors, threads=2, isa="") == expected
    for other in (torch._neg_view(tensors[1]), tensors[2].to_sparse(), torch.zeros(3, device="meta")):
        assert _cpu.sum_of_squares(reader, [tensors[3], other], threads=2, isa="") is None


def test_the_norm_has_the_same_bits_everywhere():
    tensors = random_like([torch.empty(n) for n in (1, 33, 70_001, 400_000)])
    found = set()
    for isa in ISAS:
        for count in (1, 2, 3):
            with threads(count):
                found.add(total_norm(tensors, backend=f"cpu:{isa}"))
    assert len(found) == 1


def test_the_norm_takes_what_has_no_kernel():
    complexes = torch.tensor([3 + 4j])
    strided = torch.arange(6.0).view(2, 3)[:, :2]
    sparse = torch.tensor([[0.0, 2.0]]).to_sparse()
    assert total_norm([complexes, strided, sparse]) == pytest.approx((25 + 26 + 4) ** 0.5)
    assert math.isnan(total_norm([torch.tensor([1.0, math.nan])]))
