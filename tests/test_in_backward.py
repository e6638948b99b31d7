"""Gradient release: what backward steps is what step() would have, and no gradients stay."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import re
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import superfine
import torch
from small_models import TOKENS, bert, llama, mlp
from superfine.optim import LAMB, Adam, AdamW, in_backward
from support import one_warning, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

OPTIMIZERS = [AdamW, Adam, LAMB]
ROOT = Path(__file__).parents[1]


def inputs(seed, dtype=torch.float32, rows=2):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(model, seed, scale=1.0):
    x = inputs(seed, next(model.parameters()).dtype)
    return scale * model(x).float().square().mean()


def twins(dtype=torch.float32):
    model = mlp().to(dtype)
    return model, copy.deepcopy(model)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def counts(optimizer):
    return [
        int(optimizer.state[param]["step"]) for group in optimizer.param_groups for param in group["params"]
    ]


def assert_same(model, other, optimizer=None, reference=None):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        if optimizer is not None:
            a, b = optimizer.state[p], reference.state[q]
            assert a.keys() == b.keys()
            assert all(same_bits(a[name], b[name]) for name in a)


class WithCheckpoints(nn.Module):
    """Three uses of blocks, in checkpoints; `shared` uses one block thrice."""

    def __init__(self, use_reentrant, shared):
        super().__init__()
        self.use_reentrant = use_reentrant
        first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([first, *(first if shared else copy.deepcopy(first) for _ in range(2))])

    def forward(self, x):
        x = x.requires_grad_()
        for block in self.blocks:
            x = (
                block(x)
                if self.use_reentrant is None
                else checkpoint(block, x, use_reentrant=self.use_reentrant)
            )
        return x


def poisoned(model, bad=math.nan):
    """A loss after which only the first layer's gradients are not finite."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, bad)

    return model[1:](Poison.apply(model[0](inputs(0)))).square().mean()


def failing(model):
    """A loss whose backward fails once the last layer has been stepped."""

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    return model[4](Fail.apply(model[:4](inputs(0)))).sum()


# --- equal bits --------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "8bit"}),
        (torch.float32, {"state_dtype": "bf16"}),
        (torch.float32, {"anchored": True, "decouple_lr": True, "maximize": True}),
        (torch.float64, {}),
        (torch.bfloat16, {"master_weights": "split"}),
        (torch.bfloat16, {"master_weights": "split", "state_dtype": "8bit"}),
        (torch.bfloat16, {"master_weights": "kahan"}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 7}),
        (torch.float16, {"state_dtype": "fp32"}),
        (torch.float32, {"zero_grads": True}),
    ],
    ids=str,
)
def test_the_bits_are_those_of_backward_and_step(kind, dtype, options):
    model, other = twins(dtype)
    release = in_backward(model, kind, lr=0.01, **options)
    reference = kind(other.parameters(), lr=0.01, **options)
    for seed in range(4):
        loss_of(model, seed).backward()
        assert gradients(model) == []
        loss_of(other, seed).backward()
        reference.step()
        reference.zero_grad()
    assert_same(model, other, release.optimizer, reference)
    assert counts(release.optimizer) == [4] * 6


def test_amsgrad_and_groups_of_their_own_options():
    model, other = twins()

    def groups(m):
        return [
            {"params": [p for p in m.parameters() if p.ndim == 2], "weight_decay": 0.3, "amsgrad": True},
            {"params": [p for p in m.parameters() if p.ndim == 1], "lr": 0.1},
        ]

    release, reference = in_backward(groups(model), lr=0.01), AdamW(groups(other), lr=0.01)
    for seed in range(3):
        loss_of(model, seed).backward()
        loss_of(other, seed).backward()
        reference.step()
        reference.zero_grad()
    assert_same(model, other, release.optimizer, reference)


@pytest.mark.parametrize("make", [bert, lambda: llama(tied=True)], ids=["bert", "tied llama"])
def test_models_and_tied_weights(make):
    model = make().eval()
    other = copy.deepcopy(model)
    release, reference = in_backward(model, lr=0.01), AdamW(other.parameters(), lr=0.01)
    for _ in range(2):
        model(TOKENS).logits.square().mean().backward()
        other(TOKENS).logits.square().mean().backward()
        reference.step()
        reference.zero_grad()
    assert gradients(model) == []
    assert_same(model, other, release.optimizer, reference)


