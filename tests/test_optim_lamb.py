"""superfine.optim.LAMB against LAMB in plain PyTorch, and as a torch.optim.Optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from superfine.optim import LAMB
from support import one_warning, same_bits, saved_and_loaded
from test_optim_adamw import assert_close, assert_same_bits, parameters, set_gradients, train
from torch import nn

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


class PlainLAMB(torch.optim.Optimizer):
    """Algorithm 2 of You et al. 2020, one tensor after the other."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, **options):
        options = {
            "bias_correction": True,
            "grad_averaging": True,
            "trust_clip": False,
            "adapt": True,
        } | options
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v = state["m"], state["v"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1 if group["grad_averaging"] else 1.0)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                if group["bias_correction"]:
                    m, v = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                p_norm, update_norm = p.norm().item(), update.norm().item()
                ratio = p_norm / update_norm if group["adapt"] and p_norm > 0 and update_norm > 0 else 1.0
                p.sub_(update, alpha=group["lr"] * (min(ratio, 1.0) if group["trust_clip"] else ratio))


# --- the same steps --------------------


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        ({}, {}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"grad_averaging": False}, {"grad_averaging": False}),
        ({"trust_clip": True, "lr": 0.1}, {"trust_clip": True, "lr": 0.1}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.0, "adapt": False}),  # as NVLAMB
        ({"weight_decay": 0.0, "always_adapt": True}, {"weight_decay": 0.0}),
        (
            {"lr": torch.tensor(3e-3, dtype=torch.float64), "betas": (0.8, 0.9), "eps": 1e-4},
            {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-4},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_follows_lamb_in_plain_pytorch_for_twenty_steps(dtype, tolerance, ours, plain):
    a_params, b_params = parameters(dtype), parameters(dtype)
    a, b = LAMB(a_params, **ours), PlainLAMB(b_params, **plain)
    for step in range(20):
        train(a, a_params, range(step, step + 1))
        train(b, b_params, range(step, step + 1))
        assert_close(a_params, b_params, tolerance)


def test_bfloat16_stays_near_float32():
    dtype = torch.bfloat16
    narrow, wide = parameters(dtype), [nn.Parameter(p.data.float()) for p in parameters(dtype)]
    a, b = LAMB(narrow, lr=1e-2), PlainLAMB(wide, lr=1e-2)
    for step in range(5):
        set_gradients(narrow, step)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    assert_close([nn.Parameter(p.data.float()) for p in narrow], wide, 8 * torch.finfo(dtype).eps)


def test_maximize_ascends():
    up, down = parameters(), parameters()
    a, b = LAMB(up, maximize=True), LAMB(down)
    for step in range(3):
        set_gradients(up, step)
        set_gradients(down, step)
        for param in down:
            param.grad.neg_()
        a.step()
        b.step()
    assert_same_bits(up, down)


def test_groups_have_their_own_hyperparameters_and_adaptation():
    def groups(params: list[nn.Parameter], unadapted: dict) -> list[dict]:
        return [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.5},
            {"params": params[2:3], "betas": (0.5, 0.6), "weight_decay": 0.2, "adapt": False},
            {"params": params[3:], "eps": 1e-2, "weight_decay": 0.0, **unadapted},
        ]

    ours, theirs = parameters(), parameters()
    a = LAMB(groups(ours, {}), lr=1e-2)
    b = PlainLAMB(groups(theirs, {"adapt": False}), lr=1e-2)
    train(a, ours, range(5))
    train(b, theirs, range(5))
    assert_close(ours, theirs, 1e-5)
    a.param_groups[2]["adapt"] = b.param_groups[2]["adapt"] = True
    train(a, ours, range(5, 8))
    train(b, theirs, range(5, 8))
    assert_close(ours, theirs, 1e-5)


def test_parameters_without_gradient_stay_and_count_their_own_steps():
    ours, theirs = parameters(), parameters()
    a, b = LAMB(ours, lr=1e-2), PlainLAMB(theirs, lr=1e-2)
    for step, skip in enumerate([(0, 3), (), (1,), (0, 1, 2, 3, 4, 5), (2,)]):
        before = [p.detach().clone() for p in ours]
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, step, skip)
            optimizer.step()
        for i in skip:
            assert same_bits(ours[i].data, before[i])
        assert_close(ours, theirs, 1e-5)
    assert [int(a.state[p]["step"]) for p in ours] == [3, 3, 3, 3, 4, 4]


