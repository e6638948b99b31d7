"""Rows and columns of a weight that train alone: values and gradients against float64, costs, edges, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import superfine_kernels
from superfine_kernels import cols_linear, rows_embedding, rows_linear
from superfine_kernels.slices import COLS, ROWS, cost, make_slots, reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

IN, OUT = 12, 20
OPS = {"rows": (rows_linear, ROWS), "cols": (cols_linear, COLS)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def problem(which: str, dtype=torch.float32, shape=(3, 5), count=4):
    """Input, weight with NaN where the slice goes, bias, indices in no order, slice."""
    generator = torch.Generator().manual_seed(count)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    dim = OPS[which][1]
    x, weight, bias = randn(*shape, IN), randn(OUT, IN), randn(OUT)
    indices = torch.randperm(weight.shape[dim], generator=generator)[:count]
    values = randn(count, IN) if dim == ROWS else randn(OUT, count)
    weight.index_fill_(dim, indices, torch.nan)  # no value of it reaches a result
    return x.requires_grad_(), weight, bias.requires_grad_(), indices, values.requires_grad_()


def expected(which, x, weight, bias, indices, values):
    """Output and gradients in float64, by way of a weight of which everything trains."""
    x, bias, values = (t.detach().double().requires_grad_() for t in (x, bias, values))
    out = reference(x, weight.double(), bias, indices, values, OPS[which][1])
    return out, torch.autograd.grad(out, (x, bias, values), upstream(out))


def upstream(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)


def close(found, wanted, dtype):
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale)


# --- linear layers ----


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("which", OPS)
def test_values_and_gradients(which, dtype):
    x, weight, bias, indices, values = problem(which, dtype)
    out = OPS[which][0](x, weight, bias, indices, values)
    wanted, gradients = expected(which, x, weight, bias, indices, values)
    assert out.dtype == dtype
    close(out, wanted, dtype)
    for found, want in zip(
        torch.autograd.grad(out, (x, bias, values), upstream(out)), gradients, strict=True
    ):
        assert found.dtype == dtype
        close(found, want, dtype)


# No rows of input, one, a vector; no index, one, all.
@pytest.mark.parametrize(
    ("shape", "count"), [((0,), 4), ((1,), 1), ((), 3), ((2, 0, 3), 1), ((4,), 0), ((4,), IN)]
)
@pytest.mark.parametrize("which", OPS)
def test_edges(which, shape, count):
    x, weight, _, indices, values = problem(which, torch.float64, shape, count)
    bias = torch.zeros(OUT, dtype=torch.float64, requires_grad=True)
    out = OPS[which][0](x, weight, bias, indices, values)
    wanted, gradients = expected(which, x, weight, bias, indices, values)
    close(out, wanted, torch.float64)
    for found, want in zip(
        torch.autograd.grad(out, (x, bias, values), upstream(out)), gradients, strict=True
    ):
        close(found, want, torch.float64)


@pytest.mark.parametrize("which", OPS)
def test_any_strides(which):
    x, weight, bias, indices, values = problem(which, torch.float64)
    wide = torch.randn(5, 3, 2 * IN, dtype=torch.float64)
    strided = wide[..., ::2].transpose(0, 1).copy_(x.detach()).requires_grad_()
    transposed = weight.t().contiguous().t()
    around = wide.clone()
    out = OPS[which][0](strided, transposed, bias, indices, values)
    wanted, gradients = expected(which, x, weight, bias, indices, values)
    close(out, wanted, torch.float64)
    of_out = (
        upstream(out).t_() if out.dim() == 2 else upstream(out).transpose(0, 1).contiguous().transpose(0, 1)
    )
    found = torch.autograd.grad(out, (strided, bias, values), of_out)
    for mine, want in zip(found, gradients, strict=True):
        close(mine, want, torch.float64)
    assert torch.equal(wide[..., 1::2], around[..., 1::2])


@pytest.mark.parametrize("which", OPS)
def test_the_rest_of_the_weight_keeps_its_bits_and_its_version(which):
    op, dim = OPS[which]
    x, weight, bias, indices, values = problem(which)
    before, version = weight.clone(), weight._version
    op(x, weight, bias, indices, values).sum().backward()
    assert weight._version == version
    assert torch.equal(weight.index_select(dim, indices), values)
    rest = torch.ones(weight.shape[dim], dtype=torch.bool).index_fill_(0, indices, False).nonzero().squeeze(1)
    assert torch.equal(weight.index_select(dim, rest), before.index_select(dim, rest))


def test_special_values_go_where_they_belong():
    x, weight, bias, indices, values = problem("rows")
    with torch.no_grad():
        values[1, 2] = torch.inf
        x[0, 0, 2] = 0.0
    out = rows_linear(x, weight, bias, indices, values)
    assert out[0, 0, indices[1]].isnan()
    others = [i for i in range(OUT) if i != int(indices[1])]
    assert out[..., others].isfinite().all()


def saved(function) -> list[Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


def test_nothing_is_saved_or_computed_that_nobody_needs():
    x, weight, bias, indices, rows = problem("rows")
    _, weight2, _, indices2, cols = problem("cols")
    frozen = x.detach()

    def shapes(function):
        return sorted(tuple(t.shape) for t in saved(function) if t.dtype.is_floating_point)

    assert shapes(lambda: rows_linear(frozen, weight, None, indices, rows)) == [(3, 5, IN)]
    assert shapes(lambda: rows_linear(x, weight, None, indices, rows.detach())) == [(4, IN), (OUT, IN)]
    # Columns: not the input but the features that train.
    assert shapes(lambda: cols_linear(frozen, weight2, None, indices2, cols)) == [(3, 5, 4)]
    assert shapes(lambda: cols_linear(x, weight2, None, indices2, cols)) == [(3, 5, 4), (OUT, 4), (OUT, IN)]
    assert shapes(lambda: cols_linear(frozen, weight2, bias, indices2, cols.detach())) == []
    assert rows_linear(frozen, weight, None, indices, rows.detach()).grad_fn is None
    with torch.no_grad():
        assert rows_linear(x, weight, bias, indices, rows).grad_fn is None


@pytest.mark.parametrize("which", OPS)
def test_a_slice_that_moves_between_forward_and_backward_is_noticed(which):
    x, weight, bias, indices, values = problem(which)
    loss = OPS[which][0](x, weight, bias, indices, values).sum()
    with torch.no_grad():
        values += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("which", OPS)
def test_another_forward_between_forward_and_backward_changes_nothing(which):
    # Two slices that share one weight: each backward reads its own values.
    op, _ = OPS[which]
    x, weight, bias, indices, values = problem(which, torch.float64)
    other = (values.detach() * 3).requires_grad_()
    out = op(x, weight, bias, indices, values)
    op(x, weight, bias, indices, other)
    _, gradients = expected(which, x, weight, bias, indices, values)
    for found, want in zip(
        torch.autograd.grad(out, (x, bias, values), upstream(out)), gradients, strict=True
    ):
        close(found, want, torch.float64)


@pytest.mark.parametrize("which", OPS)
def test_values_written_past_the_version_counter_are_seen(which):
    op, dim = OPS[which]
    x, weight, bias, indices, values = problem(which, torch.float64)
    op(x, weight, bias, indices, values)
    values.data.mul_(2)
    with torch.no_grad():
        close(
            op(x, weight, bias, indices, values),
            reference(x, weight, bias, indices, values, dim),
            torch.float64,
        )


@pytest.mark.filterwarnings("ignore:.*a second derivative is asked for")
@pytest.mark.parametrize("which", OPS)
def test_gradcheck(which):
    x, weight, bias, indices, values = problem(which, torch.float64, (2,), 2)

    def op(x, bias, values):
        return OPS[which][0](x, weight, bias, indices, values)

    assert torch.autograd.gradcheck(op, (x, bias, values), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (x, bias, values), fast_mode=True)


@pytest.mark.parametrize("which", OPS)
def test_autocast(which):
    op, dim = OPS[which]
    x, weight, bias, indices, values = problem(which)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(x, weight, bias, indices, values)
        wanted = reference(x, weight, bias, indices, values.detach(), dim)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=5e-2)
    found = torch.autograd.grad(out, (x, bias, values), upstream(out))
    assert [g.dtype for g in found] == [torch.float32] * 3
    _, gradients = expected(which, x, weight, bias, indices, values)
    for mine, want in zip(found, gradients, strict=True):
        close(mine, want, torch.bfloat16)
    assert weight.dtype == torch.float32


@pytest.mark.filterwarnings("default")  # the compiler gives warnings of its own
@pytest.mark.parametrize("which", OPS)
def test_compiles_into_one_graph_and_sees_later_values(which):
    op, _ = OPS[which]
    x, weight, bias, indices, values = problem(which)

    def loss(x, bias, values):
        return op(2 * x, weight, bias, indices, values).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = torch.autograd.grad(compiled(x, bias, values), (x, bias, values))
        wanted = torch.autograd.grad(loss(x, bias, values), (x, bias, values))
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            values += 1


@pytest.mark.parametrize("which", OPS)
def test_opcheck(which):
    op, dim = OPS[which]
    x, weight, bias, indices, values = problem(which)
    op(x, weight, bias, indices, values)  # from here on the values that are written are there already
    selected = x.detach().index_select(-1, indices) if dim == COLS else None
    arguments = (x, weight, bias, indices, values, selected, dim)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.superfine.slice_linear.default, arguments, test_utils=utils)


@pytest.mark.filterwarnings("ignore:.*torch.func and forward-mode AD")
def test_functional_transforms_take_eager_torch():
    x, weight, bias, indices, values = problem("rows", torch.float64)
    found = torch.func.grad(lambda v: rows_linear(x, weight, bias, indices, v).square().sum())(values)
    wanted = torch.autograd.grad(rows_linear(x, weight, bias, indices, values).square().sum(), values)[0]
    torch.testing.assert_close(found, wanted)


# --- embeddings ----


def lookup(dtype=torch.float64, shape=(3, 7)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, OUT, shape, generator=generator)
    weight = torch.randn(OUT, 6, generator=generator).to(dtype)
    indices = torch.tensor([17, 2, 5, 11])
    rows = torch.randn(4, 6, generator=generator).to(dtype).requires_grad_()
    weight.index_fill_(0, indices, torch.nan)
    return ids, weight, indices, rows


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -3], ids=str)  # -3 is 17
def test_embedding_and_its_gradient(dtype, padding_idx):
    ids, weight, indices, rows = lookup(dtype)
    ids[0, :4] = torch.tensor([2, 17, 17, 17])
    before = weight.clone()
    out = rows_embedding(ids, weight, indices, rows, padding_idx)
    whole = weight.index_copy(0, indices, rows.detach()).double().requires_grad_()
    wanted = F.embedding(ids, whole, padding_idx)
    assert torch.equal(out.double(), wanted)
    (of_whole,) = torch.autograd.grad(wanted, whole, upstream(wanted).to(dtype).double())
    (found,) = torch.autograd.grad(out, rows, upstream(wanted).to(dtype))
    close(found, of_whole[indices], dtype)
    assert torch.equal(weight[indices].isnan(), before[indices].isnan())  # an embedding writes nothing


@pytest.mark.parametrize("shape", [(0,), (), (1, 1), (2, 0)])
def test_embedding_edges(shape):
    ids, weight, indices, rows = lookup(shape=shape)
    out = rows_embedding(ids.int(), weight, indices, rows)
    wanted = F.embedding(ids, weight.index_copy(0, indices, rows))
    assert torch.equal(out, wanted)
    assert torch.equal(*(torch.autograd.grad(o.sum(), rows)[0] for o in (out, wanted)))
    none = rows_embedding(ids, weight.nan_to_num(), indices[:0], rows[:0])
    assert torch.equal(none, F.embedding(ids, weight.nan_to_num()))


def test_the_way_of_a_gpu_gives_the_same(monkeypatch):
    # The ops without the waits that a count of hits would cost, run on the CPU.
    from superfine_kernels import slices

    ids, weight, indices, rows = lookup()
    slots = make_slots(indices, OUT)
    grad = torch.randn(3, 7, 6, dtype=torch.float64)
    arguments = (grad, ids, slots, 4, torch.float64, 2)
    wanted = slices._embedding(ids, weight, slots, rows, -1), slices._embedding_grad(*arguments)
    monkeypatch.setattr(slices, "_HITS_ON", ())
    assert torch.equal(slices._embedding(ids, weight, slots, rows, -1), wanted[0])
    torch.testing.assert_close(slices._embedding_grad(*arguments), wanted[1])


def test_embedding_gradient_is_summed_in_float32():
    # 4096 halves of 1 + 2^-8 summed in bfloat16 would stop growing at 256.
    rows = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    rows_embedding(torch.ones(4096, dtype=torch.int64), weight, torch.tensor([1]), rows).sum().backward()
    assert rows.grad.item() == 4096


@pytest.mark.filterwarnings("ignore:.*a second derivative is asked for")
def test_embedding_gradcheck_opcheck_and_compiled():
    ids, weight, indices, rows = lookup()

    def op(rows):
        return rows_embedding(ids, weight.nan_to_num(), indices, rows).square()

    assert torch.autograd.gradcheck(op, (rows,), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (rows,), fast_mode=True)
    arguments = (ids, weight.nan_to_num(), make_slots(indices, OUT), rows, 2)
    torch.library.opcheck(torch.ops.superfine.slice_embedding.default, arguments)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(rows).sum(), rows)[0] for f in (compiled, op)))


# --- what is refused ----


def refused(op, arguments, message, error=ValueError, **more):
    weight = arguments[1]
    before = weight.clone() if isinstance(weight, Tensor) else weight
    with pytest.raises(error, match=message):
        op(*arguments, **more)
    if isinstance(weight, Tensor):
        torch.testing.assert_close(weight, before, equal_nan=True)


@pytest.mark.parametrize(
    ("place", "value", "message", "error"),
    [
        (0, None, r"input is None", TypeError),
        (0, torch.ones(3, IN - 1), r"input is float32 \(3, 11\) on cpu; expected \(\.\.\., 12\)", ValueError),
        (0, torch.ones(3, IN).double(), r"input is float64 .*; expected float32, as the weight", TypeError),
        (1, torch.ones(OUT), r"weight is float32 \(20,\) on cpu; expected two dimensions", ValueError),
        (1, torch.ones(OUT, IN, dtype=torch.int64), r"weight is int64 .*; expected float32, bf", TypeError),
        (
            1,
            nn.Parameter(torch.ones(OUT, IN)),
            r"weight is .*requires a gradient.*; expected a frozen",
            ValueError,
        ),
        (2, torch.ones(IN), r"bias is float32 \(12,\) on cpu; expected \(20,\)", ValueError),
        (2, torch.ones(OUT).half(), r"bias is float16 .*; expected float32", TypeError),
        (3, torch.tensor([1, 2, 3, 4]).int(), r"indices is int32 \(4,\) on cpu; expected int64", TypeError),
        (
            3,
            torch.tensor([1, 2, 3, OUT]),
            r"indices is 'from 1 to 20' .*; expected rows in \[0, 20\)",
            ValueError,
        ),
        (
            3,
            torch.tensor([-1, 2, 3, 4]),
            r"indices is 'from -1 to 4' .*; expected rows in \[0, 20\)",
            ValueError,
        ),
        (
            3,
            torch.tensor([1, 2, 2, 4]),
            r"indices is 'not unique' .*; expected each of the rows once",
            ValueError,
        ),
        (4, torch.ones(3, IN), r"rows is float32 \(3, 12\) on cpu; expected float32 \(4, 12\)", ValueError),
        (4, torch.ones(4, IN).double(), r"rows is float64 .*; expected float32, as the weight", TypeError),
        (
            4,
            torch.ones(4, IN, device="meta"),
            r"rows is float32 .* on meta; expected a tensor on cpu",
            ValueError,
        ),
    ],
)
def test_bad_input_of_linear_layers(place, value, message, error):
    arguments = list(problem("rows"))
    arguments[place] = value
    refused(rows_linear, arguments, f"rows_linear: {message}", error)


def test_bad_input_of_columns_and_embeddings():
    arguments = list(problem("cols"))
    arguments[4] = torch.ones(4, OUT)
    refused(cols_linear, arguments, r"cols_linear: cols is .*; expected float32 \(20, 4\)")
    ids, weight, indices, rows = lookup()
    refused(
        rows_embedding, (ids.double(), weight, indices, rows), r"ids is float64 .* int64 or int32", TypeError
    )
    refused(
        rows_embedding,
        (ids, weight, indices, rows, OUT),
        r"padding_idx is 20 \(int\); expected None or a row",
    )
    refused(
        rows_embedding,
        (ids, weight, indices, rows),
        r"slots is .*; expected int32",
        slots=torch.ones(3).int(),
    )
    refused(rows_embedding, (ids + OUT, weight, indices, rows), "out of range", IndexError)


def test_the_checks_of_the_benchmark_pass_providers_and_see_an_error():
    from superfine_bench import slices

    for case in (
        slices._linear_case(0, 70, 16, 300, 8, torch.float32),
        slices._linear_case(1, 70, 16, 300, 4, torch.float32),
        slices._embedding_case(64, 16, 300, 8),
    ):
        inputs = case.inputs(torch.device("cpu"))
        case.redraw(inputs, 1)
        calls = [provider.build(inputs) for provider in case.providers]
        assert [case.check(inputs, call) <= 1 for call in calls] == [True] * 3
        found = calls[-1]()
        assert case.check(inputs, lambda found=found: tuple(1.01 * gradient for gradient in found)) > 1
        assert case.cost().bytes > 0


def test_cost_counts_what_the_slice_costs():
    whole = cost(100, 30, 40, 0, slice_grad=False)
    rows, cols = cost(100, 30, 40, 4), cost(100, 30, 40, 4, dim=COLS)
    assert whole.flops == 2 * 2 * 100 * 30 * 40
    assert (rows.flops - whole.flops, cols.flops - whole.flops) == (2 * 100 * 4 * 30, 2 * 100 * 4 * 40)
    assert cost(100, 30, 40, 4, torch.bfloat16).bytes == rows.bytes // 2
    assert superfine_kernels.rows_linear is rows_linear
