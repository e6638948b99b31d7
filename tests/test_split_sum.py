"""The sum of bfloat16 tensors whose numbers are held in two halves has the bits of one in float32."""

import pytest
import torch
from support import ISAS
from torch import Tensor

from superfine_kernels import _cpu

QUIET_NAN = 0x7FC00000


def bits(x: Tensor) -> Tensor:
    """Of float32 numbers, NaN as the one that the halves hold."""
    return torch.where(x.isnan(), QUIET_NAN, x.view(torch.int32))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in csrc/core/dtype.h: the upper one is rounded, halves away from zero."""
    whole = bits(x).long()
    upper, lower = (whole + 0x8000 >> 16) & 0xFFFF, whole & 0xFFFF
    high, low = (torch.where(half < 0x8000, half, half - 0x10000).short() for half in (upper, lower))
    return high.view(torch.bfloat16), low


def any_numbers(count: int, seed: int) -> Tensor:
    """Random bits: infinities, NaN and subnormal numbers are among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).int().view(torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 16384, 16385, 50_001])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_are_those_of_a_float32_sum(isa, count, threads):
    total = any_numbers(count, 0)
    total[: count // 2] = torch.randn(count // 2) * 3  # of like sizes, so that sums round
    high, low = halves(total)
    for seed in (1, 2):
        x = any_numbers(count, seed).bfloat16()
        x[: count // 2] = torch.randn(count // 2).bfloat16()
        _cpu.add_to_split(high.data_ptr(), low.data_ptr(), x.data_ptr(), count, threads=threads, isa=isa)
        total = total + x.float()
        expected_high, expected_low = halves(total)
        assert torch.equal(high.view(torch.int16), expected_high.view(torch.int16))
        assert torch.equal(low, expected_low)
    _cpu.round_split(high.data_ptr(), low.data_ptr(), count, threads=threads, isa=isa)
    rounded = total.bfloat16()
    assert torch.equal(high.isnan(), rounded.isnan())
    number = ~rounded.isnan()
    assert torch.equal(high.view(torch.int16)[number], rounded.view(torch.int16)[number])
