import copy

import pytest
import torch
from torch import nn

import superfine_kernels
from superfine_kernels.lora_linear import cost, lora_linear, reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Input and adapter. PEFT keeps adapters in float32 beside 16-bit layers.
DTYPES = [(FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16), (FP64, FP64), (FP32, FP64)]
NAMES = ("input", "weight", "bias", "a", "b")


def tensors(shape=(3, 5, 12), outputs=7, rank=2, dtype=FP32, adapter=None, bias=True, train=NAMES):
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype):
        return torch.randn(size, generator=generator, dtype=FP64).to(dtype)

    made = {
        "input": random(*shape, dtype=dtype),
        "weight": random(outputs, shape[-1], dtype=dtype),
        "bias": random(outputs, dtype=dtype) if bias else None,
        "a": random(rank, shape[-1], dtype=adapter or dtype),
        "b": random(outputs, rank, dtype=adapter or dtype),
    }
    for name in train:
        if made[name] is not None:
            made[name].requires_grad_()
    return made


def gradients(function, made, g, **options):
    wanted = {name: t for name, t in made.items() if t is not None and t.requires_grad}
    y = function(*made.values(), 1.5, **options)
    return y.detach(), dict(
        zip(wanted, torch.autograd.grad(y, list(wanted.values()), g.to(y.dtype)), strict=True)
    )


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_is_as_near_to_float64_as_eager_torch(dtype, adapter, masked):
    # 700 rows are several blocks of conversion for layers of 300.
    made = tensors((700, 300), 9, 4, dtype, adapter)
    g = torch.randn(700, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"dropout_mask": torch.rand(700, 300) < 0.8, "dropout_p": 0.2} if masked else {}
    exact = {k: t.detach().double().requires_grad_() for k, t in made.items()}
    y, wanted = gradients(reference, exact, g, **options)
    found, eager = gradients(lora_linear, made, g, **options), gradients(reference, made, g, **options)
    assert found[0].dtype == dtype
    floor = 4 * torch.finfo(dtype).eps
    assert relative(found[0], y) <= 1.05 * relative(eager[0], y) + 4 * torch.finfo(adapter).eps
    for name, gradient in found[1].items():
        assert gradient.dtype == made[name].dtype
        error = relative(gradient, wanted[name])
        assert error <= floor
        assert error <= 1.05 * relative(eager[1][name], wanted[name]) + 4 * torch.finfo(adapter).eps, name


@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 1), (2, 0, 4), (1, 3, 2, 5)])
def test_any_shape(shape):
    made = tensors(shape, dtype=FP64)
    g = torch.ones(*shape[:-1], 7, dtype=FP64)
    y, found = gradients(lora_linear, made, g)
    expected, wanted = gradients(reference, made, g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, wanted)


