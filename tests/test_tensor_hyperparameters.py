"""Hyperparameters that are tensors, and steps that wait for no GPU: the same numbers, wherever they lie.

The arithmetic that stays on a GPU is plain torch, so it is compared here on the CPU; test_cuda_*.py run it there.
"""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
from kernel_cases import AdamWCase, LambCase
from superfine.optim import LAMB, Adam, AdamW
from support import assert_same_bits_in_lists
from test_optim_adamw import assert_same_bits, parameters, set_gradients, train

from superfine_kernels import adamw_, lamb_
from superfine_kernels._moments import TENSOR_HYPERPARAMETERS

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

SIZES = (1, 37, 5000)
HYPER = {"lr": 0.01, "beta1": 0.75, "beta2": 0.875, "weight_decay": 0.25, "gradient_scale": -0.5}
OPS = {"adamw": (AdamWCase, adamw_), "lamb": (LambCase, lamb_)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", OPS)
def test_tensors_are_the_numbers_they_hold(op, backend, dtype):
    case_type, step = OPS[op]
    numbers = case_type.random(SIZES)
    tensors = numbers.to("cpu")
    exact = {name: torch.tensor(value, dtype=dtype).item() for name, value in HYPER.items()}
    step(*numbers.lists(), **exact, backend=backend)
    as_tensors = {name: torch.tensor([HYPER[name]], dtype=dtype) for name in TENSOR_HYPERPARAMETERS}
    step(*tensors.lists(), **{**HYPER, **as_tensors}, backend=backend)
    assert_same_bits_in_lists(tensors.lists(), numbers.lists())


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_scale_that_is_not_finite_takes_no_step(op, backend, zero_grads, scale):
    case_type, step = OPS[op]
    case = case_type.random(SIZES)
    expected = case.to("cpu")
    if zero_grads:
        torch._foreach_zero_(expected.grads)
    step(
        *case.lists(),
        **{**HYPER, "gradient_scale": torch.tensor(scale)},
        zero_grads=zero_grads,
        backend=backend,
    )
    assert_same_bits_in_lists(case.lists(), expected.lists())


@pytest.mark.parametrize("name", TENSOR_HYPERPARAMETERS)
@pytest.mark.parametrize(
    ("bad", "described"),
    [
        (torch.ones(2), r"float32 \(2,\) on cpu"),
        (torch.tensor(1), r"int64 \(\) on cpu"),
        (torch.tensor(0.5, dtype=torch.bfloat16), r"bfloat16 \(\) on cpu"),
    ],
)
def test_other_tensors_are_refused(name, bad, described):
    case = AdamWCase.random(SIZES)
    expected = case.to("cpu")
    message = (
        f"adamw_: {name} is {described}; expected a number, or a float32 or float64 tensor of one element"
    )
    with pytest.raises(ValueError, match=message):
        adamw_(*case.lists(), **{**HYPER, name: bad})
    assert_same_bits_in_lists(case.lists(), expected.lists())


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", math.nan), ("beta1", 1.0), ("beta2", -0.5)])
def test_tensors_out_of_range_are_refused_where_they_can_be_read_for_nothing(name, value):
    case = AdamWCase.random(SIZES)
    with pytest.raises(ValueError, match=f"adamw_: {name} is {value}"):
        adamw_(*case.lists(), **{**HYPER, name: torch.tensor(value)})


@pytest.mark.parametrize("kind", [AdamW, Adam, LAMB])
def test_an_optimizer_takes_tensors_of_lr_and_betas(kind):
    ours, theirs = parameters(), parameters()
    # 0.5 and its like are exact in float32 and in double.
    a = kind(ours, lr=torch.tensor(0.0625), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    b = kind(theirs, lr=0.0625, betas=(0.5, 0.75))
    train(a, ours, range(2))
    train(b, theirs, range(2))
    a.param_groups[0]["lr"].fill_(0.5)
    b.param_groups[0]["lr"] = 0.5
    train(a, ours, range(2, 4))
    train(b, theirs, range(2, 4))
    assert_same_bits(ours, theirs)


# --- without waiting --------------------


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
@pytest.mark.parametrize("limit", [None, "option", "call"])
def test_the_scale_that_stays_on_a_gpu_is_the_one_that_is_waited_for(limit, loss_scale, found_inf, bad):
    waiting, other = (AdamW(parameters(), max_grad_norm=0.5 if limit == "option" else None) for _ in range(2))
    scales = []
    for optimizer in (waiting, other):
        params = optimizer.param_groups[0]["params"]
        set_gradients(params, 0)
        if bad is not None:
            params[1].grad.flatten()[0] = bad
        if limit == "call":
            optimizer.clip_grad_norm_(0.25)
        if loss_scale is not None:
            optimizer.grad_scale = torch.tensor(loss_scale)
        if found_inf is not None:
            optimizer.found_inf = torch.tensor([found_inf])
        by = optimizer._gradient_scale if optimizer is waiting else optimizer._gradient_scale_without_waiting
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("superfine.optim._in_pass.warn_once", lambda message: None)
            scales.append(by())
    ours, theirs = scales
    if ours is None:
        assert not math.isfinite(theirs)
    else:
        assert float(theirs) == pytest.approx(ours, rel=1e-6)
    assert waiting.skipped_steps == other.skipped_steps == (ours is None)
    if not found_inf and limit is not None:  # a step that is skipped anyway is not measured
        assert other.grad_norm == pytest.approx(waiting.grad_norm, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_steps_with_scales_that_stay_tensors_are_those_with_numbers(kind, monkeypatch):
    ours, theirs = parameters(), parameters()
    a, b = (kind(params, lr=0.1, max_grad_norm=0.5, zero_grads=True) for params in (ours, theirs))
    monkeypatch.setattr(a, "_gradient_scale", a._gradient_scale_without_waiting)
    monkeypatch.setattr("superfine.optim._in_pass.warn_once", lambda message: None)
    for step in range(6):
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, step)
            if step == 3:
                params[0].grad.fill_(math.nan)
            optimizer.step()
            assert not any(param.grad.any() for param in params)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        assert a.state[p]["step"] == b.state[q]["step"] == 5
    assert a.skipped_steps == b.skipped_steps == 1
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    assert copy.deepcopy(a).skipped_steps == 1


# --- counts of steps --------------------


def _loaded(optimizer: AdamW) -> AdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = type(optimizer)(
        [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("copied", [lambda o: o, copy.deepcopy, _loaded])
@pytest.mark.parametrize("kind", [partial(AdamW), partial(LAMB)])
def test_counts_of_steps_are_views_of_one_buffer(kind, copied):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, range(2))
    optimizer = copied(optimizer)
    steps = [optimizer.state[p]["step"] for p in optimizer.param_groups[0]["params"]]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == 1
    assert [step.data_ptr() - steps[0].data_ptr() for step in steps] == [4 * i for i in range(len(steps))]
    train(optimizer, optimizer.param_groups[0]["params"], range(2, 3))
    assert all(step == 3 and step.shape == () for step in steps)


def test_state_of_something_else_than_a_parameter_is_left_alone():
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"]["of the loop"] = {"step": 3}
    optimizer.load_state_dict(saved)
    assert optimizer.state["of the loop"] == {"step": 3}
    train(optimizer, params, range(1, 2))
