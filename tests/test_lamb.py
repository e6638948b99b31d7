"""lamb_ on the CPU: against the formula in float64, and bit for bit where equal bits are promised."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ADAMW_DTYPES, LambCase
from support import ISAS, assert_same_bits_in_lists, one_warning, same_bits, threads
from torch import Tensor

from superfine_kernels import lamb_
from superfine_kernels.lamb import cost

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

HYPER = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True,
    "grad_averaging": True, "adapt": True, "trust_clip": False, "gradient_scale": 1.0,
}  # fmt: skip

# Nothing, one element, around one row of lanes (32), one block (2048) and one chunk (8192) of the sums.
SIZES = [0, 1, 31, 32, 33, 2047, 2048, 2049, 8191, 8192, 8193]
# Around a batch of tensors, and more chunks than a sum has lanes for them.
LARGE = [131071, 131072, 131073, 1_100_001]

OPTIONS = [
    {},
    {"bias_correction": False},
    {"grad_averaging": False},
    {"adapt": False},
    {"trust_clip": True, "lr": 0.3},
    {"gradient_scale": -0.25},
    {"weight_decay": 0.0},
    {"lr": 0.0},
    {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3},
]


def assert_step_agrees_with_float64(
    lists: Sequence[list[Tensor]], backend: str | None = None, **hyper
) -> None:
    """Steps `lists` in place and compares every element with the formula in float64.

    The moments with those of the same values; the parameters with what the moments as stored make of them, since
    the update of moments rounded to 16 bits is another one.
    """
    hyper = {**HYPER, **hyper}
    before = [[t.detach().to(torch.float64, copy=True) for t in tensors] for tensors in lists]
    moments = [[t.clone() for t in tensors] for tensors in before]
    moments[4] = [step.clone() for step in lists[4]]
    lamb_(*moments, **hyper, backend="reference")
    lamb_(*lists, **hyper, backend=backend)
    assert_same_bits_in_lists([lists[4]], [moments[4]])
    for i, param in enumerate(lists[0]):
        for k, beta in ((2, hyper["beta1"]), (3, hyper["beta2"])):
            actual, exact = lists[k][i], moments[k][i]
            info = torch.finfo(actual.dtype)
            # What cancels leaves the rounding errors of its terms.
            terms = (
                exact.abs()
                + beta * before[k][i].abs()
                + (before[1][i] * hyper["gradient_scale"]).abs() ** (k - 1)
            )
            error = (actual.double() - exact).abs()
            assert (error <= 8 * info.eps * (terms + info.smallest_normal)).all(), f"list {k}, tensor {i}"
        update, trust_ratio = _update(before[0][i], lists[2][i], lists[3][i], float(lists[4][i]), hyper)
        exact = before[0][i] - hyper["lr"] * trust_ratio * update
        error = (param.double() - exact).abs()
        computed_in = torch.finfo(torch.float64 if param.dtype == torch.float64 else torch.float32)
        moved = (hyper["lr"] * trust_ratio * update).abs() + hyper["lr"] * trust_ratio * hyper[
            "weight_decay"
        ] * before[0][i].abs()
        tolerance = torch.finfo(param.dtype).eps * exact.abs() + 64 * computed_in.eps * (
            before[0][i].abs() + moved
        )
        smallest = torch.finfo(param.dtype).smallest_normal
        assert (error <= tolerance + smallest).all(), f"param {i} of {param.numel()} elements"


def _update(p: Tensor, m: Tensor, v: Tensor, step: float, hyper: dict) -> tuple[Tensor, float]:
    """The update and its trust ratio, in float64."""
    m, v = m.double(), v.double()
    if hyper["bias_correction"]:
        m, v = m / (1 - hyper["beta1"] ** step), v / (1 - hyper["beta2"] ** step)
    update = m / (v.sqrt() + hyper["eps"]) + hyper["weight_decay"] * p
    norms = p.norm().item(), update.norm().item()
    ratio = norms[0] / norms[1] if hyper["adapt"] and min(norms) > 0 else 1.0
    return update, min(ratio, 1.0) if hyper["trust_clip"] else ratio


@pytest.mark.parametrize("hyper", OPTIONS, ids=str)
@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_agrees_with_the_formula_in_float64(param, state, hyper):
    case = LambCase.random(SIZES, param, state)
    for _ in range(2):
        assert_step_agrees_with_float64(case.lists(), **hyper)


@pytest.mark.parametrize("n", LARGE)
def test_large_tensors_agree_with_the_formula_in_float64(n):
    assert_step_agrees_with_float64(LambCase.random([n, 5]).lists())


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    dtypes=st.sampled_from(ADAMW_DTYPES),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.floats(1e-8, 1e-2),
    weight_decay=st.floats(0, 1),
    flags=st.tuples(*[st.booleans()] * 4),
    gradient_scale=st.floats(-2, 2),
)
def test_any_hyperparameters(sizes, dtypes, lr, betas, eps, weight_decay, flags, gradient_scale):
    case = LambCase.random(sizes, *dtypes)
    names = ("bias_correction", "grad_averaging", "adapt", "trust_clip")
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    hyper |= dict(zip(names, flags, strict=True))
    assert_step_agrees_with_float64(case.lists(), **hyper, gradient_scale=gradient_scale)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=8),
    dtypes=st.sampled_from(ADAMW_DTYPES),
)
def test_any_shapes(shapes, dtypes):
    case = LambCase.random([torch.Size(shape).numel() for shape in shapes], *dtypes)
    shaped = [[t.view(shape) for t, shape in zip(ts, shapes, strict=True)] for ts in case.lists()[:4]]
    assert_step_agrees_with_float64([*shaped, case.steps])


def test_mixed_dtypes_in_one_call():
    cases = [LambCase.random([17, 64, 2100], *dtypes) for dtypes in ADAMW_DTYPES]
    lists = [[t for case in cases for t in case.lists()[k]] for k in range(5)]
    assert_step_agrees_with_float64(lists)


# --- bits --------------------


@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_same_bits_on_every_instruction_set_thread_count_and_run(param, state):
    # Elements next to the special ones are in the same vectors; NaN makes the norms of its tensor NaN.
    case = LambCase.random([*SIZES, 131_073, 200_000], param, state)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, -1e-40, 3e38])
    case.grads[-2][100:108] = special
    case.params[6][100:108] = special
    results = []
    for isa in [*ISAS, ISAS[-1]]:
        for count in (1, 2, 3):
            copy = case.to("cpu")
            with threads(count):
                for _ in range(2):
                    lamb_(*copy.lists(), **HYPER, backend=f"cpu:{isa}")
            results.append(copy.lists())
    for other in results[1:]:
        assert_same_bits_in_lists(other, results[0])


def test_a_tensor_moves_the_same_whatever_steps_beside_it():
    together = LambCase.random([*SIZES, *LARGE])
    alone = together.to("cpu")
    lamb_(*together.lists(), **HYPER)
    for i in range(len(together.params)):
        lamb_(*([tensors[i]] for tensors in alone.lists()), **HYPER)
    assert_same_bits_in_lists(together.lists(), alone.lists())


def test_directions_kept_in_one_type_leave_those_of_another_alone():
    for dtype in (torch.float32, torch.float64, torch.float32):
        with threads(1):  # one buffer keeps all, in places of either size
            together = LambCase.random([*LARGE, 5000], dtype, dtype)
            alone = together.to("cpu")
            lamb_(*together.lists(), **HYPER)
        lamb_(*alone.lists(), **HYPER)
        assert_same_bits_in_lists(together.lists(), alone.lists())


def _sum_by_the_rule(squares: Tensor) -> float:
    """The sum that csrc/math/lamb.h describes: 32 lanes, blocks of 2048, chunks of 4 blocks, 128 lanes of chunks."""

    def tree(x: Tensor) -> Tensor:  # over the last dimension, halves first
        return (
            x[..., 0] if x.shape[-1] == 1 else tree(x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :])
        )

    def in_order(rows: Tensor) -> Tensor:  # over the first dimension
        total = torch.zeros_like(rows[0])
        for row in rows:
            total = total + row
        return total

    passes = -(-squares.numel() // (128 * 8192))
    padded = torch.zeros(passes * 128 * 8192, dtype=torch.float64)
    padded[: squares.numel()] = squares
    blocks = tree(in_order(padded.view(-1, 64, 32).transpose(0, 1)))
    chunks = tree(blocks.view(passes, 128, 4))
    return tree(tree(in_order(chunks).view(4, 32))).item()


@pytest.mark.parametrize("n", [1, 2049, 8193, 300_000, 1_048_577])
def test_norms_are_summed_in_the_order_of_the_rule(n):
    # Squares of 26 bits are exact in float64, and nearly every sum of them is rounded, so that the order shows. The
    # update is half of the first moment: no gradient, no second moment, a denominator of 1.
    generator = torch.Generator().manual_seed(n)
    p, m = (torch.randint(1, 2**26, (n,), generator=generator).double() for _ in range(2))
    zeros = torch.zeros_like(p)
    hyper = {"lr": 0.5, "beta1": 0.5, "eps": 1.0, "weight_decay": 0.0, "bias_correction": False}
    moved = p.clone()
    lamb_([moved], [zeros], [m.clone()], [zeros.clone()], [torch.zeros(())], **{**HYPER, **hyper})
    trust_ratio = _sum_by_the_rule(p * p) ** 0.5 / _sum_by_the_rule(m * m / 4) ** 0.5
    for i in {0, n // 2, n - 1}:
        exact = Fraction(p[i].item()) - Fraction(trust_ratio / 2) * Fraction(m[i].item() / 2)
        assert moved[i].item() == float(exact)


# --- trust ratios and special values --------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_trust_ratio_is_1_where_a_norm_is_zero(dtype):
    nothing, something = torch.zeros(50, dtype=dtype), torch.full((50,), 2.0, dtype=dtype)
    hyper = {**HYPER, "beta1": 0.0, "beta2": 0.0, "eps": 1.0, "lr": 0.25, "weight_decay": 0.0}
    for param, gradient in ((nothing, something), (something, nothing)):
        lists = [[param.clone()], [gradient], [nothing.clone()], [nothing.clone()], [torch.zeros(())]]
        lamb_(*lists, **hyper)
        torch.testing.assert_close(lists[0][0], param - 0.25 * gradient / (gradient + 1), rtol=1e-6, atol=0)


def test_a_clipped_trust_ratio_is_at_most_1():
    large = LambCase.random([3000])
    large.params[0].mul_(1000)
    plain = large.to("cpu")
    lamb_(*large.lists(), **{**HYPER, "trust_clip": True})
    lamb_(*plain.lists(), **{**HYPER, "adapt": False})
    assert_same_bits_in_lists(large.lists(), plain.lists())


def test_maximize_is_a_negative_gradient_scale():
    up, down = LambCase.random([100]), LambCase.random([100])
    lamb_(*up.lists(), **{**HYPER, "gradient_scale": 0.5}, maximize=True)
    lamb_(*down.lists(), **{**HYPER, "gradient_scale": -0.5})
    assert_same_bits_in_lists(up.lists(), down.lists())


def test_gradients_are_scaled_and_not_overwritten():
    scaled, plain = LambCase.random([100, 3000]), LambCase.random([100, 3000])
    before = [g.clone() for g in scaled.grads]
    lamb_(*scaled.lists(), **{**HYPER, "gradient_scale": 0.125})
    assert_same_bits_in_lists([scaled.grads], [before])
    for gradient in plain.grads:
        gradient.mul_(0.125)
    lamb_(*plain.lists(), **HYPER)
    assert_same_bits_in_lists([scaled.params, *scaled.lists()[2:]], [plain.params, *plain.lists()[2:]])


def test_a_nan_stays_in_its_element_and_its_tensor_is_not_adapted():
    case, plain = LambCase.random([64, 64]), LambCase.random([64, 64])
    case.grads[0][3] = torch.nan
    lamb_(*case.lists(), **HYPER)
    lamb_(*([ts[0]] for ts in plain.lists()), **{**HYPER, "adapt": False})
    lamb_(*([ts[1]] for ts in plain.lists()), **HYPER)
    assert case.params[0].isnan().nonzero().flatten().tolist() == [3]
    others = torch.arange(64) != 3
    assert same_bits(case.params[0][others], plain.params[0][others])
    assert same_bits(case.params[1], plain.params[1])


# --- layouts --------------------


def test_dense_layouts_are_stepped_in_place():
    plain = LambCase.random([360])
    strided = [
        [t.reshape(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)]
        for (t,) in plain.to("cpu").lists()[:4]
    ]
    pointers = [t.data_ptr() for (t,) in strided]
    steps = [step.clone() for step in plain.steps]
    lamb_(*strided, steps, **HYPER)  # a warning would be an error: no reference path here
    lamb_(*plain.lists(), **HYPER)
    assert [t.data_ptr() for (t,) in strided] == pointers
    for k in range(4):  # elements lie elsewhere, so sums round otherwise
        torch.testing.assert_close(strided[k][0].reshape(360), plain.lists()[k][0], rtol=1e-6, atol=1e-7)


def test_slices_leave_their_neighbours_alone_and_warn_once():
    parents = [torch.randn(40, 7) for _ in range(4)]
    parents[3].abs_()
    before = [t.clone() for t in parents]
    lists = [*([t[:, :3]] for t in parents), [torch.zeros(())]]
    with one_warning("lamb_: some parameters (the first is torch.float32 with strides (7, 1))"):
        for _ in range(2):
            assert_step_agrees_with_float64(lists)
    for parent, old in zip(parents, before, strict=True):
        assert torch.equal(parent[:, 3:], old[:, 3:])
    assert not torch.equal(parents[0][:, :3], before[0][:, :3])


def test_norms_of_complex_parameters_are_over_real_and_imaginary_parts():
    real = LambCase.random([30])
    complexes = [[torch.view_as_complex(t.clone().view(15, 2))] for (t,) in real.lists()[:4]]
    with one_warning("torch.complex64"):
        lamb_(*complexes, [real.steps[0].clone()], **HYPER)
    lamb_(*real.lists(), **HYPER, backend="reference")
    for k in range(4):
        assert same_bits(torch.view_as_real(complexes[k][0]).reshape(30), real.lists()[k][0])


@pytest.mark.parametrize(
    ("param", "state", "hyper"),
    [(*ADAMW_DTYPES[i % len(ADAMW_DTYPES)], hyper) for i, hyper in enumerate(OPTIONS)],
)
def test_the_reference_agrees_with_the_formula_too(param, state, hyper):
    case = LambCase.random([0, 1, 500], param, state)
    assert_step_agrees_with_float64(case.lists(), backend="reference", **hyper)


# --- cost --------------------


@pytest.mark.parametrize(
    ("param", "state", "bytes_per_element"),
    [
        (torch.float32, None, 28),
        (torch.bfloat16, torch.float32, 22),
        (torch.bfloat16, None, 14),
        (torch.float64, None, 56),
    ],
)
def test_cost_counts_every_byte_once(param, state, bytes_per_element):
    assert cost(1000, param, state).bytes == 1000 * bytes_per_element
    assert cost(0).bytes == cost(0).flops == 0