def test_only_one_gradient_lives_at_a_time():
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    peaks = []

    def note(_):
        peaks.append(sum(grad.nbytes for grad in gradients(model)))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(note)  # runs before ours
    release = in_backward(model)
    model(torch.ones(2, 32)).sum().backward()
    assert max(peaks) <= 32 * 32 * 4 + 32 * 4
    assert gradients(model) == []
    release.remove()
    peaks.clear()
    model(torch.ones(2, 32)).sum().backward()
    assert max(peaks) == 20 * (32 * 32 * 4 + 32 * 4)


# --- what is given --------------------


@pytest.mark.parametrize(
    "given",
    [
        lambda m: m,
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": [p]} for p in m.parameters()],
        lambda m: [{"params": list(m.named_parameters())}],
    ],
    ids=["module", "parameters", "named", "groups", "named groups"],
)
@pytest.mark.parametrize("ready_made", [False, True])
def test_what_may_be_given(given, ready_made):
    model, other = twins()
    release = (
        in_backward(given(model), AdamW(model.parameters(), lr=0.1))
        if ready_made
        else in_backward(given(model), lr=0.1)
    )
    reference = AdamW(other.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    loss_of(other, 0).backward()
    reference.step()
    assert_same(model, other)
    assert isinstance(release.optimizer, AdamW)


def test_wrong_arguments_are_refused():
    model = mlp()
    optimizer = AdamW(model[0].parameters())
    with pytest.raises(TypeError, match=r"in_backward: optimizer is <class 'torch.optim.sgd.SGD'>"):
        in_backward(model, torch.optim.SGD)
    with pytest.raises(TypeError, match="no options beside a ready-made optimizer"):
        in_backward(model, AdamW(model.parameters()), lr=0.1)
    with pytest.raises(ValueError, match=r"parameter '2\.weight' is not in the optimizer"):
        in_backward(model, optimizer)
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        in_backward(model, AdamW, learning_rate=0.1)
    for wrong in (0, 1.5, "two"):
        with pytest.raises(ValueError, match="accumulation is"):
            in_backward(model, accumulation=wrong)
    with pytest.raises(ValueError, match="clip is 'norm'"):
        in_backward(model, clip="norm", max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm is None"):
        in_backward(model, clip="previous")
    with pytest.raises(
        ValueError, match=r"clip is None .* expected 'previous' or 'measured' beside max_grad_norm"
    ):
        in_backward(model, max_grad_norm=1.0)
    for reason in ("capturable", "differentiable"):
        params = [torch.ones(2, requires_grad=True)]
        with pytest.raises(ValueError, match=f"{reason} of group 0 is True"):
            in_backward(params, AdamW(params, **{reason: True}))
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    model[2].requires_grad_(False)
    model[4].requires_grad_(False)
    in_backward(model, optimizer)  # frozen ones need not be in it


def test_two_releases_of_one_model_or_optimizer_are_refused():
    model = mlp()
    release = in_backward(model)
    with pytest.raises(ValueError, match=r"0\.weight is released in backward already"):
        in_backward(model)
    with pytest.raises(ValueError, match="the optimizer is released in backward already"):
        in_backward(model, release.optimizer)
    release.remove()
    release = in_backward(model, release.optimizer)


def test_hooks_on_step_which_would_not_be_called_are_refused():
    model = mlp()
    plan = superfine.select(model, "0.weight")
    with pytest.raises(ValueError, match="first_step_check=False"):
        in_backward(model, plan.optimizer(lr=0.1))
    _kept = in_backward(model, plan.optimizer(lr=0.1, first_step_check=False))
    loss_of(model, 0).backward()
    assert gradients(model) == []


# --- parameters that come and go --------------------


def test_frozen_parameters_are_left_alone_and_released_once_unfrozen():
    model, other = twins()
    for m in (model, other):
        m[0].requires_grad_(False)
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    for turn in range(3):
        loss_of(model, turn).backward()
        loss_of(other, turn).backward()
        reference.step()
        reference.zero_grad()
        assert gradients(model) == []
        for m in (model, other):  # the first layer alone, then all
            m.requires_grad_(turn == 1)
            m[0].requires_grad_(True)
    assert_same(model, other, release.optimizer, reference)
    assert counts(release.optimizer) == [2, 2, 2, 2, 2, 2]


def test_added_parameters_are_released():
    model, other = twins()
    head, other_head = nn.Linear(2, 2), nn.Linear(2, 2)
    other_head.load_state_dict(head.state_dict())
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    release.optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.01})
    reference.add_param_group({"params": list(other_head.parameters()), "lr": 0.01})
    head(model(inputs(0))).sum().backward()
    other_head(other(inputs(0))).sum().backward()
    reference.step()
    assert gradients(head) == []
    assert_same(model, other)
    assert_same(head, other_head)


