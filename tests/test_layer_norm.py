"""layer_norm and rms_norm on the CPU: against float64, what is kept and computed, special values, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from layer_norm_cases import assert_agrees, in_float64, inputs
from support import ISAS, one_warning, same_bits, threads
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from superfine_kernels import Cost, layer_norm, rms_norm
from superfine_kernels.layer_norm import cost

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan", "one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = ["layer_norm", "rms_norm"]


# --- against float64 --------------------


# Few elements, a tail, a whole block of lanes, one and a tail, BERT's rows, and one longer than the L1 cache's share.
@pytest.mark.parametrize("shape", [(8, 6), (2, 3, 17), (5, 64), (40, 65), (7, 768), (2, 5001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_float64(op, dtype, shape):
    for residual, parameters in itertools.product((False, True), ("weight bias", "weight", "")):
        assert_agrees(op, inputs(op, shape, dtype, residual, parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_weights_beside_16_bits(op, dtype):
    case = inputs(op, (33, 100), dtype, True, "weight bias", weight_dtype=torch.float32)
    assert_agrees(op, case)
    assert case.run()[0].dtype == dtype


def test_16_bit_weights_beside_float32_are_converted():
    case = inputs("layer_norm", (4, 70), torch.float32, False, "weight bias", weight_dtype=torch.bfloat16)
    assert_agrees("layer_norm", case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemmas_weights_are_one_more(dtype):
    assert_agrees("rms_norm", inputs("rms_norm", (9, 130), dtype, False, "weight"), weight_offset=1.0)


def test_a_large_mean_does_not_cancel():
    # Off by half a unit of float32's 1e4, 5e-4, the mean alone would leave three digits; float32 input has seven.
    for size in (100, 768):
        case = inputs("layer_norm", (8, size), torch.float32, False, "weight bias", offset=1e4)
        assert_agrees("layer_norm", case, tolerance=2e-6)


def test_a_first_block_far_from_the_mean_does_not_cancel():
    # The sums are taken less the mean of 64 elements; a second pass takes the row's where that is far away.
    for first, count, offset in ((1e4, 1, 0.0), (0.0, 64, 1e4), (-1e6, 64, 0.0)):
        case = inputs("layer_norm", (8, 768), torch.float32, False, "weight bias", offset=offset)
        case.tensors[0].data[:, :count] = first
        assert_agrees("layer_norm", case, tolerance=3e-6)


def test_equal_elements_at_the_end_of_the_range_do_not_overflow():
    for size in (3, 64, 100):
        assert (layer_norm(torch.full((2, size), 3e38)) == 0).all()


@pytest.mark.parametrize("size", [8, 64, 768])
@pytest.mark.parametrize("op", OPS)
def test_float32_is_as_near_to_the_truth_as_eager_torch(op, size):
    eager = F.layer_norm if op == "layer_norm" else F.rms_norm

    def results(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    x, weight, grad = torch.randn(300, size), 1 + torch.randn(size) / 4, torch.randn(300, size)
    kernel = layer_norm if op == "layer_norm" else rms_norm
    mine = results(lambda x, w: kernel(x, w, eps=1e-5), torch.float32)
    theirs, exact = (
        results(lambda x, w: eager(x, (size,), w, eps=1e-5), d) for d in (torch.float32, torch.float64)
    )
    for one, other, truth in zip(mine, theirs, exact, strict=True):
        assert (one.double() - truth).norm() <= 1.1 * (other.double() - truth).norm()


def test_strides_and_expanded_gradients():
    wide = torch.randn(6, 10, 200)
    for x in (wide[..., ::2], wide.transpose(0, 1)[2:5], wide[0, :1].expand(5, 200)):
        for op in (layer_norm, rms_norm):
            leaf = x.detach().clone().requires_grad_()
            dense = x.contiguous().requires_grad_()
            y = op(leaf)
            assert same_bits(y, op(dense))
            upstream = torch.tensor(0.5).expand(y.shape)
            (gradient,) = torch.autograd.grad(y, leaf, upstream)
            assert same_bits(gradient, torch.autograd.grad(op(dense), dense, upstream.contiguous())[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("op", [layer_norm, rms_norm])
def test_nothing_to_normalise(op, shape):
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    y, sums = op(x, weight, residual=torch.empty(shape))
    assert y.shape == sums.shape == shape
    (y.sum() + sums.sum()).backward()
    assert x.grad.shape == shape
    assert same_bits(weight.grad, torch.zeros(shape[-1]))


# --- as Hugging Face's modules --------------------


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_llama_gives_its_bits(weight_dtype):
    # But where the mean of the squares, added up in another order, rounds n to its neighbour.
    x = torch.randn(50, 768).bfloat16()
    weight = (1 + torch.randn(768) / 10).to(weight_dtype)
    y = rms_norm(x, weight, 1e-6, cast_before_weight=True)
    expected = llama(x, weight, 1e-6)
    assert y.dtype == expected.dtype == weight_dtype
    different = (y != expected).float().mean().item()
    assert different < 1e-3
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
    rounded_once = rms_norm(x, weight, 1e-6)
    assert (rounded_once.float() != expected.float()).float().mean().item() > 0.05


def test_the_order_does_not_matter_in_float32():
    x, weight = torch.randn(7, 96), torch.randn(96)
    y = rms_norm(x, weight, cast_before_weight=True)
    assert same_bits(y, rms_norm(x, weight))
    torch.testing.assert_close(y, llama(x, weight, 1e-6), rtol=5e-7, atol=1e-7)


# --- what is computed, and kept --------------------


def kept_by(call) -> list[Tensor]:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_frozen_parts_cost_nothing(op, residual):
    rows, size = 6, 40
    numbers = 4 * rows * (2 if op == "layer_norm" else 1)
    x_bytes, w_bytes = 2 * rows * size, 2 * size
    for trained, expected in (
        ((), 0),
        (("bias",), 0),
        (("weight",), x_bytes + numbers),
        (("input",), x_bytes + numbers + w_bytes),
        (("input", "weight", "bias"), x_bytes + numbers + w_bytes),
    ):
        case = inputs(op, (rows, size), torch.bfloat16, residual, "weight bias", trained=trained)
        if op == "rms_norm" and trained == ("bias",):
            continue
        assert sum(t.nbytes for t in kept_by(case.run)) == expected, trained
        results = case.run()
        trains = bool(
            set(trained) & ({"input", "weight"} if op == "rms_norm" else {"input", "weight", "bias"})
        )
        assert results[0].requires_grad == trains
        if residual:
            assert results[1].requires_grad == ("input" in trained)
        if trains:
            assert_agrees(op, case)


def test_what_is_kept_is_the_input_itself():
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    weight = torch.ones(64, dtype=torch.bfloat16)
    addresses = {t.data_ptr() for t in kept_by(lambda: layer_norm(x, weight))}
    assert {x.data_ptr(), weight.data_ptr()} <= addresses
    (sums,) = (kept_by(lambda: rms_norm(x, residual=x.detach()))[0],)
    assert same_bits(sums.detach(), (x + x).detach())


def test_a_kept_input_that_was_changed_is_noticed():
    x = torch.randn(4, 9, requires_grad=True) * 1
    y = layer_norm(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_the_output_or_only_the_sum_is_used():
    x, r = (torch.randn(5, 30, requires_grad=True) for _ in range(2))
    for pick in (0, 1):
        chosen = layer_norm(x, residual=r)[pick]
        gradients = torch.autograd.grad((chosen * torch.arange(30)).sum(), (x, r))
        assert same_bits(*gradients)
        total = (x + r).detach().requires_grad_()
        by_torch = torch.nn.functional.layer_norm(total, (30,)) if pick == 0 else total * 1
        (expected,) = torch.autograd.grad((by_torch * torch.arange(30)).sum(), total)
        torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-4)


# --- the same bits --------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_instruction_sets_and_threads_give_the_same_bits(op, dtype):
    # 300 rows are ten blocks of sums, and 72 elements a block of lanes and a tail.
    case = inputs(op, (300, 72), dtype, True, "weight bias")
    expected = case.results(backend=f"cpu:{ISAS[0]}")
    for isa, count in itertools.product(ISAS, (1, 3)):
        with threads(count):
            actual = case.results(backend=f"cpu:{isa}")
        for a, b in zip(actual, expected, strict=True):
            assert same_bits(a, b), (isa, count)


# --- special values --------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity_spoil_their_row_alone(op, dtype):
    x = torch.randn(6, 70).to(dtype)
    x[1, 3], x[3, 69], x[4, 0] = math.nan, math.inf, -math.inf
    leaf = x.requires_grad_()
    y = layer_norm(leaf) if op == "layer_norm" else rms_norm(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    expected = in_float64(op, x.detach(), None, None, 1e-5 if op == "layer_norm" else 1e-6)
    for found in (y.detach(), gradient):
        spoiled = found.isnan().any(-1)
        assert spoiled.tolist() == [False, True, False, True, True, False]
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_element(dtype):
    x = torch.tensor([[2.0], [-3.0], [0.0]], dtype=dtype, requires_grad=True)
    weight, bias = torch.tensor([3.0], dtype=dtype), torch.tensor([0.5], dtype=dtype)
    y = layer_norm(x, weight, bias)
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert not torch.autograd.grad(y.sum(), x)[0].any()
    torch.testing.assert_close(rms_norm(x, weight), torch.tensor([[3.0], [-3.0], [0.0]], dtype=dtype))


def test_rows_without_deviation_are_zero_before_the_bias():
    x = torch.full((3, 100), 7.3, requires_grad=True)
    y = layer_norm(x, bias=torch.full((100,), 0.25))
    assert torch.equal(y, torch.full_like(y, 0.25))
    assert torch.equal(rms_norm(torch.zeros(2, 5)), torch.zeros(2, 5))


# --- derivatives, tracing --------------------


def test_gradcheck():
    x, r = (torch.randn(3, 13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a[:3], residual=a[3]), (x, w, b, r))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, weight_offset=1.0), (x, w))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_come_from_torch_with_one_warning(op):
    case = inputs(op, (4, 9), torch.float64, True, "weight bias")
    found = []
    with one_warning("a second derivative is asked for"):
        for backend in (None, "reference"):
            leaves = case.leaves()
            y, sums = case.run(backend=backend)
            first = torch.autograd.grad((y**3).sum() + (sums**2).sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
            found.append([*first, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*a second derivative")
def test_second_derivatives_where_the_input_is_made_from_the_weight():
    z, w = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), 5))
    assert torch.autograd.gradgradcheck(lambda z, w: layer_norm(z * w, w), (z, w))
    assert torch.autograd.gradgradcheck(lambda z, w: rms_norm(z * w, w, residual=z)[0], (z, w))


@pytest.mark.parametrize("op", OPS)
def test_many_gradients_at_once(op):
    case = inputs(op, (4, 9), torch.float32, True, "weight bias")
    many = torch.randn(3, 4, 9)
    leaves = case.leaves()
    with one_warning("many gradients are asked for at once"):
        y, _ = case.run()
        found = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(many):
        for ours, alone in zip(found, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], alone)


def test_backward_twice_through_a_kept_graph():
    x = torch.randn(5, 33, requires_grad=True)
    y = layer_norm(x, torch.ones(33, requires_grad=True))
    upstream = torch.randn(5, 33)
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    assert same_bits(torch.autograd.grad(y, x, upstream)[0], first)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    case = inputs(op, (4, 19), torch.float32, True, "weight bias")
    x, w, b, r = case.tensors
    arguments = (x, w, None if op == "rms_norm" else b, r, op == "rms_norm", 1e-5, 0.0, False, "")
    torch.library.opcheck(torch.ops.superfine.layer_norm.default, arguments)
    torch.library.opcheck(
        torch.ops.superfine.layer_norm.default, (x.detach(), None, None, None, *arguments[4:])
    )


def test_compiles_in_one_graph():
    case = inputs("layer_norm", (6, 50), torch.float32, True, "weight bias", trained=("input", "weight"))
    x, w, b, r = case.tensors

    def block(x, r):
        y, sums = layer_norm(x, w, b, residual=r)
        return rms_norm(y, w, cast_before_weight=True) + sums

    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = call(x, r)
        found.append((y.detach(), *torch.autograd.grad(y, (x, w, r), torch.linspace(0, 1, 50).expand(6, 50))))
    for eager, compiled in zip(*found, strict=True):
        assert same_bits(eager, compiled)


def test_functional_transforms_go_to_torch_with_a_warning():
    x = torch.randn(3, 4, 10)
    with one_warning("torch.func"):
        y = torch.func.vmap(layer_norm)(x)
    torch.testing.assert_close(y, layer_norm(x))


# --- bad input --------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, r"input is 3 \(int\); expected a torch.Tensor"),
        ((torch.ones(3).long(),), {}, TypeError, r"input is int64 \(3,\) on cpu; expected float32, bfloat16"),
        ((torch.ones(()),), {}, ValueError, "input is .*; expected a tensor with a last dimension"),
        (
            (torch.ones(2, 3), torch.ones(2)),
            {},
            ValueError,
            r"weight is float32 \(2,\) on cpu; expected shape \(3,\)",
        ),
        ((torch.ones(2, 3), torch.ones(1, 3)), {}, ValueError, r"weight is .*; expected shape \(3,\)"),
        ((torch.ones(3), [1, 1, 1]), {}, TypeError, "weight is .*; expected a torch.Tensor"),
        ((torch.ones(3), torch.ones(3).double()), {}, TypeError, "weight is float64 .*; expected float32"),
        (
            (torch.ones(3).half(), torch.ones(3).bfloat16()),
            {},
            TypeError,
            "weight is .*; expected float16 or float32",
        ),
        (
            (torch.ones(3), torch.ones(3, device="meta")),
            {},
            ValueError,
            "weight is .* on meta; expected a tensor on cpu",
        ),
        ((torch.ones(3),), {"eps": -1e-5}, ValueError, r"eps is -1e-05 \(float\); expected 0 or above"),
        ((torch.ones(3),), {"eps": None}, TypeError, "eps is None .*; expected a number"),
        (
            (torch.ones(2, 3),),
            {"residual": torch.ones(3)},
            ValueError,
            r"residual is .*; expected float32 \(2, 3\) on cpu",
        ),
        ((torch.ones(3),), {"residual": torch.ones(3).half()}, ValueError, "residual is float16"),
        ((torch.ones(3),), {"residual": 1}, TypeError, "residual is 1"),
        (
            (torch.ones(3),),
            {"backend": "cuda"},
            ValueError,
            "backend is 'cuda'.*; expected cpu, triton or reference",
        ),
        (
            (torch.ones(3),),
            {"backend": "cpu:neon"},
            ValueError,
            "backend is 'cpu:neon'; expected one that is usable here",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors_name_the_argument(arguments, options, error, message):
    for name, op in (("layer_norm", layer_norm), ("rms_norm", rms_norm)):
        with pytest.raises(error, match=f"^{name}: {message}"):
            op(*arguments, **options)


# --- cost --------------------


def test_cost_counts_what_must_be_moved():
    assert cost(10, 8, op="rms_norm", backward=False) == Cost(bytes=80 * 8, flops=80 * 4)
    assert cost(10, 8, weight_grad=False) == Cost(bytes=80 * 20, flops=80 * 18)
    assert cost(10, 8, torch.bfloat16, residual=True).bytes == 80 * 2 * (4 + 4)
    assert cost(10, 8, input_grad=False).bytes == 80 * 4 * 4
