"""What the first step of a plan's optimizer notices."""

from __future__ import annotations

import pytest
import torch
from small_models import bert, distilbert, gpt2, llama, mlp, roberta, step, t5
from superfine.select import Plan, select
from torch import nn


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_check_passes_once_and_removes_itself_beside_other_hooks():
    model = mlp()
    plan = select(model, "last:2")
    optimizer = plan.optimizer("sgd", lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("first"))
    optimizer.register_step_post_hook(lambda *_: calls.append("second"))
    step(model, plan, optimizer)
    assert calls == ["first", "second"]
    assert hooks(optimizer) == 2
    model[0].weight.requires_grad_(True)  # no longer watched
    optimizer.zero_grad()
    step(model, plan, optimizer)


def test_check_can_be_left_out():
    assert hooks(select(mlp(), "all").optimizer("sgd", lr=0.1, first_step_check=False)) == 0


def test_missing_gradient_is_an_error_before_anything_moves():
    model = mlp()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    plan = select(model, "4.*", "unused.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    before = model[4].weight.clone()
    for _ in range(2):  # the check stays until a step passes
        with pytest.raises(
            ValueError, match=r"selected parameter 'unused.weight' \(and 1 other\) has no gradient"
        ):
            step(model, plan, optimizer)
    assert torch.equal(model[4].weight, before)


def test_step_before_backward_is_an_error():
    plan = select(mlp(), "all")
    with pytest.raises(ValueError, match=r"backward\(\) before step\(\)"):
        plan.optimizer("sgd", lr=0.1).step()


def test_all_zero_gradients_are_an_error():
    model = mlp()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    (model(torch.ones(1, 4)).sum() * 0).backward()
    with pytest.raises(ValueError, match=r"gradient of '0.weight' .* is zero everywhere, as is every other"):
        optimizer.step()


def test_tiny_gradients_are_not_zero():
    model = mlp()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    (model(torch.ones(1, 4)).sum() * 1e-30).backward()  # the squares of these vanish in fp32
    optimizer.step()
    assert hooks(optimizer) == 0


def test_one_zero_gradient_is_a_warning():
    class LoRA(nn.Module):  # the gradient of a is zero while b is
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2, bias=False)
            self.b = nn.Linear(2, 4, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return x + self.b(self.a(x))

    model = LoRA()
    plan = select(model, "all")
    optimizer = plan.optimizer("sgd", lr=0.1)
    with pytest.warns(UserWarning, match="gradient of 'a.weight' is zero everywhere"):
        step(model, plan, optimizer)
    assert hooks(optimizer) == 0


def test_parameter_unfrozen_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.bias' requires a gradient but is not selected"):
        step(model, plan, optimizer)


def test_parameter_added_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model.append(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"'5.weight' \(and 1 other\) requires a gradient but is not selected"
    ):
        step(model, plan, optimizer)


def test_parameter_frozen_later_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[4].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'4.bias' was frozen after select"):
        step(model, plan, optimizer)


def test_gradient_of_a_frozen_parameter_is_an_error():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=r"frozen parameter '0.weight' has a gradient"):
        step(model, plan, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", [0, 8, -1])  # both ends, and the middle, of the 64-bit words
def test_frozen_parameter_that_moves_is_an_error(dtype, index):
    # 17 elements: bytes beyond whole words; as a slice, so that words are not aligned either.
    model = nn.ModuleDict({"frozen": nn.Module(), "out": nn.Linear(4, 2)})
    model["frozen"].weight = nn.Parameter(torch.ones(18, dtype=dtype)[1:])
    plan = select(model, "out.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model["out"](torch.ones(1, 4)).sum().backward()

    def disturb(optimizer, args, kwargs):
        # numpy writes past autograd and its version counters, as a native kernel can
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        model["frozen"].weight.data.view(bits).numpy()[index] ^= 1

    optimizer.register_step_post_hook(disturb)
    with pytest.raises(ValueError, match=r"frozen parameter 'frozen.weight' moved in the first step"):
        optimizer.step()


def test_frozen_parameter_that_is_not_contiguous_is_watched():
    model = nn.ModuleDict({"frozen": nn.Module(), "out": nn.Linear(4, 2)})
    model["frozen"].weight = nn.Parameter(torch.zeros(3, 5).t())
    plan = select(model, "out.*")
    optimizer = plan.optimizer("sgd", lr=0.1)
    model["out"](torch.ones(1, 4)).sum().backward()
    optimizer.register_step_post_hook(lambda *_: model["frozen"].weight.data[4, 2].add_(1))
    with pytest.raises(ValueError, match="moved in the first step"):
        optimizer.step()


def test_accumulated_gradients_pass():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("adam", lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    step(model, plan, optimizer)
    assert hooks(optimizer) == 0


def test_closure_is_checked_after_its_backward():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert hooks(optimizer) == 0

    blind = select(model, "last:1").optimizer("sgd", lr=0.1)
    blind.zero_grad()
    with pytest.raises(ValueError, match="has no gradient"):
        blind.step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    "fused", [False, True]
)  # fused optimizers skip inside step(), the others are not called
def test_step_skipped_by_grad_scaler_does_not_count(fused):
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("adam", lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watched = hooks(optimizer)
    for factor, remaining in ((float("inf"), watched), (1.0, 0)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum() * factor).backward()
        before = model[4].weight.clone()
        scaler.step(optimizer)
        scaler.update()
        assert hooks(optimizer) == remaining
        assert torch.equal(model[4].weight, before) == (remaining > 0)


def test_sparse_gradients_pass():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    plan = select(model, "embeddings")
    optimizer = plan.optimizer("sgd", lr=0.1, weight_decay=0.0)
    step(model, plan, optimizer, torch.tensor([1, 2]))
    assert hooks(optimizer) == 0


def test_failed_step_leaves_the_check_in_place():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("sgd", lr=0.1)
    fail = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, plan, optimizer)
    fail.remove()
    step(model, plan, optimizer)
    assert hooks(optimizer) == 0


@pytest.mark.parametrize("build", [bert, roberta, distilbert])
def test_classifiers_train_their_last_layer_and_head(build):
    model = build()
    plan = select(model, "last:1", "head")
    assert isinstance(plan, Plan)
    optimizer = plan.optimizer("adam", lr=1e-3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.arange(2, 14).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(plan.names)


@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_language_models_train_their_last_layer(build):
    model = build()
    plan = select(model, "last:1", "norms")
    optimizer = plan.optimizer("adam", lr=1e-3)
    tokens = torch.arange(1, 13).view(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert hooks(optimizer) == 0
