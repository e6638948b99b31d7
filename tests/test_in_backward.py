"""Gradient release: what backward steps is what step() would have, and no gradients stay."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import superfine
import torch
from in_backward_models import OPTIMIZERS, assert_same, counts, gradients, inputs, loss_of, twins, values
from small_models import TOKENS, bert, llama, mlp
from superfine.optim import AdamW, in_backward
from torch import nn

ROOT = Path(__file__).parents[1]

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
    params = [torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match="differentiable of group 0 is True"):
        in_backward(params, AdamW(params, differentiable=True))
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
    assert release.optimizer.grad_norm == release.previous_norm == reference.grad_norm
    release.optimizer.step()  # nothing is there to step, or to measure
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