def test_integers_are_no_parameters_to_release():
    codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    weight = nn.Parameter(torch.ones(3))
    _kept = in_backward([codes, weight], lr=0.1)
    (codes * weight + weight).sum().backward()
    assert weight.grad is None
    assert not torch.equal(weight, torch.ones(3))


def test_a_parameter_without_gradient_is_skipped():
    model, other = twins()
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    for turn in range(3):
        for m in (model, other):
            (loss_of(m, turn) if turn != 1 else m[0](inputs(1)).sum()).backward()
        reference.step()
        reference.zero_grad()
    assert_same(model, other, release.optimizer, reference)
    assert counts(release.optimizer) == [3, 3, 2, 2, 2, 2]


# --- accumulation --------------------


def windows(model, step, size, partial=()):
    """Backward of `size` micro-batches and a step, twice; `partial` ones reach the first layer only."""
    for i in range(2 * size):
        (loss_of(model, i) if i not in partial else model[0](inputs(i)).square().mean()).backward()
        if i % size == size - 1:
            step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "partial", [(), (1, 5), (2, 3)], ids=str
)  # none; amid a window; last and first of one
def test_accumulation_is_that_of_a_loop_that_steps_every_few_passes(kind, partial):
    model, other = twins()
    release, reference = in_backward(model, kind, accumulation=3, lr=0.01), kind(other.parameters(), lr=0.01)
    windows(model, lambda: None, 3, partial)
    windows(other, lambda: (reference.step(), reference.zero_grad()), 3, partial)
    assert gradients(model) == []
    assert_same(model, other, release.optimizer, reference)
    assert counts(release.optimizer) == [2] * 6


def test_gradients_stay_between_the_passes_that_make_one_step():
    model = mlp()
    before = values(model)
    _kept = in_backward(model, accumulation=2)
    loss_of(model, 0).backward()
    assert len(gradients(model)) == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    loss_of(model, 1).backward()
    assert gradients(model) == []


def test_step_takes_an_incomplete_window_and_zero_grad_starts_anew():
    model, other = twins()
    release = in_backward(model, accumulation=3, lr=0.1, max_grad_norm=0.01, clip="previous")
    reference = AdamW(other.parameters(), lr=0.1, max_grad_norm=0.01)
    for m in (model, other):
        loss_of(m, 0).backward()
        loss_of(m, 1).backward()
    release.optimizer.step()
    reference.step()
    reference.zero_grad()
    assert gradients(model) == []
    assert_same(model, other, release.optimizer, reference)  # clipped by the norm itself, as it is known
    assert release.optimizer.grad_norm == reference.grad_norm
    loss_of(model, 2).backward()
    release.optimizer.zero_grad()
    before = values(model)
    for seed in (3, 4):
        loss_of(model, seed).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    loss_of(model, 5).backward()
    assert gradients(model) == []
    assert counts(release.optimizer) == [2] * 6


# --- loops that do not know --------------------


def test_a_loop_that_calls_step_and_zero_grad_and_a_scheduler_goes_on_as_before():
    model, other = twins()
    pairs = []
    for m, optimizer in (
        (model, in_backward(model, lr=0.1).optimizer),
        (other, AdamW(other.parameters(), lr=0.1)),
    ):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for seed in range(3):
            loss_of(m, seed).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        pairs.append(optimizer)
    assert_same(model, other, *pairs)
    assert pairs[0].param_groups[0]["lr"] == pairs[1].param_groups[0]["lr"]


