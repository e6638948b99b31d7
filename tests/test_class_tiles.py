"""The tiles of linear_cross_entropy: their sums' bits, and their sizes wherever these are asked for."""

import pytest
import torch
from support import ISAS
from torch._subclasses.fake_tensor import FakeTensorMode

from superfine_kernels import _class_tiles as tiles
from superfine_kernels import linear_cross_entropy
from superfine_kernels._losses import Options

NO_OPTIONS = Options(-100, 0.0, 0.0, 0.0, 1.0)


# 1000 rows of narrow tiles are multiplied in blocks.
@pytest.mark.parametrize(("rows", "features", "classes"), [(300, 24, 4000), (800, 16, 2500), (1000, 8, 1600)])
@pytest.mark.parametrize("isa", ISAS)
def test_split_sums_have_the_bits_of_float32_sums(rows, features, classes, isa, monkeypatch):
    x = torch.randn(features, rows).bfloat16().t().requires_grad_()
    w = torch.randn(features, classes).bfloat16().t().requires_grad_()
    a, b = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((4, features), (classes, 4)))
    target = torch.randint(classes, (rows,))
    target[::7] = -100
    made = []

    def gradients():
        options = {"lora": (a, b, 0.5), "tile_bytes": 2 * rows, "backend": f"cpu:{isa}"}
        return torch.autograd.grad(linear_cross_entropy(x, w, target, **options), [x, w, a, b])

    class Counted(tiles.SplitSum):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(tiles, "SplitSum", Counted)
    actual = gradients()
    assert len(made) == 2  # of the input and of its product with `a`
    monkeypatch.setattr(tiles, "SplitSum", lambda like, _: tiles.Sum(like, torch.float32, None))
    for gradient, expected in zip(actual, gradients(), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_blocks_are_the_whole_product(dtype):
    rows, features, classes = 1000, 32, 800
    x, w = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    bias = torch.randn(classes).to(dtype)
    for b in (None, bias):
        problem = tiles.Problem(
            x, w, b, None, None, None, None, None, None, None, NO_OPTIONS, 0, 0.0, "cpu"
        )  # fmt: skip
        logits = problem.logits(slice(0, classes), x.new_empty(rows * classes))
        expected = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        torch.testing.assert_close(
            logits.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=2e-5
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_traced_op_has_the_tiles_of_the_one_that_runs(device):
    with FakeTensorMode():
        x = torch.empty(2048, 64, dtype=torch.bfloat16, device=device)
        w = torch.empty(8192, 64, dtype=torch.bfloat16, device=device)
        target = torch.zeros(2048, dtype=torch.int64, device=device)
        size = tiles.checked_tile_bytes("op", None, x)
        tensors = (x, w, None, None, None, None, None, target, None, None)
        needed = torch.ops.superfine.linear_cross_entropy(
            *tensors, *NO_OPTIONS, size, 0.1, "", 0, False, False, None
        )[2]
        problem = tiles.Problem(*tensors, NO_OPTIONS, size, 0.1, "")
        assert needed.shape == (len(list(problem.tiles())), 2048)
        assert needed.shape[0] == (11 if device == "cpu" else 1)


@pytest.mark.parametrize("options", [{}, {"tile_bytes": 1 << 20}])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_number_of_rows(options, strict):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2000, 16))

        def forward(self, x, target):
            return linear_cross_entropy(x, self.w, target, **options)

    model, rows = Loss(), torch.export.Dim("rows", min=2, max=8000)
    x, target = torch.randn(30, 16), torch.randint(2000, (30,))
    with torch.no_grad():
        sizes = ({0: rows}, {0: rows})
        exported = torch.export.export(model, (x, target), dynamic_shapes=sizes, strict=strict).module()
        x, target = torch.randn(900, 16), torch.randint(2000, (900,))
        assert torch.equal(exported(x, target), model(x, target))
