"""superfine.optim.AdamW against torch.optim.AdamW: the same steps, state, checkpoints and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from superfine.optim import LAMB, AdamW
from support import one_warning, same_bits
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

# Sizes around a vector of 16 floats, an embedding-like matrix, and a scalar.
SHAPES = [(40, 17), (17,), (16,), (3, 5, 2), (), (0,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int, skip: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if i in skip else gradient


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter], tolerance: float = 2e-6) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a.data, b.data, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


def assert_same_bits(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(a.data, b.data), f"parameter {i} of shape {tuple(a.shape)} differs"


def assert_same_state(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, tolerance: float = 2e-6
) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for name, value in state.items():
            assert value.dtype == b["state"][index][name].dtype
            torch.testing.assert_close(value, b["state"][index][name], rtol=tolerance, atol=tolerance)
    names = [set(group) for group in a["param_groups"]]
    assert names == [set(group) for group in b["param_groups"]]


# --- the same steps --------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True, "weight_decay": 0.0},
        {"lr": torch.tensor(3e-3).double(), "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3},
        {"foreach": True},
        {"fused": True},
        {"betas": (torch.tensor(0.8).double(), torch.tensor(0.9).double())},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_follows_torch_for_twenty_steps(dtype, tolerance, options):
    ours, theirs = parameters(dtype), parameters(dtype)
    plain = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
    a, b = AdamW(ours, **options), torch.optim.AdamW(theirs, **plain)
    for step in range(20):
        train(a, ours, range(step, step + 1))
        train(b, theirs, range(step, step + 1))
        assert_close(ours, theirs, tolerance)
    assert_same_state(a, b, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_torch_fused(dtype):
    # In vectors of 32, where torch's fused step computes in float32 and rounds once, as ours does.
    ours = [nn.Parameter(torch.randn(64, 32).to(dtype))]
    theirs = copy.deepcopy(ours)
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for step in range(20):
        train(a, ours, range(step, step + 1))
        train(b, theirs, range(step, step + 1))
        assert_close(ours, theirs, 2 * torch.finfo(dtype).eps)


def test_float32_has_the_bits_of_torch_fused():
    ours = [nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(16))]
    theirs = copy.deepcopy(ours)
    train(AdamW(ours), ours, range(20))
    train(torch.optim.AdamW(theirs, fused=True), theirs, range(20))
    assert_same_bits(ours, theirs)


def test_a_model_trains_as_with_torch():
    model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5))
    other = copy.deepcopy(model)
    x, t = torch.randn(32, 12), torch.randint(0, 5, (32,))
    optimizers = AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(other.parameters(), lr=1e-2)
    for _ in range(20):
        losses = []
        for net, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), t)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_hyperparameters():
    def groups(params: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.5},
            {"params": params[2:3], "betas": (0.5, 0.6), "amsgrad": True},
            {"params": params[3:], "eps": 1e-2, "maximize": True},
        ]

    ours, theirs = parameters(), parameters()
    a, b = AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(a, ours, range(5))
    train(b, theirs, range(5))
    assert_close(ours, theirs)
    assert_same_state(a, b)


def test_parameters_without_gradient_stay_and_count_their_own_steps():
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step, skip in enumerate([(0, 3), (), (1,), (0, 1, 2, 3, 4, 5), (2,)]):
        before = [p.detach().clone() for p in ours]
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, step, skip)
            optimizer.step()
        for i in skip:
            assert same_bits(ours[i].data, before[i])
        assert_close(ours, theirs)
        assert_same_state(a, b)
    assert [int(a.state[p]["step"]) for p in ours] == [3, 3, 3, 3, 4, 4]


def test_parameters_unfrozen_and_groups_added_later():
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours[:4], lr=1e-2), torch.optim.AdamW(theirs[:4], lr=1e-2)
    for params, optimizer in ((ours, a), (theirs, b)):
        params[1].requires_grad_(False)
        for step in range(3):
            set_gradients(params, step, skip=(1, 4, 5))
            optimizer.step()
        params[1].requires_grad_(True)
        optimizer.add_param_group({"params": params[4:], "lr": 0.1})
        train(optimizer, params, range(3, 6))
    assert_close(ours, theirs)
    assert_same_state(a, b)


def test_300_small_tensors_equal_one_by_one():
    together = [nn.Parameter(torch.randn(1 + i % 40)) for i in range(300)]
    alone = copy.deepcopy(together)
    optimizer, single = AdamW(together, lr=1e-2), [AdamW([p], lr=1e-2) for p in alone]
    for step in range(3):
        train(optimizer, together, range(step, step + 1))
        set_gradients(alone, step)
        for one in single:
            one.step()
    assert_same_bits(together, alone)


# --- schedulers, closures, hooks, scalers --------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    ],
    ids=["LambdaLR", "OneCycleLR", "CosineAnnealingLR"],
)
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_learning_rate_schedulers(scheduler, lr):
    ours, theirs = parameters(), parameters()
    for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(params, lr=copy.copy(lr) if isinstance(lr, float) else lr.clone())
        schedule = scheduler(optimizer)
        for step in range(9):  # beyond the half of OneCycle and twice the half of the cosine
            train(optimizer, params, range(step, step + 1))
            schedule.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(kind):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer, calls = kind([weight], lr=0.1), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss == 4
    assert weight < 2
    assert optimizer.step() is None


@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_step_hooks_run_around_the_step(kind):
    params, seen = parameters(), []
    optimizer = kind(params)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", len(opt.state))))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", len(opt.state))))
    train(optimizer, params, range(1))
    assert seen == [("pre", 0), ("post", len(SHAPES))]


def test_grad_scaler_unscales_and_skips_as_with_torch():
    ours, theirs = [nn.Parameter(torch.randn(8, 4))], []
    theirs = copy.deepcopy(ours)
    for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = kind(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            optimizer.zero_grad()
            factor = float("inf") if step == 2 else 1.0 + step
            scaler.scale((params[0] * factor).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 32.0
        assert optimizer.state[params[0]]["step"] == 3
    assert_close(ours, theirs)


def test_a_differentiable_group_is_stepped_by_torch_with_one_warning():
    ours, theirs = parameters(), parameters()
    a = AdamW(ours, lr=1e-2, differentiable=True)
    b = torch.optim.AdamW(theirs, lr=1e-2, differentiable=True)
    with one_warning("AdamW: differentiable=True has no kernel"):
        for optimizer, params in ((a, ours), (b, theirs)):
            for param in params:
                param.requires_grad_(False)  # a leaf cannot be stepped differentiably
            train(optimizer, params, range(3))
    assert_close(ours, theirs)


def test_capturable_changes_nothing():
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=1e-2, capturable=True), AdamW(theirs, lr=1e-2)
    train(a, ours, range(3))
    train(b, theirs, range(3))
    assert_same_bits(ours, theirs)


def test_a_differentiable_step_has_a_derivative():
    weight, scale = torch.tensor([1.0, 2.0]), torch.tensor(3.0, requires_grad=True)
    moved = weight.clone().requires_grad_() * 1
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=0.1, eps=1.0, differentiable=True)
    optimizer.param_groups[0]["params"] = [moved]
    moved.grad = scale * torch.ones(2)
    with one_warning("differentiable=True"):
        optimizer.step()
    moved.sum().backward()
    assert scale.grad < 0  # a larger gradient moves the weights further down