def test_schedulers_without_step_give_no_warning():
    model, other = twins()
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (release.optimizer, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            loss_of(model, seed).backward()
            schedulers[0].step()
    for seed in range(3):
        loss_of(other, seed).backward()
        reference.step()
        reference.zero_grad()
        schedulers[1].step()
    assert_same(model, other, release.optimizer, reference)


def test_a_closure_computes_gradients_that_backward_has_stepped():
    model, other = twins()
    optimizers = in_backward(model, lr=0.1).optimizer, AdamW(other.parameters(), lr=0.1)
    for m, optimizer in zip((model, other), optimizers, strict=True):

        def closure(m=m, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(m, 0)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert_same(model, other)


def test_checkpoints_are_those_of_the_optimizer(tmp_path):
    model, other = twins()
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.5)
    loss_of(model, 0).backward()
    torch.save([model.state_dict(), release.optimizer.state_dict()], tmp_path / "both.pt")
    weights, state = torch.load(tmp_path / "both.pt")
    other.load_state_dict(weights)
    reference.load_state_dict(state)
    release.optimizer.load_state_dict(copy.deepcopy(state))  # replaces the groups
    release.optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.2
    loss_of(model, 1).backward()
    loss_of(other, 1).backward()
    reference.step()
    assert_same(model, other, release.optimizer, reference)
    torch.optim.AdamW(other.parameters()).load_state_dict(release.optimizer.state_dict())


def test_clipping_apart_is_refused():
    model = mlp()
    release = in_backward(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="released in backward"):
        release.optimizer.clip_grad_norm_(1.0)


def test_a_grad_scaler_is_refused():
    model = mlp()
    release = in_backward(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="a GradScaler steps the optimizer"):
        scaler.step(release.optimizer)


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


# --- what backward may be --------------------


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_without_reentry(shared):
    model = WithCheckpoints(False, shared)
    other = copy.deepcopy(model)
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    for seed in range(3):
        model(inputs(seed)).sum().backward()
        other(inputs(seed)).sum().backward()
        reference.step()
        reference.zero_grad()
    assert_same(model, other, release.optimizer, reference)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("around", [False, True])  # whether backward reaches a parameter outside before
def test_reentrant_checkpointing_is_refused(shared, around):
    model = WithCheckpoints(True, shared)
    head = nn.Linear(4, 1)
    _kept = in_backward([*model.parameters(), *(head.parameters() if around else ())])
    before = values(model)
    with pytest.raises(RuntimeError, match="expected use_reentrant=False"):
        head(model(inputs(0))).sum().backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_backward_within_a_gradient_hook_is_refused():
    weight, inner = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    _kept = in_backward([weight, inner])
    y, other = weight * 2, inner.sum()
    y.register_hook(lambda grad: other.backward())
    with pytest.raises(RuntimeError, match="backward runs within another backward"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    model = mlp()
    before = values(model)
    _kept = in_backward(model)
    loss = loss_of(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a reference cycle
        with pytest.raises(RuntimeError, match="create_graph=True"):
            loss.backward(create_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    torch.autograd.grad(loss_of(model, 0), list(model.parameters()), create_graph=True)  # steps nothing
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_second_backward_through_weights_that_moved_is_torchs_error():
    model = mlp()
    _kept = in_backward(model)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_through_weights_that_nothing_reads_steps_again():
    weight = nn.Parameter(torch.ones(2))
    release = in_backward([weight])
    loss = (weight * 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert counts(release.optimizer) == [2]


def test_a_weight_that_backward_still_reads_is_torchs_error_not_a_wrong_gradient():
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    _kept = in_backward([weight, other])
    y = weight.detach() * other  # this gradient needs the weight, but is not part of the weight's
    z = y.tanh().tanh().tanh()
    loss = z.sum() + weight.sum()  # the weight's gradient is there at once
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_exception_amid_backward_leaves_the_next_one_as_it_was():
    model, other = twins()
    release, reference = in_backward(model, lr=0.1), AdamW(other.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError):
        failing(model).backward()
    with pytest.raises(ZeroDivisionError):
        failing(other).backward()
    reference.step()
    reference.zero_grad()
    loss_of(model, 1).backward()
    loss_of(other, 1).backward()
    reference.step()
    assert_same(model, other, release.optimizer, reference)
    assert counts(release.optimizer) == [1, 1, 1, 1, 2, 2]


def test_a_pass_that_an_exception_cut_off_does_not_count():
    model = mlp()
    release = in_backward(model, accumulation=2, lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(ZeroDivisionError):
        failing(model).backward()  # the last pass of a window has stepped the last layer
    loss_of(model, 1).backward()
    assert gradients(model) == []
    assert counts(release.optimizer) == [1, 1, 1, 1, 2, 2]
    loss_of(model, 2).backward()
    assert len(gradients(model)) == 6


def test_a_cut_off_pass_takes_its_measurement_with_it():
    model = mlp()
    release = in_backward(model, lr=0.1, max_grad_norm=1.0, clip="measured")
    with release.measure():
        loss_of(model, 0).backward()
    with pytest.raises(ZeroDivisionError):
        failing(model).backward()
    with pytest.raises(RuntimeError, match="nothing has been measured"):
        loss_of(model, 0).backward()


def test_backward_in_another_thread():
    model, other = twins()
    _kept = in_backward(model, lr=0.1)
    reference = AdamW(other.parameters(), lr=0.1)
    thread = threading.Thread(target=lambda: loss_of(model, 0).backward())
    thread.start()
    thread.join()
    loss_of(other, 0).backward()
    reference.step()
    assert_same(model, other)


def test_more_than_one_process_is_refused(monkeypatch):
    model = mlp()
    release = in_backward(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="the number of processes is 2"):
        loss_of(model, 0).backward()
    release.remove()
    with pytest.raises(ValueError, match="the number of processes is 2"):
        in_backward(model)


def test_distributed_modules_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(mlp()))
        with pytest.raises(ValueError, match="module '0' is DistributedDataParallel"):
            in_backward(model)
    finally:
        torch.distributed.destroy_process_group()


# --- life --------------------


def test_remove_gives_the_optimizer_back_to_step():
    model, other = twins()
    reference = AdamW(other.parameters(), lr=0.1)
    with in_backward(model, lr=0.1) as release:
        loss_of(model, 0).backward()
    release.remove()  # again is harmless
    optimizer = release.optimizer
    assert optimizer._release is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    loss_of(model, 1).backward()
    assert len(gradients(model)) == 6
    optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    for seed in range(2):
        reference.zero_grad()
        loss_of(other, seed).backward()
        reference.step()
    assert_same(model, other, optimizer, reference)


def test_accumulated_gradients_survive_remove():
    model = mlp()
    release = in_backward(model, accumulation=2)
    loss_of(model, 0).backward()
    release.remove()
    assert len(gradients(model)) == 6


def test_copies_of_model_and_optimizer_are_free_and_a_release_has_none():
    model = mlp()
    release = in_backward(model, lr=0.1)
    loss_of(model, 0).backward()
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin = copied(model)
        loss_of(twin, 0).backward()
        assert len(gradients(twin)) == 6
        both = copied([model, release.optimizer])
        assert both[1]._release is None
        loss_of(both[0], 1).backward()
        assert len(gradients(both[0])) == 6
        both[1].step()
        in_backward(*both)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(release)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(release)


def test_nothing_keeps_a_model_alive_that_nobody_uses():
    model = mlp()
    release = in_backward(model)
    loss_of(model, 0).backward()
    gone = [weakref.ref(model[0].weight), weakref.ref(release)]
    del model, release
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_the_optimizer_keeps_its_release_and_one_that_is_gone_is_an_error():
    model = mlp()
    optimizer = in_backward(model).optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert gradients(model) == []
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="has been deleted; expected it, or its optimizer, to be kept"):
        loss_of(model, 0).backward()
    model.zero_grad()
    release = in_backward(model)
    loss_of(model, 0).backward()
    assert counts(release.optimizer) == [1] * 6


def test_moving_and_converting_a_model_keeps_its_release():
    model = mlp()
    _kept = in_backward(model)
    model.double()
    loss_of(model, 0).backward()
    assert gradients(model) == []


# --- the docs --------------------


def test_the_example_in_the_docs_runs():
    text = (ROOT / "docs" / "drop_in.md").read_text()
    section = re.search(r"## `superfine.optim.in_backward`\n(.*?)\n## ", text, re.DOTALL)
    assert section is not None
    blocks = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        model = mlp()
        names = {
            "torch": torch,
            "model": model,
            "in_backward": in_backward,
            "batches": [inputs(seed) for seed in range(4)],
            "loss_of": lambda batch, model=model: model(batch).square().mean(),
        }
        exec(block, names)
        assert gradients(model) == []
        assert min(counts(names["release"].optimizer)) > 0
