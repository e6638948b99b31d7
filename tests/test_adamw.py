"""adamw_ on the CPU: against the formula in float64, and bit for bit where equal bits are promised."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ADAMW_DTYPES, AdamWCase
from support import ISAS, assert_same_bits_in_lists, one_warning, pairwise, same_bits, threads
from torch import Tensor

import superfine_kernels
from superfine_kernels import adamw_
from superfine_kernels.adamw import cost

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}

# Nothing, one element, around one vector and four (16, 64 floats), around 512 and 4096, and around the 16384
# elements that a thread takes at a time.
SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 16383, 16384, 16385]


def assert_step_agrees_with_float64(
    lists: Sequence[list[Tensor]], backend: str | None = None, **hyper
) -> None:
    """Steps `lists` in place and compares every element with the formula in float64 on the same values."""
    hyper = {**HYPER, **hyper}
    before = [[t.detach().to(torch.float64, copy=True) for t in tensors] for tensors in lists]
    expected = [[t.clone() for t in tensors] for tensors in before]
    expected[5] = [step.clone() for step in lists[5]]
    adamw_(*expected, **hyper, backend="reference")
    adamw_(*lists, **hyper, backend=backend)
    assert_same_bits_in_lists([lists[5]], [expected[5]])
    for k, (ours, theirs) in enumerate(zip(lists[:5], expected[:5], strict=True)):
        for i, (actual, exact) in enumerate(zip(ours, theirs, strict=True)):
            # What cancels leaves the rounding errors of its terms: a few units of the largest of them.
            terms = exact.abs() + before[k][i].abs()
            first_moment_terms = before[1][i].abs() + before[2][i].abs()
            if k == 2:
                terms += first_moment_terms
            if k == 0:
                step = float(expected[5][i])
                root = (expected[4] or expected[3])[i].sqrt() / (1 - hyper["beta2"] ** step) ** 0.5
                step_size = hyper["lr"] / (1 - hyper["beta1"] ** step)
                terms += step_size * first_moment_terms / (root + hyper["eps"])
            info = torch.finfo(actual.dtype)
            error = (actual.double() - exact).abs()
            assert (error <= 8 * info.eps * (terms + info.smallest_normal)).all(), f"list {k}, tensor {i}"


OPTIONS = [
    {},
    {"maximize": True},
    {"weight_decay": 0.0},
    {"lr": 0.0},
    {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3},
    {"lr": 0.3, "beta1": 0.5, "beta2": 0.95},
]


@pytest.mark.parametrize(
    ("dtypes", "amsgrad", "hyper"), pairwise(ADAMW_DTYPES, [False, True], OPTIONS), ids=str
)
def test_agrees_with_the_formula_in_float64(dtypes, amsgrad, hyper):
    case = AdamWCase.random(SIZES, *dtypes, amsgrad)
    for _ in range(3):
        assert_step_agrees_with_float64(case.lists(), **hyper)


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    dtypes=st.sampled_from(ADAMW_DTYPES),
    amsgrad=st.booleans(),
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.floats(1e-10, 1e-2),
    weight_decay=st.floats(0, 1),
    maximize=st.booleans(),
)
def test_any_hyperparameters(sizes, dtypes, amsgrad, lr, betas, eps, weight_decay, maximize):
    case = AdamWCase.random(sizes, *dtypes, amsgrad)
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    assert_step_agrees_with_float64(case.lists(), **hyper, maximize=maximize)


def test_mixed_dtypes_in_one_call():
    cases = [AdamWCase.random([17, 64], *dtypes) for dtypes in ADAMW_DTYPES]
    lists = [[t for case in cases for t in case.lists()[k]] for k in range(6)]
    assert_step_agrees_with_float64(lists)


# --- bits --------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_same_bits_on_every_instruction_set_thread_count_and_run(param, state, amsgrad):
    # Elements next to the special ones are in the same vectors; the tail of 16385 is a vector of its own.
    case = AdamWCase.random(SIZES, param, state, amsgrad)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, -1e-40, 3e38])
    for tensors in (case.params[-1], case.grads[-1]):
        tensors[100:108] = special
    results = []
    for isa in [*ISAS, ISAS[-1]]:
        for count in (1, 2, 3):
            copy = case.to("cpu")
            with threads(count):
                for _ in range(2):
                    adamw_(*copy.lists(), **HYPER, backend=f"cpu:{isa}")
            results.append(copy.lists())
    for other in results[1:]:
        assert_same_bits_in_lists(other, results[0])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_float32_has_the_bits_of_torch_fused(amsgrad, maximize, decoupled):
    # Multiples of 16: torch steps a shorter tail with other roundings.
    ours = AdamWCase.random([16, 64, 512, 4096, 8208], amsgrad=amsgrad)
    theirs = ours.to("cpu")
    for step in range(1, 6):
        adamw_(*ours.lists(), **{**HYPER, "maximize": maximize, "decoupled": decoupled})
        torch._foreach_add_(theirs.steps, 1)
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        fused(
            *theirs.lists(), lr=HYPER["lr"], beta1=HYPER["beta1"], beta2=HYPER["beta2"], eps=HYPER["eps"],
            weight_decay=HYPER["weight_decay"], amsgrad=amsgrad, maximize=maximize,
        )  # fmt: skip
        assert_same_bits_in_lists(ours.lists(), theirs.lists())
        assert ours.steps[0] == step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype):
    # Without gradient and moments a step is p * (1 - lr * weight_decay), rounded once; the products run
    # through normal, subnormal, halfway, overflowing and NaN results.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for weight_decay in (0.0, 0.25, 1 / 3, 0.5, 0.999, 1 - 2**-12, 3.0):
        keep = torch.tensor(1 - weight_decay, dtype=torch.float64).float()
        param, zero = numbers.clone(), torch.zeros_like(numbers)
        adamw_(
            [param], [zero], [zero.clone()], [zero.clone()], [], [torch.zeros(())],
            **{**HYPER, "lr": 1.0, "weight_decay": weight_decay, "eps": 1.0},
        )  # fmt: skip
        expected = (numbers.float() * keep).to(dtype)
        # + 0: the last addition of a step may drop the sign of a zero.
        assert same_bits(param + 0, expected + 0)


# Around the bits of a count, and as many steps as training takes; a GPU has the same power.
@pytest.mark.parametrize("step", [1, 2, 3, 4, 1023, 1024, 20_011])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_powers_of_beta1_are_correctly_rounded(beta, step):
    param, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    hyper = {"lr": 1.0, "beta1": beta, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    adamw_(
        [param], [one], [one.clone()], [one.clone()], [], [torch.tensor(step - 1.0)], **hyper, backend="cpu"
    )
    assert param.item() == -1.0 / (1.0 - float(Fraction(beta) ** step))  # both moments stay 1


# --- layouts and values --------------------


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of a (4, 6, 5, 3) tensor in another order of memory, dense."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "reversed":
        return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "expanded size 1":  # the stride of a dimension of size 1 means nothing
        return tensor.contiguous().as_strided((4, 6, 5, 3), (90, 15, 3, 1)).unsqueeze(1).expand(4, 1, 6, 5, 3)
    return tensor.contiguous()


@pytest.mark.parametrize("layout", ["channels_last", "reversed", "expanded size 1"])
def test_dense_layouts_are_stepped_in_place(layout):
    plain = AdamWCase.random([360], amsgrad=True)
    strided = [[_laid_out(t.reshape(4, 6, 5, 3), layout) for t in ts] for ts in plain.to("cpu").lists()[:5]]
    pointers = [t.data_ptr() for ts in strided for t in ts]
    steps = [step.clone() for step in plain.steps]
    adamw_(*plain.lists(), **HYPER)
    adamw_(*strided, steps, **HYPER)  # a warning would be an error: no reference path here
    assert [t.data_ptr() for ts in strided for t in ts] == pointers
    for k in range(5):
        assert same_bits(strided[k][0].reshape(360), plain.lists()[k][0])


@pytest.mark.parametrize("sliced", ["params", "all"])
def test_slices_leave_their_neighbours_alone_and_warn_once(sliced):
    parents = [torch.randn(40, 7) for _ in range(4)]
    before = [t.clone() for t in parents]
    views = [t[:, :3] if sliced == "all" or k == 0 else t[:, :3].clone() for k, t in enumerate(parents)]
    views[3].abs_()
    before[3][:, :3].abs_()
    lists = [*([v] for v in views), [], [torch.zeros(())]]
    with one_warning("layout that no kernel takes; eager torch steps them"):
        for _ in range(2):
            assert_step_agrees_with_float64(lists)
    for parent, old in zip(parents, before, strict=True):
        assert torch.equal(parent[:, 3:], old[:, 3:])
    assert not torch.equal(parents[0][:, :3], before[0][:, :3])


def test_a_gradient_in_another_order_than_its_parameter():
    lists = [
        [torch.randn(6, 5)],
        [torch.randn(5, 6).t()],
        [torch.randn(6, 5)],
        [torch.rand(6, 5)],
        [],
        [torch.zeros(())],
    ]
    with one_warning("layout that no kernel takes"):
        assert_step_agrees_with_float64(lists)


def test_kernel_and_reference_share_a_call():
    case = AdamWCase.random([20, 30, 40])
    case.params[1] = torch.randn(60)[::2]
    with one_warning("the first is torch.float32 with strides (2,)"):
        assert_step_agrees_with_float64(case.lists())


def test_complex_parameters_are_pairs_of_real_ones():
    real = AdamWCase.random([30])
    complexes = [[torch.view_as_complex(t.clone().view(15, 2)) for t in ts] for ts in real.lists()[:4]]
    with one_warning("torch.complex64"):
        adamw_(*complexes, [], [real.steps[0].clone()], **HYPER)
    adamw_(*real.lists(), **HYPER, backend="reference")
    for k in range(4):
        assert same_bits(torch.view_as_real(complexes[k][0]).reshape(30), real.lists()[k][0])


def test_zero_dimensional_parameters():
    lists = [
        [torch.tensor(2.0)],
        [torch.tensor(-3.0)],
        [torch.tensor(0.5)],
        [torch.tensor(0.25)],
        [],
        [torch.zeros(())],
    ]
    assert_step_agrees_with_float64(lists)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_nan_and_infinite_gradients_do_what_torch_does(amsgrad):
    ours = AdamWCase.random([64], amsgrad=amsgrad)
    ours.grads[0][3], ours.grads[0][20], ours.grads[0][40] = torch.nan, torch.inf, -torch.inf
    theirs = ours.to("cpu")
    for _ in range(2):
        adamw_(*ours.lists(), **HYPER)
        torch._foreach_add_(theirs.steps, 1)
        torch._fused_adamw_(
            *theirs.lists(), lr=HYPER["lr"], beta1=HYPER["beta1"], beta2=HYPER["beta2"], eps=HYPER["eps"],
            weight_decay=HYPER["weight_decay"], amsgrad=amsgrad, maximize=False,
        )  # fmt: skip
    assert_same_bits_in_lists(ours.lists(), theirs.lists())
    assert ours.params[0].isnan().nonzero().flatten().tolist() == [3, 20, 40]


def test_denormal_moments_keep_their_digits():
    lists = [[torch.ones(40)], [torch.full((40,), 1e-22)], [torch.full((40,), 1e-40)], [torch.full((40,), 1e-42)], [],
             [torch.zeros(())]]  # fmt: skip
    assert_step_agrees_with_float64(lists, eps=1e-30)
    assert (lists[3][0] > 0).all()


def test_inference_tensors_are_stepped():
    with torch.inference_mode():
        case = AdamWCase.random([17])
        assert_step_agrees_with_float64(case.lists())


# --- cost --------------------


@pytest.mark.parametrize(
    ("param", "state", "amsgrad", "bytes_per_element"),
    [
        (torch.float32, None, False, 28),
        (torch.float32, None, True, 36),
        (torch.bfloat16, torch.float32, False, 22),
        (torch.bfloat16, None, False, 14),
        (torch.float16, torch.float16, False, 14),
        (torch.float64, None, False, 56),
    ],
)
def test_cost_counts_every_byte_once(param, state, amsgrad, bytes_per_element):
    assert cost(1000, param, state, amsgrad).bytes == 1000 * bytes_per_element
    assert cost(1000, param, state, amsgrad).flops == 1000 * (16 if amsgrad else 15)
    assert cost(0).bytes == 0


def test_the_best_backend_is_the_default():
    assert superfine_kernels.isa() == ISAS[-1]
    assert f"cpu     cpu         yes ({ISAS[-1]})" in superfine_kernels.backends()
