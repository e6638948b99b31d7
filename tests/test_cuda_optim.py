"""Optimizers on a GPU: a step waits for nothing, a CUDA graph captures it, and it is the CPU's step."""

from __future__ import annotations

import math

import pytest
import torch
from superfine.optim import LAMB, Adam, AdamW
from test_cuda_step import captured, nothing_waits
from torch import nn

pytestmark = pytest.mark.gpu

SIZES = [(3,), (64, 33), (5000,)]
KINDS = [AdamW, Adam, LAMB]


@pytest.fixture(autouse=True)
def _needs_the_cuda_kernels(cuda_module) -> None:
    """Triton's steps are not captured."""


def pair(kind: type, **options) -> tuple[list[nn.Parameter], list[nn.Parameter], torch.optim.Optimizer, ...]:
    """Equal parameters on the GPU and on the CPU, and an optimizer of each."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=generator) for size in SIZES]
    ours = [nn.Parameter(value.cuda()) for value in values]
    theirs = [nn.Parameter(value.clone()) for value in values]
    more = {} if kind is LAMB else {"capturable": True}
    return ours, theirs, kind(ours, **options, **more), kind(theirs, **options)


def set_gradients(step: int, *lists: list[nn.Parameter], bad: bool = False) -> None:
    """In place where there are gradients, as a graph expects them."""
    generator = torch.Generator().manual_seed(step)
    for i, size in enumerate(SIZES):
        value = torch.randn(size, generator=generator)
        if bad and i == 1:
            value[0, 0] = math.nan
        for params in lists:
            p = params[i]
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.copy_(value)


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # Norms add up in another order than on the CPU.
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradients are not finite")
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_steps_wait_for_nothing_and_skip_what_is_not_finite(kind):
    ours, theirs, a, b = pair(kind, lr=0.01, max_grad_norm=0.5, zero_grads=True)
    for step in range(6):
        set_gradients(step, ours, theirs, bad=step == 3)
        if step == 0:
            a.step()  # makes state
        else:
            with nothing_waits():
                a.step()
        b.step()
        assert not any(p.grad.any() for p in ours)
    assert_close(ours, theirs)
    assert a.skipped_steps == b.skipped_steps == 1
    assert [float(a.state[p]["step"]) for p in ours] == [5.0] * 3
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradients are not finite")
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_goes_on_as_the_cpu_does(kind):
    ours, theirs, a, b = pair(kind, lr=torch.tensor(0.01), max_grad_norm=0.5)
    a.param_groups[0]["lr"] = torch.tensor(0.01, device="cuda")
    b.param_groups[0]["lr"] = 0.01
    for step in range(2):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    state = [t for p in ours for t in (p.detach(), *a.state[p].values())]
    before = [t.clone() for t in state]
    graph = captured(a.step)  # runs nothing
    assert all(torch.equal(t, old) for t, old in zip(state, before, strict=True))
    for step in range(2, 8):
        set_gradients(step, ours, theirs, bad=step == 5)
        a.param_groups[0]["lr"].fill_(0.01 / step)
        b.param_groups[0]["lr"] = torch.tensor(0.01 / step).item()
        graph.replay()
        b.step()
    assert_close(ours, theirs)
    assert a.skipped_steps == b.skipped_steps == 1
    assert [float(a.state[p]["step"]) for p in ours] == [7.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_is_not_waited_for(kind):
    ours, theirs, a, b = pair(kind, lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=1000)
    for step in range(4):
        set_gradients(step, ours, theirs)
        for p in ours:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            ours[0].grad[0] = math.inf
        scaler.scale(torch.zeros((), device="cuda"))  # makes the scale
        if step == 0:
            scaler.step(a)
        else:
            with nothing_waits():
                scaler.step(a)
        scaler.update()
        if step == 2:
            scaler.update(256.0)
        else:
            b.step()
    assert_close(ours, theirs)
    assert a.skipped_steps == 1
    assert [float(a.state[p]["step"]) for p in ours] == [3.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_move_between_devices_with_their_counts(kind):
    ours, theirs, a, b = pair(kind, lr=0.01)
    set_gradients(0, ours, theirs)
    a.step()
    b.load_state_dict(a.state_dict())
    assert {b.state[p]["step"].device.type for p in theirs} == {"cpu"}
    a.load_state_dict(b.state_dict())
    assert {a.state[p]["step"].device.type for p in ours} == {"cuda"}
    set_gradients(1, ours)
    a.step()
    assert [float(a.state[p]["step"]) for p in ours] == [2.0] * 3
