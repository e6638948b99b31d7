"""gelu, silu, swiglu and geglu on the CPU: values and gradients against float64, special values, bits, tracing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from activation_cases import ALONE, DTYPES, EPSILON, GATED, assert_close, exact, run
from support import ISAS, one_warning, same_bits, threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import superfine_kernels
from superfine_kernels import geglu, gelu, silu, swiglu
from superfine_kernels._library import HUGE_PAGE_BYTES
from superfine_kernels.activation import CODES, SHORTEST_ROW, Layout, cost, reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

# One element, around a vector of 16, groups of 64, a strip of 512, and what a thread takes: 8192.
SIZES = [1, 15, 17, 63, 64, 65, 511, 512, 513, 700, 8191, 8193, 20000]


# --- values --------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CODES)
def test_agrees_with_the_formula_in_float64(function, dtype):
    for size in SIZES:
        x, u, g = (torch.randn(size).mul(3).to(dtype) for _ in range(3))
        value, slope = exact(function, x)
        wide_u, wide_g = u.double(), g.double()
        out, dx = run(ALONE[function], (x,), g)
        assert (out.dtype, dx.dtype, out.shape) == (dtype, dtype, x.shape)
        assert_close(out, value, x.double(), 5)
        assert_close(dx, wide_g * slope, wide_g, 8)
        out, dx, du = run(GATED[function], (x, u), g)
        assert_close(out, value * wide_u, x.double() * wide_u, 6)
        assert_close(dx, wide_g * wide_u * slope, wide_g * wide_u, 9)
        assert_close(du, wide_g * value, wide_g * x.double(), 6)


@pytest.mark.parametrize("function", CODES)
def test_float32_is_within_a_few_units_over_its_whole_range(function):
    # Every 16001st float, of both signs: denormals, the tails and 1e38 among them.
    x = torch.arange(0, 0x7F800000, 16001, dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, -x])
    out, slope = run(ALONE[function], (x,), torch.ones_like(x))
    value, expected_slope = exact(function, x)
    value = torch.where(x < -1e3, -0.0, torch.where(x > 1e3, x.double(), value))  # x^3 overflows
    expected_slope = torch.where(x.abs() > 1e3, (x > 0).double(), expected_slope)
    small = 2.0**-149
    assert ((out.double() - value).abs() <= 4 * 2.0**-24 * x.double().abs() + small).all()
    assert ((slope.double() - expected_slope).abs() <= 5 * 2.0**-24).all()
    assert (out[x < -90] == 0).all()
    assert out[x < -90].signbit().all()
    assert torch.equal(out[(x > 20)], x[x > 20])
    unit = torch.exp2(value.abs().log2().floor().clamp(min=-126) - 23)
    units = ((out.double() - value).abs() / unit)[(x > 0) & (x < 1e3)]
    assert units.max() <= 4
    if function == "silu":  # keeps its digits where it is small, while exp(x) is a normal number
        assert ((out.double() - value).abs() / unit)[(x > -87)].max() <= 4


@pytest.mark.parametrize("function", CODES)
def test_float64_keeps_its_digits_in_the_tails(function):
    x = torch.linspace(-25 if function == "gelu" else -9, 9, 3001, dtype=torch.float64)
    (out,) = run(ALONE[function], (x,), torch.ones_like(x))[:1]
    torch.testing.assert_close(out, exact(function, x)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CODES)
def test_special_values_have_their_limits_and_spoil_no_neighbour(function, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0] * 3).to(dtype)
    out, dx = run(ALONE[function], (x,), torch.ones_like(x))
    one, slope = (t.item() for t in exact(function, torch.tensor(1.0)))
    expected = torch.tensor([math.inf, -0.0, math.nan, 0.0, -0.0, one] * 3).to(dtype)
    expected_dx = torch.tensor([1.0, 0.0, math.nan, 0.5, 0.5, slope] * 3).to(dtype)
    close = {"rtol": 2 * EPSILON[dtype] + 1e-6, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(dx, expected_dx, **close)
    zeros = (x == 0) | (x == -math.inf)
    assert torch.equal(out[zeros].signbit(), expected[zeros].signbit())


def test_low_precision_is_rounded_once():
    g, u = (torch.randn(4096).mul(2).bfloat16() for _ in range(2))
    exactly = exact("silu", g)[0] * u.double()
    ours, eager = ((out.double() - exactly).abs() for out in (swiglu(g, u), F.silu(g) * u))
    assert ours.sum() < 0.8 * eager.sum()
    assert same_bits(swiglu(g, u), swiglu(g.float(), u.float()).bfloat16())


def test_approximations_are_those_of_torch():
    x = torch.randn(1000)
    for approximate in ("none", "tanh"):
        torch.testing.assert_close(gelu(x, approximate), F.gelu(x, approximate=approximate))
    torch.testing.assert_close(geglu(x, x.flip(0), "tanh"), F.gelu(x, approximate="tanh") * x.flip(0))
    torch.testing.assert_close(silu(x), F.silu(x))


# --- layouts --------------------


def test_halves_of_a_projection_are_read_where_they_lie():
    whole = torch.randn(3, 5, 2 * SHORTEST_ROW)
    gate, up = whole.chunk(2, -1)
    layout = Layout.of(gate, up, None)
    assert layout.tensors[0] is gate
    assert layout.tensors[1] is up
    assert (layout.rows, layout.columns, layout.strides[:2]) == (15, SHORTEST_ROW, [2 * SHORTEST_ROW] * 2)
    mixed = Layout.of(gate, up.contiguous(), gate.transpose(0, 1).contiguous().transpose(0, 1))
    assert mixed.tensors[2].is_contiguous()  # its rows are not evenly apart
    assert mixed.strides == [2 * SHORTEST_ROW, SHORTEST_ROW, SHORTEST_ROW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strides_do_not_matter(dtype):
    # 704: a strip and a part of whole groups; 200: a part that is not; 3: rows too short for strips.
    for columns in (704, 200, 3):
        wide = torch.randn(4, 6, 2 * columns).to(dtype)
        halves = wide[..., :columns], wide[..., columns:]
        layouts = [
            halves,
            tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in halves),
            tuple(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in halves),
            (halves[0], halves[1].contiguous()),
            (wide[:, :1, :columns].expand(4, 6, columns), wide[..., ::2]),
        ]
        for gate, up in layouts:
            grad = torch.randn(6, 4, columns).to(dtype).transpose(0, 1)
            expected = run(swiglu, (gate.contiguous(), up.contiguous()), grad.contiguous())
            leaves = [x.detach().requires_grad_() for x in (gate, up)]
            out = swiglu(*leaves)
            actual = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
            assert out.is_contiguous()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5)])
def test_scalars_and_nothing(shape):
    x = torch.randn(shape)
    out, dgate, dup = run(swiglu, (x, x), torch.ones(shape))
    assert out.shape == dgate.shape == dup.shape == shape
    torch.testing.assert_close(out, F.silu(x) * x)
    assert gelu(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_too_large_for_the_caches_are_the_same(dtype):
    # Above 4 MiB on huge pages; 5 more elements begin and end off 16 bytes.
    size = HUGE_PAGE_BYTES // dtype.itemsize + 5
    x, u, g = (torch.randn(size).to(dtype) for _ in range(3))
    half = size // 2 + 3
    whole = run(swiglu, (x, u), g)
    for part in (slice(0, half), slice(half, size)):
        small = run(swiglu, (x[part], u[part]), g[part])
        assert all(same_bits(a[part], b) for a, b in zip(whole, small, strict=True))


# --- bits --------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CODES)
def test_same_bits_on_every_instruction_set_and_thread_count(function, dtype):
    wide = torch.randn(30, 2002).mul(3).to(dtype)
    wide[3, 17] = math.nan
    gate, up = wide[:, :1001], wide[:, 1001:]
    grad = torch.randn(30, 1001).to(dtype)
    results = []
    for backend in [*(f"cpu:{isa}" for isa in ISAS), "cpu"]:
        for count in (1, 2):
            with threads(count):
                leaves = [x.detach().requires_grad_() for x in (gate, up)]
                out = GATED[function](*leaves, backend=backend)
                results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


# --- what is saved --------------------


def test_saved_is_what_the_gradients_need_and_no_more():
    def saved(call, *needs: bool) -> list[int]:
        packed: list[Tensor] = []
        inputs = [torch.randn(4, 150).bfloat16().requires_grad_(n) for n in needs]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            out = call(*inputs)
        assert out.requires_grad == any(needs)
        if out.requires_grad:
            out.sum().backward()
        assert [x.grad is not None for x in inputs] == list(needs)
        return [next(i for i, x in enumerate(inputs) if x.data_ptr() == t.data_ptr()) for t in packed]

    assert saved(gelu, True) == [0]
    assert saved(gelu, False) == []
    for call in (swiglu, geglu):
        assert saved(call, True, True) == [0, 1]
        assert saved(call, True, False) == [0, 1]
        assert saved(call, False, True) == [0]
        assert saved(call, False, False) == []
    with torch.no_grad():
        assert not swiglu(*(torch.randn(3, requires_grad=True) for _ in range(2))).requires_grad


# --- derivatives --------------------


@pytest.mark.parametrize("function", CODES)
def test_first_and_second_derivatives(function):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, inputs in (
            (ALONE[function], (gate,)),
            (GATED[function], (gate, up)),
            (lambda u: GATED[function](gate.detach(), u), (up,)),
            (lambda g: GATED[function](g, up.detach()), (gate,)),
            (lambda x: GATED[function](x, x), (gate,)),
        ):
            assert torch.autograd.gradcheck(call, inputs)
            assert torch.autograd.gradgradcheck(call, inputs)


def test_a_second_derivative_comes_from_torch_with_one_warning():
    x = torch.randn(7, requires_grad=True)
    with one_warning("silu: a second derivative is asked for"):
        (first,) = torch.autograd.grad(silu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(F.silu(x).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0])


def test_backward_twice_through_a_kept_graph_and_in_functional_transforms():
    x = torch.randn(70, requires_grad=True)
    value = gelu(x).sum()
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    assert same_bits(torch.autograd.grad(value, x)[0], first)
    with one_warning("torch.func and forward-mode AD have no kernel"):
        by_transform = torch.func.grad(lambda x: gelu(x).sum())(x.detach())
    torch.testing.assert_close(by_transform, first)


# --- tracing --------------------


def test_many_gradients_at_once():
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    many = torch.randn(4, 3, 8)
    with one_warning("many gradients are asked for at once"):
        found = torch.autograd.grad(swiglu(gate, up), (gate, up), many, is_grads_batched=True)
    for i, grad in enumerate(many):
        for ours, alone in zip(found, torch.autograd.grad(swiglu(gate, up), (gate, up), grad), strict=True):
            torch.testing.assert_close(ours[i], alone)


def test_a_tensor_that_a_functional_transform_has_left_behind():
    x, left = torch.randn(2, 64), []
    torch.func.grad(lambda x: left.append(x * 2) or x.sum())(x)
    for op in (gelu, superfine_kernels.layer_norm):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                assert torch.equal(op(left[0]), op(x * 2))


@pytest.mark.filterwarnings("ignore")  # that tracing is deprecated
def test_a_trace_holds_the_op_also_without_gradients():
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: gelu(x), torch.randn(2, 64), check_trace=False)
        x = torch.randn(2, 64)
        assert torch.equal(traced(x), gelu(x))


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_ops_pass_opcheck(needs):
    gate, up, grad = (torch.randn(3, 17) for _ in range(3))
    backward = torch.ops.superfine.activation_backward.default
    torch.library.opcheck(backward, ("gelu", grad, gate, up, *needs, ""))
    inputs = [x.requires_grad_(n) for x, n in zip((gate, up), needs, strict=True)]
    torch.library.opcheck(torch.ops.superfine.activation.default, ("silu", *inputs, ""))


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
def test_compiles_into_one_graph():
    def model(hidden: Tensor, weight: Tensor, frozen: Tensor) -> Tensor:
        gate, up = (hidden @ weight.t()).chunk(2, -1)
        return gelu(swiglu(gate, up) + geglu(frozen, up), "tanh").sum()

    arguments = torch.randn(6, 8), torch.randn(66, 8), torch.randn(6, 33)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        weight = arguments[1].clone().requires_grad_()
        value = function(arguments[0], weight, arguments[2])
        results.append((value.detach(), torch.autograd.grad(value, weight)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_fake_and_meta_tensors_give_shapes_and_dtypes():
    with FakeTensorMode():
        for dtype in DTYPES:
            x = torch.empty(4, 9, dtype=dtype, requires_grad=True)
            out = swiglu(x, torch.empty(4, 9, dtype=dtype))
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert (out.shape, out.dtype, grad.shape, grad.dtype) == (x.shape, dtype, x.shape, dtype)
    with one_warning("gelu: there is no kernel for tensors on meta"):
        assert gelu(torch.zeros(3, device="meta")).device.type == "meta"


# --- the boundary --------------------

X = torch.zeros(2, 5)
BAD = {
    "input type": (lambda: gelu([1.0]), TypeError, "gelu: input is [1.0] (list); expected a torch.Tensor"),
    "input dtype": (
        lambda: silu(X.long()),
        TypeError,
        "silu: input is int64 (2, 5) on cpu; expected float32, bfloat16, float16 or float64",
    ),
    "approximate": (
        lambda: geglu(X, X, "erf"),
        ValueError,
        "geglu: approximate is 'erf' (str); expected 'none' or 'tanh'",
    ),
    "up type": (lambda: swiglu(X, 2.0), TypeError, "swiglu: up is 2.0 (float); expected a torch.Tensor"),
    "up dtype": (
        lambda: swiglu(X, X.half()),
        TypeError,
        "swiglu: up is float16 (2, 5) on cpu; expected float32, as gate",
    ),
    "up shape": (
        lambda: swiglu(X, X[:1]),
        ValueError,
        "swiglu: up is float32 (1, 5) on cpu; expected shape (2, 5) on cpu, as gate",
    ),
    "up device": (
        lambda: swiglu(X, X.to("meta")),
        ValueError,
        "swiglu: up is float32 (2, 5) on meta; expected shape (2, 5) on cpu, as gate",
    ),
    "backend": (
        lambda: gelu(X, backend="gpu"),
        ValueError,
        "gelu: backend is 'gpu'; expected one that is usable here",
    ),
    "isa": (lambda: gelu(X[:0], backend="cpu:mmx"), ValueError, "gelu: backend is 'cpu:mmx'"),
    "cuda": (
        lambda: gelu(X, backend="cuda"),
        ValueError,
        "gelu: backend is 'cuda' (str); expected cpu, triton or reference: there is no CUDA C++ kernel",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("function", CODES)
def test_the_reference_backend_agrees_with_the_kernel(function):
    for dtype in DTYPES:
        gate, up = (torch.randn(4, 90).to(dtype) for _ in range(2))
        close = {"rtol": 4 * EPSILON[dtype], "atol": 1e-6}
        kernel = GATED[function](gate, up)
        torch.testing.assert_close(GATED[function](gate, up, backend="reference"), kernel, **close)
        torch.testing.assert_close(reference(function, gate), ALONE[function](gate), **close)


def test_results_stay_on_their_device_whatever_the_default():
    x = torch.randn(4, 9, requires_grad=True)
    with torch.device("meta"):
        out = swiglu(x, x)
        (grad,) = torch.autograd.grad(out, x, torch.ones(4, 9, device="cpu"))
    assert out.device.type == grad.device.type == "cpu"


def test_cost_counts_every_tensor_once():
    assert cost(1000).bytes == 5 * 4000
    assert cost(1000, backward=False).bytes == 2 * 4000
    assert cost(1000, torch.bfloat16, "silu", gated=True).bytes == 8 * 2000
    assert cost(1000, torch.bfloat16, "silu", gated=True, backward=False).bytes == 3 * 2000
    assert cost(1000, function="silu", backward=False).flops < cost(1000, function="silu").flops


def test_the_functions_are_exported():
    for name in ("gelu", "silu", "swiglu", "geglu"):
        assert getattr(superfine_kernels, name).__name__ == name
        assert name in superfine_kernels.__all__
