"""Gradient release: which backward passes it takes and which it refuses, and how it begins and ends."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from in_backward_models import assert_same, counts, failing, gradients, inputs, loss_of, twins, values
from small_models import mlp
from superfine.optim import AdamW, in_backward
from torch import nn
from torch.utils.checkpoint import checkpoint


class WithCheckpoints(nn.Module):
    """Three blocks, each in a checkpoint; with `shared` one block thrice."""

    def __init__(self, use_reentrant, shared):
        super().__init__()
        self.use_reentrant = use_reentrant
        first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([first, *(first if shared else copy.deepcopy(first) for _ in range(2))])

    def forward(self, x):
        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


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


def test_a_gradient_in_parts_is_refused():
    weight = nn.Parameter(torch.ones(2))
    release = in_backward({"w": weight}.items())
    first = weight * 2
    weight.data = weight.data.double()  # from here on torch accumulates anew
    loss = (first.double() + (weight * 3).tanh()).sum()
    with pytest.raises(RuntimeError, match="the gradient of w comes in parts"):
        loss.backward()
    assert counts(release.optimizer) == [1]


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