# --- clipping --------------------


def _split(params: list[nn.Parameter]) -> list[dict]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("maximize", [False, True])
def test_clips_the_norm_over_all_groups_and_leaves_gradients_alone(max_norm, maximize):
    ours, theirs = parameters(), parameters()
    a = LAMB(_split(ours), lr=1e-2, max_grad_norm=max_norm, maximize=maximize)
    b = LAMB(_split(theirs), lr=1e-2, maximize=maximize)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        before = [p.grad.clone() for p in ours]
        a.step()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        b.step()
        assert all(same_bits(p.grad, old) for p, old in zip(ours, before, strict=True))
        assert a.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_close(ours, theirs, 1e-5)
    assert b.grad_norm is None


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = LAMB(params, max_grad_norm=1.0)
    set_gradients(params, 0)
    optimizer.step()
    exact = torch.cat([p.grad for p in params]).double().norm().item()
    assert optimizer.grad_norm == pytest.approx(exact, rel=1e-6)


# --- as a torch optimizer --------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_interrupted_run_goes_on_with_the_same_bits(dtype):
    straight, params = parameters(dtype), parameters(dtype)
    train(LAMB(straight, lr=1e-2), straight, range(6))
    first = LAMB(params, lr=1e-2)
    train(first, params, range(3))
    second = LAMB(params, lr=0.5)  # the rate comes from the checkpoint
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(second, params, range(3, 6))
    assert_same_bits(straight, params)
    assert {name for state in second.state.values() for name in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_added_later_have_the_defaults():
    ours, theirs = parameters(), parameters()
    a, b = LAMB(ours[:4], lr=1e-2), PlainLAMB(theirs[:4], lr=1e-2)
    for params, optimizer in ((ours, a), (theirs, b)):
        train(optimizer, params, range(3))
        optimizer.add_param_group({"params": params[4:], "lr": 0.1})
        train(optimizer, params, range(3, 6))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_learning_rate_schedulers(lr):
    ours, theirs = parameters(), parameters()
    for params, kind in ((ours, LAMB), (theirs, PlainLAMB)):
        optimizer = kind(params, lr=copy.copy(lr) if isinstance(lr, float) else lr.clone())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(6):
            train(optimizer, params, range(step, step + 1))
            schedule.step()
    assert_close(ours, theirs, 1e-5)


def test_complex_parameters_and_their_norm():
    ours = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
    pairs = nn.Parameter(torch.view_as_real(ours.data).clone())
    a, b = LAMB([ours], lr=1e-2, max_grad_norm=0.5), LAMB([pairs], lr=1e-2, max_grad_norm=0.5)
    ours.grad = torch.randn(6, 5, dtype=torch.complex64)
    pairs.grad = torch.view_as_real(ours.grad).clone()
    with one_warning("torch.complex64"):
        a.step()
    b.step()
    torch.testing.assert_close(torch.view_as_real(ours.data), pairs.data, rtol=1e-5, atol=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"LAMB: lr is -1.0 \(float\); expected a number >= 0"),
        ({"eps": -1.0}, "LAMB: eps is"),
        ({"weight_decay": float("nan")}, "LAMB: weight_decay is"),
        ({"betas": (1.0, 0.9)}, r"LAMB: betas\[0\] is 1.0 \(float\); expected a number in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "LAMB: max_grad_norm is .*; expected a number > 0, or None"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LAMB([nn.Parameter(torch.ones(1))], **options)


def test_a_resized_parameter_is_refused_and_nothing_moves():
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6))]
    optimizer = LAMB(params)
    train(optimizer, params, range(1))
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(5)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        ValueError, match=r"lamb_: exp_avgs\[1\] is float32 \(5,\) on cpu; expected float32 \(6,\)"
    ):
        optimizer.step()
    assert_same_bits(params, [nn.Parameter(p) for p in before])
    assert optimizer.state[params[0]]["step"] == 1
