"""Gradient release: clipping by the norms that can be known, and gradients that are not finite."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from in_backward_models import (
    OPTIMIZERS,
    assert_same,
    counts,
    failing,
    gradients,
    loss_of,
    poisoned,
    twins,
    values,
)
from small_models import mlp
from superfine.optim import in_backward
from support import one_warning
from torch import nn

# --- clipping --------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_clipping_by_the_previous_norm(kind):
    model, other = twins()
    release = in_backward(model, kind, lr=0.1, max_grad_norm=0.05, clip="previous")
    reference = kind(other.parameters(), lr=0.1)
    previous = 0.0
    for seed in range(4):
        scale = 100.0 if seed == 2 else 1.0  # a jump, clipped by each parameter's own norm
        loss_of(model, seed, scale).backward()
        loss_of(other, seed, scale).backward()
        norm = nn.utils.get_total_norm(gradients(other)).item()
        for param in other.parameters():
            param.grad *= min(1.0, 0.05 / (max(previous, param.grad.norm().item()) + 1e-6))
            assert param.grad.norm() <= 0.05
        reference.step()
        reference.zero_grad()
        assert release.optimizer.grad_norm == release.previous_norm == pytest.approx(norm, rel=1e-5)
        previous = norm
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_previous_norm_that_is_put_back_resumes_with_the_same_bits():
    model, other = twins()
    releases = [in_backward(m, lr=0.1, max_grad_norm=0.05, clip="previous") for m in (model, other)]
    for m in (model, other):
        loss_of(m, 0).backward()
    resumed = copy.deepcopy(other)
    third = in_backward(resumed, lr=0.1, max_grad_norm=0.05, clip="previous")
    third.optimizer.load_state_dict(releases[1].optimizer.state_dict())
    third.previous_norm = releases[1].previous_norm
    loss_of(model, 1).backward()
    loss_of(resumed, 1).backward()
    assert_same(model, resumed)


def test_the_norm_does_not_depend_on_the_order_of_the_parameters():
    params = [nn.Parameter(torch.randn(n)) for n in (3, 1000, 70_000, 5, 33, 7)]
    weights = [torch.randn(p.shape) * 10.0**i for i, p in enumerate(params)]
    order = list(range(len(params)))
    found, seen = set(), set()
    release = in_backward(params, lr=0.0, max_grad_norm=1.0, clip="previous")
    for turn in range(6):
        loss = torch.zeros(())
        for i in order[turn:] + order[:turn]:
            loss = loss + (params[i] * weights[i]).sum()
        ran: list[int] = []

        def note(i, _, ran=ran):
            ran.append(i)

        handles = [
            p.register_post_accumulate_grad_hook(functools.partial(note, i)) for i, p in enumerate(params)
        ]
        loss.backward()
        for handle in handles:
            handle.remove()
        seen.add(tuple(ran))
        found.add(release.previous_norm)
    assert len(seen) > 1
    assert len(found) == 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("again", ["retain_graph", "second forward"])
def test_clipping_by_a_measured_norm_is_clip_grad_norm(kind, accumulation, again):
    model, other = twins()
    release = in_backward(model, kind, accumulation=accumulation, lr=0.1, max_grad_norm=0.05, clip="measured")
    reference = kind(other.parameters(), lr=0.1, max_grad_norm=0.05)
    for step in range(3):
        before = values(model)
        seeds = [step * accumulation + i for i in range(accumulation)]
        losses = [loss_of(model, seed) for seed in seeds]
        with release.measure():
            for loss in losses:
                loss.backward(retain_graph=again == "retain_graph")
        assert gradients(model) == []
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        for loss, seed in zip(losses, seeds, strict=True):
            (loss if again == "retain_graph" else loss_of(model, seed)).backward()
            loss_of(other, seed).backward()
        reference.step()
        reference.zero_grad()
        assert release.optimizer.grad_norm == pytest.approx(reference.grad_norm, rel=1e-12)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert counts(release.optimizer) == [3] * 6


def test_a_measurement_counts_for_one_step():
    model = mlp()
    release = in_backward(model, lr=0.1, max_grad_norm=0.05, clip="measured")
    before = values(model)
    with pytest.raises(RuntimeError, match="nothing has been measured"):
        loss_of(model, 0).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    release.optimizer.zero_grad()
    with release.measure():
        loss_of(model, 0).backward()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="nothing has been measured"):
        loss_of(model, 0).backward()
    release.optimizer.zero_grad()
    with release.measure():
        loss_of(model, 0).backward()
    release.optimizer.zero_grad()  # takes it back
    with pytest.raises(RuntimeError, match="nothing has been measured"):
        loss_of(model, 0).backward()


def test_a_measurement_that_does_not_add_up_is_refused():
    model = mlp()
    release = in_backward(model, accumulation=2)
    with (
        pytest.raises(RuntimeError, match="measure: 1 backward passes have run; expected 2"),
        release.measure(),
    ):
        loss_of(model, 0).backward()
    assert gradients(model) == []
    with pytest.raises(RuntimeError, match="measure: 0 backward passes have run"), release.measure():
        pass
    with pytest.raises(ZeroDivisionError), release.measure():
        failing(model).backward()
    assert gradients(model) == []
    with pytest.raises(RuntimeError, match="expected none before it"), release.measure(), release.measure():
        pass
    with pytest.raises(RuntimeError, match="expected only backward"), release.measure():
        release.optimizer.step()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="measure: 1 of 2 backward passes have run"), release.measure():
        pass
    loss_of(model, 0).backward()
    assert counts(release.optimizer) == [1] * 6


def test_a_limit_set_later_needs_a_norm_to_compare_with():
    model = mlp()
    release = in_backward(model)
    release.optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="beside max_grad_norm"):
        loss_of(model, 0).backward()


# --- gradients that are not finite --------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_whose_gradient_is_not_finite_is_skipped_and_counted(bad):
    model = mlp()
    release = in_backward(model, lr=0.1, max_grad_norm=1.0, clip="previous")
    loss_of(model, 0).backward()
    norm, before = release.previous_norm, values(model)
    with one_warning("not finite"):
        poisoned(model, bad).backward()
    after = values(model)
    assert [torch.equal(p, q) for p, q in zip(after, before, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert release.skipped == 2
    assert gradients(model) == []
    assert release.previous_norm == norm
    assert not math.isfinite(release.optimizer.grad_norm)
    loss_of(model, 1).backward()
    assert counts(release.optimizer) == [2, 2, 3, 3, 3, 3]


def test_a_measured_norm_that_is_not_finite_skips_the_whole_step():
    model = mlp()
    release = in_backward(model, lr=0.1, max_grad_norm=1.0, clip="measured")
    before = values(model)
    with one_warning("not finite"):
        with release.measure():
            poisoned(model).backward()
        poisoned(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert (release.skipped, release.optimizer.skipped_steps) == (6, 1)
    assert gradients(model) == []
    with release.measure():
        loss_of(model, 0).backward()
    loss_of(model, 0).backward()
    assert counts(release.optimizer) == [1] * 6


@pytest.mark.parametrize("named", [True, False])
def test_the_parameter_whose_gradient_is_not_finite_is_named(named):
    model = mlp()
    release = in_backward(model if named else model.parameters(), lr=0.1, error_on_nonfinite=True)
    name = r"0\.(weight|bias)" if named else r"param_groups\[0\]\['params'\]\[[01]\]"
    before = values(model)
    with pytest.raises(FloatingPointError, match=f"gradient of {name} is nan"):
        poisoned(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(values(model)[:2], before[:2], strict=True))
    release.optimizer.zero_grad()
    before = values(model)
    with pytest.raises(FloatingPointError), release.measure():
        poisoned(model).backward()
    assert all(torch.equal(p, q) for p, q in zip(values(model), before, strict=True))
    loss_of(model, 0).backward()
    assert counts(release.optimizer) == [1, 1, 2, 2, 2, 2]


def test_without_norms_gradients_are_not_looked_at():
    model = mlp()
    release = in_backward(model)
    poisoned(model).backward()
    assert model[0].weight.isnan().all()
    assert release.optimizer.grad_norm is None