def test_strides_and_a_layer_without_bias():
    made = tensors((6, 8, 12), dtype=FP32, adapter=FP64, bias=False)
    made["input"] = made["input"].detach().transpose(0, 1)[:, ::2].requires_grad_()
    made["weight"] = made["weight"].detach().t().contiguous().t().requires_grad_()  # a Conv1D's
    g = torch.randn(8, 3, 7).expand(8, 3, 7)
    y, found = gradients(lora_linear, made, g)
    expected, wanted = gradients(reference, made, g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "train", [(), ("input",), ("a",), ("b",), ("input", "b"), ("bias",), ("weight",), ("a", "b")]
)
def test_what_is_frozen_has_no_gradient_and_keeps_nothing(train):
    made, saved = tensors((4, 12), dtype=BF16, adapter=FP32, train=train), []
    parameters = {made[name].data_ptr() for name in NAMES[1:]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(*made.values(), 1.5)
    kept = [t for t in saved if t.data_ptr() not in parameters]
    inputs = [t for t in kept if t.data_ptr() == made["input"].data_ptr()]
    assert len(inputs) == ("a" in train or "weight" in train)
    assert [t.dtype for t in inputs] == [BF16] * len(inputs)
    # Beside it at most scale x a^T: as many numbers a row as the rank is.
    assert [tuple(t.shape) for t in kept if t.data_ptr() != made["input"].data_ptr()] == [(4, 2)] * (
        "b" in train
    )
    assert y.requires_grad == bool(train)
    if train:
        g = torch.randn(4, 7, dtype=BF16)
        _, found = gradients(lora_linear, made, g)
        _, wanted = gradients(reference, made, g)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_the_input_is_computed_again_where_it_says_how():
    made, calls, saved = tensors((4, 12), train=("a", "b")), [], []
    source = made["input"].clone()
    made["input"] = source * 2

    def double(tensor):
        calls.append(1)
        return tensor * 2

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = lora_linear(*made.values(), input_from=(double, (source,)))
    assert source.data_ptr() in saved
    assert made["input"].data_ptr() not in saved
    assert not calls
    found = torch.autograd.grad(y.sum(), (made["a"], made["b"]))
    assert len(calls) == 1
    wanted = torch.autograd.grad(reference(*made.values(), 1.0).sum(), (made["a"], made["b"]))
    torch.testing.assert_close(found, wanted)


def test_an_input_that_changed_before_backward_is_noticed():
    made = tensors((4, 12), train=("a",))
    y = lora_linear(*made.values())
    made["input"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(masked):
    made = tensors((2, 3), 2, 2, FP64)
    options = {"dropout_mask": torch.tensor([[True, False, True], [True, True, False]]), "dropout_p": 0.25}

    def function(*arguments):
        return lora_linear(*arguments, 0.5, **(options if masked else {}))

    assert torch.autograd.gradcheck(function, tuple(made.values()))
    assert torch.autograd.gradgradcheck(function, tuple(made.values()))


def test_many_gradients_at_once():
    for train in (("input", "a", "b"), ("input", "b")):  # beside a frozen `a`, no input is kept
        made = tensors((2, 3), 2, 2, FP64, train=train)
        leaves = [made[name] for name in train]
        y, many = lora_linear(*made.values()), torch.randn(4, 2, 2, dtype=FP64)
        found = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
        for i, grad in enumerate(many):
            alone = torch.autograd.grad(y, leaves, grad, retain_graph=True)
            for ours, theirs in zip(found, alone, strict=True):
                torch.testing.assert_close(ours[i], theirs)


def test_second_derivatives_beside_a_frozen_a():
    made = tensors((2, 3), 2, 2, FP64, train=("b",))
    assert torch.autograd.gradgradcheck(lambda b: lora_linear(*list(made.values())[:4], b), made["b"])
    made["input"].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(lora_linear(*made.values()).sum(), made["b"], create_graph=True)
    gradient = torch.autograd.grad(
        lora_linear(*made.values(), backend="reference").sum(), made["b"], create_graph=True
    )
    assert gradient[0].requires_grad


def test_backward_twice_gives_the_same():
    made = tensors((5, 12), dtype=BF16, adapter=FP32)
    y, g = lora_linear(*made.values()), torch.randn(5, 7, dtype=BF16)
    first = torch.autograd.grad(y, list(made.values()), g, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, list(made.values()), g)))


def test_nan_and_infinity_stay_in_their_rows():
    made = tensors((4, 12), dtype=BF16, adapter=FP32)
    with torch.no_grad():
        made["input"][1, 3], made["input"][2, 0] = float("nan"), float("inf")
    y = lora_linear(*made.values())
    assert y.isfinite().all(1).tolist() == [True, False, False, True]


