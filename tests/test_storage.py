"""How AdamW and LAMB store parameters and moments: 8-bit codes, Kahan compensation, rounding at random."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import AdamWCase, LambCase
from support import ISAS, assert_same_bits_in_lists, pairwise, same_bits, threads

from superfine_kernels import _storage, adamw_, lamb_

OPS = [(adamw_, AdamWCase), (lamb_, LambCase)]
SIZES = [0, 1, 31, 255, 256, 257, 1023, 1025, 2049, 70_000]
QUANTIZED = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0, spread=3.0):
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(spread).exp()


def quantized_case(kind, param, sizes=SIZES):
    """A case with 8-bit moments, and their scales."""
    case = kind.random(sizes, param, torch.float32)
    triples = [_storage.quantize(m, v) for m, v in zip(case.exp_avgs, case.exp_avg_sqs, strict=True)]
    case.exp_avgs, case.exp_avg_sqs = [t[0] for t in triples], [t[1] for t in triples]
    return case, [t[2] for t in triples]


# --- 8-bit codes --------------------


def test_a_code_is_within_a_sixteenth_of_its_number():
    m, v = random(5000), random(5000, seed=1).square()
    first, second, scales = _storage.quantize(m, v)
    backs = _storage.dequantize(first, second, scales)
    for x, back, finest in zip((m, v), backs, (2.0**-18, 2.0**-34), strict=True):
        largest = (
            torch.nn.functional.pad(x.abs(), (0, 120)).view(-1, 256).amax(1).repeat_interleave(256)[:5000]
        )
        assert ((back - x).abs() <= x.abs() / 16 + finest * largest).all()
        assert (x.abs() < finest * largest).sum() < 1000
    assert first.dtype == second.dtype == torch.uint8
    assert scales.shape == (2, 20)


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40))
def test_codes_of_codes_are_the_same(numbers):
    m = torch.tensor(numbers)
    v = m.square().nan_to_num(posinf=1e38)
    once = _storage.quantize(m, v)
    m_back, v_back = _storage.dequantize(*once)
    assert (m_back * m >= 0).all()  # no sign changes
    assert ((v_back > 0) | (v == 0) | (v.amax() < torch.finfo(torch.float32).tiny)).all()
    twice = _storage.quantize(m_back, v_back)
    torch.testing.assert_close(_storage.dequantize(*twice)[0], m_back, rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(_storage.dequantize(*twice)[1], v_back, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_nan_and_its_neighbours_are_not(bad):
    m, v = torch.ones(700), torch.ones(700)
    m[300] = bad
    v[600] = abs(bad)
    m_back, v_back = _storage.dequantize(*_storage.quantize(m, v))
    assert m_back.isnan().nonzero().flatten().tolist() == list(range(256, 512))
    assert v_back.isnan().nonzero().flatten().tolist() == list(range(512, 700))


def test_second_moments_are_right_on_average():
    v = torch.full((1 << 16,), 1.03)
    v[::256] = 1.875  # the largest of its block
    _, codes, scales = _storage.quantize(torch.zeros_like(v), v, _storage.random_key(0, 1))
    back = _storage.dequantize(torch.zeros_like(codes), codes, scales)[1].view(-1, 256)[:, 1:]
    assert set(back.unique().tolist()) == {1.0, 1.125}
    assert back.mean().item() == pytest.approx(1.03, abs=4 * 0.125 / 2 / 256)


@pytest.mark.parametrize(("op", "kind"), OPS)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_write_the_codes_of_the_reference(op, kind, isa):
    # With both betas 0 the moments are g and g * g, without a rounding in which the two could differ.
    case = kind.random(SIZES)
    for grad in case.grads:
        grad.copy_(random(len(grad), seed=len(grad)))
    expected = [
        _storage.quantize(g, g * g, _storage.random_key(7, int(s) + 1))
        for g, s in zip(case.grads, case.steps, strict=True)
    ]
    case.exp_avgs = [torch.zeros_like(g, dtype=torch.uint8) for g in case.grads]
    case.exp_avg_sqs = [torch.zeros_like(g, dtype=torch.uint8) for g in case.grads]
    scales = [torch.zeros(_storage.scales_shape(g.numel())) for g in case.grads]
    op(*case.lists(), lr=0.1, beta1=0.0, beta2=0.0, scales=scales, seed=7, backend=f"cpu:{isa}")
    assert_same_bits_in_lists(
        [case.exp_avgs, case.exp_avg_sqs, scales], [list(x) for x in zip(*expected, strict=True)]
    )


@pytest.mark.parametrize(("op", "kind"), OPS)
@pytest.mark.parametrize("param", QUANTIZED)
@pytest.mark.parametrize("anchored", [False, True])
def test_a_step_with_8_bit_moments_agrees_with_the_reference(op, kind, param, anchored):
    case, scales = quantized_case(kind, param)
    twin, twin_scales = case.to("cpu"), [s.clone() for s in scales]
    options = {"lr": 0.01, "weight_decay": 0.1}
    if anchored:
        options["anchors"] = [p + 1 for p in case.params]
    op(*case.lists(), scales=scales, **options)
    op(*twin.lists(), scales=twin_scales, **options, backend="reference")
    tolerance = 2e-5 if param == torch.float32 else 2 * torch.finfo(param).eps
    for a, b in zip(case.params, twin.params, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for ours, theirs in ((case.exp_avgs, twin.exp_avgs), (case.exp_avg_sqs, twin.exp_avg_sqs)):
        differences = torch.cat(ours).int() - torch.cat(theirs).int()
        assert differences.abs().max() <= 1
        assert (differences != 0).float().mean() < 1e-3  # a last bit of float32 decides about a code
    torch.testing.assert_close(torch.cat(scales, 1), torch.cat(twin_scales, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("op", "kind"), OPS)
def test_8_bit_moments_follow_the_float32_ones(op, kind):
    exact = kind.random([3000])
    for t in (*exact.exp_avgs, *exact.exp_avg_sqs):
        t.zero_()
    exact.steps[0].zero_()
    start = exact.params[0].clone()
    lean = exact.to("cpu")
    lean.exp_avgs, lean.exp_avg_sqs = ([torch.zeros(3000, dtype=torch.uint8)] for _ in range(2))
    scales = [torch.zeros(2, 12)]
    for step in range(200):
        for case in (exact, lean):
            case.grads[0].copy_(random(3000, seed=step, spread=0.5) + 0.1)
        op(*exact.lists(), lr=1e-3, weight_decay=0.0)
        op(*lean.lists(), lr=1e-3, weight_decay=0.0, scales=scales)
    moved = exact.params[0] - start
    error = lean.params[0] - exact.params[0]
    assert error.norm() < 0.1 * moved.norm()
    assert error.mean().abs() < 0.01 * moved.abs().mean()  # and no drift


# --- 16-bit parameters --------------------


def trajectories(op, kind, dtype, steps=300, **options):
    """A parameter of `dtype` and a float32 one after small steps with the same gradients."""
    half = kind.random([4000], dtype, torch.float32)
    for t in (*half.exp_avgs, *half.exp_avg_sqs, *half.steps):
        t.zero_()
    whole = half.to("cpu")
    whole.params, whole.grads = [p.float() for p in whole.params], [g.float() for g in whole.grads]
    for step in range(steps):
        half.grads[0].copy_(random(4000, seed=step, spread=0.1) + 0.2)
        whole.grads[0].copy_(half.grads[0])
        op(*half.lists(), lr=1e-4, weight_decay=0.1, **options)
        op(*whole.lists(), lr=1e-4, weight_decay=0.1)
    return half.params[0], whole.params[0]


@pytest.mark.parametrize(("op", "kind"), OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_compensation_keeps_small_steps_and_small_decay(op, kind, dtype):
    remainder = torch.zeros(4000, dtype=dtype)
    half, whole = trajectories(op, kind, dtype, remainders=[remainder])
    plain, _ = trajectories(op, kind, dtype)
    joined = half.double() + remainder.double()
    assert (joined - whole).norm() < 0.03 * (plain.double() - whole).norm()
    assert ((half.double() - joined).abs() <= torch.finfo(dtype).eps / 2 * joined.abs() + 1e-7).all()


@pytest.mark.parametrize(("op", "kind"), OPS)
def test_rounding_at_random_is_right_on_average(op, kind):
    half, whole = trajectories(op, kind, torch.bfloat16, stochastic_rounding=True)
    plain, _ = trajectories(op, kind, torch.bfloat16)
    bias, plain_bias = ((x.double() - whole).mean().abs() for x in (half, plain))
    assert bias < 0.2 * plain_bias
    assert ((half.double() - whole).abs() < 0.15 * whole.abs() + 0.1).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_number_becomes_one_of_its_neighbours(isa):
    numbers = torch.cat([random(10_000), torch.tensor([0.0, -0.0, 1e-40, 3.389e38])])
    params = [numbers.bfloat16()]
    wide = params[0].float() * torch.tensor(1.001)  # which bfloat16 does not hold
    zeros = [torch.zeros_like(wide)]
    adamw_(
        params, [torch.zeros_like(params[0])], zeros, [torch.zeros_like(wide)], [], [torch.zeros(())], lr=1.0,
        weight_decay=0.0, anchors=[params[0].clone()], stochastic_rounding=True, backend=f"cpu:{isa}",
    )  # fmt: skip
    assert torch.equal(params[0], numbers.bfloat16())  # exact numbers stay
    rounded = _storage.round_at_random(wide, _storage.random_key(0, 1))
    below = (wide.view(torch.int32) & ~0xFFFF).view(torch.float32)
    above = ((wide.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((rounded.float() == below) | (rounded.float() == above)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_round_at_random_as_the_reference_does(isa):
    # A step without gradient is one product, in which kernel and reference cannot differ.
    for size in SIZES:
        param = random(size, seed=size).bfloat16()
        expected = _storage.round_at_random(param.float() * torch.tensor(0.9), _storage.random_key(5, 1))
        nothing = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(3)]
        adamw_(
            [param], *([t] for t in nothing), [], [torch.zeros(())], lr=1.0, weight_decay=0.1, eps=1.0,
            stochastic_rounding=True, seed=5, backend=f"cpu:{isa}",
        )  # fmt: skip
        assert same_bits(param, expected)


def test_seeds_steps_and_tensors_round_differently():
    x = torch.full((1000,), 1.001)
    a = _storage.round_at_random(x, _storage.random_key(0, 1))
    others = [
        _storage.round_at_random(x, _storage.random_key(1, 1)),
        _storage.round_at_random(x, _storage.random_key(0, 2)),
        _storage.round_at_random(x + 1e-6, _storage.random_key(0, 1)),
    ]
    assert same_bits(a, _storage.round_at_random(x, _storage.random_key(0, 1)))
    for other in others:
        shared = ((a > 1) & (other > 1)).float().mean()
        assert shared < 2 * (a > 1).float().mean() * (other > 1).float().mean() + 0.02


# --- all storages --------------------

STORAGES = [
    (torch.float32, torch.uint8, {}),
    (torch.float16, torch.uint8, {}),
    (torch.bfloat16, torch.uint8, {"remainders": torch.int16}),
    (torch.bfloat16, torch.uint8, {"remainders": torch.bfloat16}),
    (torch.bfloat16, torch.uint8, {"stochastic_rounding": True}),
    (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True}),
    (torch.bfloat16, torch.float32, {"remainders": torch.bfloat16}),
    (torch.float16, torch.float32, {"remainders": torch.float16}),
    (torch.float32, torch.bfloat16, {}),
]


@pytest.mark.parametrize(("of", "storage", "anchored"), pairwise(OPS, STORAGES, [False, True]), ids=str)
def test_same_bits_on_every_instruction_set_and_thread_count(of, storage, anchored):
    (op, kind), (param, state, options), results = of, storage, []
    for isa in ISAS:
        for count in (1, 2, 3):
            given = dict(options)
            if state == torch.uint8:
                case, given["scales"] = quantized_case(kind, param)
            else:
                case = kind.random(SIZES, param, state)
            if "remainders" in options:
                given["remainders"] = [torch.ones_like(p, dtype=options["remainders"]) for p in case.params]
            if anchored:
                given["anchors"] = [p * 0.5 for p in case.params]
            with threads(count):
                for seed in (0, 1):
                    op(
                        *case.lists(), lr=0.1, weight_decay=0.3, gradient_scale=0.3, zero_grads=seed == 1, seed=seed,
                        backend=f"cpu:{isa}", **given,
                    )  # fmt: skip
            results.append(
                [*case.lists(), *(given[name] for name in ("remainders", "scales") if name in given)]
            )
    assert all((grad == 0).all() for grad in results[0][1])
    for other in results[1:]:
        assert_same_bits_in_lists(other, results[0])


@pytest.mark.parametrize(("op", "kind"), OPS)
def test_blocks_follow_the_order_of_memory(op, kind):
    # A transposed tensor and its memory read as a row are the same numbers, and so the same blocks.
    flat = kind.random([40 * 30])
    flat.exp_avgs, flat.exp_avg_sqs = ([torch.zeros(1200, dtype=torch.uint8)] for _ in range(2))
    flat.steps = [torch.zeros(())]
    turned = flat.to("cpu")
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(turned, name, [t.view(40, 30).t() for t in getattr(turned, name)])
    by_reference = turned.to("cpu")
    scales = [[torch.zeros(2, 5)] for _ in range(3)]
    for case, own in zip((flat, turned), scales, strict=False):
        op(*case.lists(), lr=0.1, scales=own)
    op(*by_reference.lists(), lr=0.1, scales=scales[2], backend="reference")
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        ours = getattr(turned, name)[0].t().reshape(-1)
        assert same_bits(ours, getattr(flat, name)[0])
        torch.testing.assert_close(getattr(by_reference, name)[0].t().reshape(-1), ours, rtol=1e-5, atol=1)
    torch.testing.assert_close(scales[2], scales[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("op", "kind"), OPS)
@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (torch.uint8, {}, "scales[0] is missing; expected a contiguous float32 (2, 2)"),
        (torch.uint8, {"scales": [torch.zeros(2, 3)]}, "scales[0] is float32 (2, 3) on cpu; expected a contiguous"),
        (torch.uint8, {"scales": [torch.zeros(2, 2).double()]}, "scales[0] is float64"),
        (torch.uint8, {"scales": [torch.zeros(2, 2).t()]}, "scales[0] is float32 (2, 2) on cpu"),
        (torch.float32, {"scales": [torch.zeros(2, 2)]}, "scales[0] is float32 (2, 2) on cpu; expected none"),
        (torch.float32, {"remainders": [torch.zeros(300)]}, "remainders[0] is float32 (300,) on cpu; expected int16"),
        (torch.float16, {}, "exp_avgs[0] is float16 (300,) on cpu; expected float32 (300,) on cpu"),
        (torch.float32, {"seed": -1}, "seed is -1 (int); expected an integer in [0, 2^32)"),
    ],
)  # fmt: skip
def test_storages_that_do_not_fit_are_refused_before_anything_moves(op, kind, state, options, message):
    case = kind.random([300], torch.float32, torch.float32)
    case.exp_avgs, case.exp_avg_sqs = ([t.to(state)] for t in (case.exp_avgs[0], case.exp_avg_sqs[0]))
    before = case.to("cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*case.lists(), lr=0.1, **options)
    assert_same_bits_in_lists(case.lists(), before.lists())


def test_amsgrad_has_no_8_bit_form():
    case, scales = quantized_case(AdamWCase, torch.float32, [300])
    case.max_exp_avg_sqs = [torch.zeros(300, dtype=torch.uint8)]
    with pytest.raises(
        ValueError, match=r"max_exp_avg_sqs\[0\] is uint8 .* expected none beside uint8 moments"
    ):
        adamw_(*case.lists(), lr=0.1, scales=scales)


@pytest.mark.parametrize("overlapping", ["scales", "remainders"])
def test_overlapping_storage_is_refused(overlapping):
    case, scales = quantized_case(AdamWCase, torch.bfloat16, [300, 300])
    options = {"scales": scales, "remainders": [torch.zeros_like(p) for p in case.params]}
    options[overlapping][1] = options[overlapping][0]
    with pytest.raises(ValueError, match="overlap in memory"):
        adamw_(*case.lists(), lr=0.1, **options)


def test_passes_opcheck():
    case, scales = quantized_case(AdamWCase, torch.bfloat16, [3, 300])
    lists = [*case.all_lists()[:-2], scales, case.steps]
    lists[6] = [torch.zeros_like(p) for p in case.params]
    hyper = {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "decoupled": False,
        "gradient_scale": 1.0, "zero_grads": True, "stochastic_rounding": False, "seed": 1,
    }  # fmt: skip
    torch.library.opcheck(torch.ops.superfine.adamw_.default, lists, hyper)
