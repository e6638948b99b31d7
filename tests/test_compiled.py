"""torch.compile: graphs are made once and serve every shape; the compiler's own code gives the gradients of eager."""

from __future__ import annotations

import pytest
import superfine
import torch
from prepare_cases import assert_same_gradients, without_dropout
from small_models import VOCAB, bert
from torch import nn
from torch._dynamo.utils import counters

import superfine_kernels as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]  # torch.compile's own

# Both sizes differ from call to call: one graph for the first, one with an open size, one with both open.
SHAPES = ((3, 5), (4, 5), (4, 6), (7, 9), (8, 12))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


WEIGHT = torch.linspace(-1, 1, 8)
OPS = {
    "layer_norm": lambda x: kernels.layer_norm(x, WEIGHT, WEIGHT),
    "rms_norm": lambda x: kernels.rms_norm(x, WEIGHT, residual=2 * x)[0],
    "gelu": lambda x: kernels.gelu(x, "tanh"),
    "swiglu": lambda x: kernels.swiglu(x, 2 * x),
    "cross_entropy": lambda x: kernels.cross_entropy(x.flatten(0, 1), x.argmin(-1).flatten()),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, WEIGHT * WEIGHT[:, None], x.argmin(-1)),
    "mse": lambda x: kernels.mse(x, x.detach().sin()),
    "bce_with_logits": lambda x: kernels.bce_with_logits(x, x.detach().sigmoid()),
}


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_not_compiled_again_for_every_shape(op):
    compiled = torch.compile(OPS[op], backend="aot_eager", fullgraph=True)
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(OPS[op](x).sum(), x)
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == 3


def test_a_prepared_model_is_not_compiled_again_for_every_shape():
    model = without_dropout(bert(layers=2)).train()
    slices = {"rows": {"word_embeddings": [3, 4]}, "cols": {"*.0.output.dense": 0.3}}
    superfine.prepare(model, superfine.select(model, "last:1", "head", **slices))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows, columns in ((3, 5), (4, 6), (7, 9), (8, 12)):
        ids = torch.randint(2, VOCAB, (rows, columns))
        compiled(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
    assert counters["stats"]["unique_graphs"] == 2
    model(input_ids=ids)  # what a forward without the compiler finds out is no reason to compile again
    compiled(input_ids=ids, labels=ids[:, 0] % 3)
    assert counters["stats"]["unique_graphs"] == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.GELU("tanh")

    def forward(self, x):
        return x + self.last(self.act(self.first(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        loss = kernels.linear_cross_entropy(
            x[:, :-1], self.head.weight, ids[:, 1:], linear_bias=self.head.bias
        )
        return loss + kernels.cross_entropy(self.head(x[:, 0]), ids[:, 0])


def test_the_compilers_code_gives_the_gradients_of_eager():
    model = Classifier()
    plan = superfine.select(model, "norms", "head", rows={"embedding": [3, 4]}, cols={"*.last": 0.3})
    superfine.prepare(model, plan)
    compiled = torch.compile(model, fullgraph=True)
    optimizer = plan.optimizer(lr=1e-2, max_grad_norm=0.1)
    for _ in range(2):  # slices are written into their weights anew
        ids = torch.randint(2, VOCAB, (3, 6))
        found = {}
        for forward in (model, compiled):
            optimizer.zero_grad()
            loss = forward(ids)
            loss.backward()
            found[forward] = loss, {name: p.grad.clone() for name, p in plan.named_parameters()}
        torch.testing.assert_close(found[compiled][0], found[model][0])
        assert_same_gradients(found[compiled][1], found[model][1], 1e-4)
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