def test_under_autocast_it_computes_as_the_layers_do():
    made = tensors((6, 12))
    g = torch.randn(6, 7, dtype=BF16)
    with torch.autocast("cpu", BF16):
        y, found = gradients(lora_linear, made, g)
        expected, wanted = gradients(
            lambda x, w, bias, a, b, s: (
                nn.functional.linear(x, w, bias) + nn.functional.linear(nn.functional.linear(x, a), b) * s
            ),
            made,
            g,
        )
    assert y.dtype == BF16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)
    for name in NAMES:
        assert found[name].dtype == FP32
        assert relative(found[name], wanted[name].double()) < 1e-2


def test_compiled_in_one_graph():
    made = tensors((6, 12))
    g = torch.randn(6, 7)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    y, found = gradients(compiled, made, g)
    expected, wanted = gradients(reference, made, g)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, wanted)


def test_functional_transforms():
    made = tensors((6, 12), train=())
    x, rest = made["input"], list(made.values())[1:]
    each = torch.func.vmap(lambda row: torch.func.grad(lambda r: lora_linear(r, *rest, 2.0).sum())(row))(x)
    assert each.shape == x.shape
    torch.testing.assert_close(each[0], (rest[0] + 2 * rest[3] @ rest[2]).sum(0))


def test_a_copy_of_the_layer_in_float64_agrees_with_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 7)), peft.LoraConfig(r=2, target_modules=["0"])
    ).double()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B.default.weight)
    x = torch.randn(3, 12, dtype=FP64)
    base = layer.base_layer
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    found = lora_linear(x, base.weight, base.bias, a, b, layer.scaling["default"])
    torch.testing.assert_close(found, copy.deepcopy(layer)(x))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input is .*; expected a torch.Tensor"),
        ({"input": torch.tensor(1.0)}, ValueError, "input is float32"),
        (
            {"input": torch.zeros(3, 12, dtype=torch.int64)},
            TypeError,
            "input is int64 .*; expected floating point",
        ),
        (
            {"weight": torch.zeros(7, 11)},
            ValueError,
            r"weight is float32 \(7, 11\) on cpu; expected \(out_features, 12\)",
        ),
        (
            {"weight": torch.zeros(7, 12, dtype=BF16)},
            ValueError,
            "weight is bfloat16 .*; expected torch.float32",
        ),
        (
            {"weight": torch.zeros(7, 12, device="meta")},
            ValueError,
            "weight is .* on meta; expected a tensor on cpu",
        ),
        ({"bias": torch.zeros(6)}, ValueError, r"bias is float32 \(6,\) on cpu; expected \(7\)"),
        ({"bias": torch.zeros(7, dtype=FP64)}, ValueError, "bias is float64"),
        ({"a": torch.zeros(12)}, ValueError, r"a is float32 \(12,\) on cpu; expected \(rank, 12\)"),
        (
            {"a": torch.zeros(2, 12, dtype=BF16), "b": torch.zeros(7, 2, dtype=BF16)},
            ValueError,
            "a is bfloat16 .*, or wider",
        ),
        ({"b": torch.zeros(7, 3)}, ValueError, r"b is .*; expected \(7, 2\)"),
        ({"b": torch.zeros(7, 2, dtype=FP64)}, ValueError, "b is float64 .*; expected torch.float32 as a"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0 .*; expected a number in \[0, 1\)"),
        ({"dropout_mask": torch.ones(3, 5, 12)}, ValueError, "dropout_mask is float32 .*; expected bool"),
        ({"dropout_mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, "dropout_mask is bool"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        lora_linear(**{**tensors(), **changes})


def test_cost_counts_products_and_traffic():
    forward = cost(10, 3, 5, 2, backward=False)
    assert forward.flops == 2 * 10 * (3 * 5 + 2 * 3 + 5 * 2)
    assert forward.bytes == 4 * (10 * 3 + 10 * 5 + 3 * 5 + 2 * (3 + 5))
    both = cost(10, 3, 5, 2)
    assert both.flops == forward.flops + 2 * 10 * (3 * 5 + (2 * 3 + 5 * 2) + 5 * 2 + 2 * 3)
    assert superfine_kernels.lora_linear is lora_linear
