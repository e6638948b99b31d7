"""What a step takes along: clipping, loss scaling, zeroing, anchors, hidden bits. AdamW and LAMB alike."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from kernel_cases import ADAMW_DTYPES, AdamWCase, LambCase
from superfine.optim import LAMB, Adam, AdamW
from support import ISAS, assert_same_bits_in_lists, one_warning, random_like, same_bits, threads
from torch import nn

from superfine_kernels import adamw_, lamb_
from superfine_kernels._storage import join, split

OPS = [
    (adamw_, AdamWCase, {}),
    (adamw_, AdamWCase, {"decoupled": False}),
    (lamb_, LambCase, {"trust_clip": True}),
]
OPTIMIZERS = [AdamW, Adam, LAMB]
SIZES = [0, 1, 31, 33, 1023, 1025, 2049, 70_000]


def parameters(dtype=torch.float32, sizes=((5, 6), (7,), (300, 40))):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def set_gradients(params, seed, scale=1.0):
    for param, grad in zip(params, random_like(params, seed), strict=True):
        param.grad = grad * scale


# --- the ops --------------------


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
@pytest.mark.parametrize(("param", "state"), ADAMW_DTYPES)
def test_zeroed_gradients_change_nothing_else(op, kind, hyper, param, state):
    case = kind.random(SIZES, param, state)
    plain = case.to("cpu")
    op(*plain.lists(), lr=0.01, gradient_scale=0.5, **hyper)
    op(*case.lists(), lr=0.01, gradient_scale=0.5, zero_grads=True, **hyper)
    assert all((grad == 0).all() for grad in case.grads)
    case.grads = plain.grads
    assert_same_bits_in_lists(case.lists(), plain.lists())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_pulls_toward_the_anchor(op, kind, hyper, dtype, backend):
    case = kind.random(SIZES, dtype, dtype)
    for v in case.exp_avg_sqs:
        v.add_(0.1)  # no update is much larger than a parameter
    anchors = random_like(case.params)
    exact = [[t.double() for t in tensors] for tensors in case.lists()[:-1]]
    steps = [step.clone() for step in case.steps]
    options = {"lr": 0.01, "weight_decay": 0.5, **hyper}
    op(*exact, steps, anchors=[a.double() for a in anchors], **options, backend="reference")
    op(*case.lists(), anchors=anchors, **options, backend=backend)
    for actual, expected in zip(case.params, exact[0], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float16])
def test_an_anchored_step_in_lower_precision_is_the_float32_one_rounded(op, kind, hyper, param):
    case = kind.random(SIZES, param, torch.float32)
    anchors = random_like(case.params)
    wide = case.to("cpu")
    wide.params, wide.grads = [p.float() for p in wide.params], [g.float() for g in wide.grads]
    op(*wide.lists(), anchors=[a.float() for a in anchors], lr=0.01, weight_decay=0.5, **hyper)
    op(*case.lists(), anchors=anchors, lr=0.01, weight_decay=0.5, **hyper)
    assert_same_bits_in_lists([case.params], [[p.to(param) for p in wide.params]])


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
def test_parameters_at_their_anchor_do_not_decay(op, kind, hyper):
    case = kind.random([100, 3000])
    anchored = case.to("cpu")
    op(*case.lists(), lr=0.01, weight_decay=0.0, **hyper)
    op(*anchored.lists(), lr=0.01, weight_decay=0.7, anchors=[p.clone() for p in anchored.params], **hyper)
    assert_same_bits_in_lists(case.lists(), anchored.lists())


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
@pytest.mark.parametrize("backend", [*(f"cpu:{isa}" for isa in ISAS), "reference"])
def test_hidden_bits_follow_the_float32_trajectory(op, kind, hyper, backend):
    halves = kind.random(SIZES, torch.bfloat16, torch.float32)
    remainders = [torch.zeros_like(p, dtype=torch.int16) for p in halves.params]
    whole = halves.to("cpu")
    whole.params = [p.float() for p in whole.params]
    whole.grads = [g.float() for g in whole.grads]
    for _ in range(5):
        op(*halves.lists(), lr=0.01, remainders=remainders, **hyper, backend=backend)
        op(*whole.lists(), lr=0.01, **hyper, backend=backend)
    joined = [join(high, low) for high, low in zip(halves.params, remainders, strict=True)]
    assert_same_bits_in_lists([joined, halves.exp_avgs], [whole.params, whole.exp_avgs])
    for high, exact in zip(halves.params, whole.params, strict=True):
        assert ((high.double() - exact).abs() <= 2**-8 * exact.abs()).all()  # rounded, not cut off


def test_halves_join_to_the_number_that_was_split():
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1.0 + 2**-8, 1.0 + 2**-9])
    numbers = torch.cat(
        [special, torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)]
    )
    high, low = split(numbers)
    assert same_bits(join(high, low)[~numbers.isnan()], numbers[~numbers.isnan()])
    assert join(high, low)[numbers.isnan()].isnan().all()
    assert high[numbers.isnan()].isnan().all()


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
def test_same_bits_with_everything_on_every_instruction_set_and_thread_count(op, kind, hyper):
    case = kind.random([*SIZES, 140_000], torch.bfloat16, torch.float32)
    anchors = random_like(case.params)
    results = []
    for isa in ISAS:
        for count in (1, 2, 3):
            copied = case.to("cpu")
            remainders = [torch.zeros_like(p, dtype=torch.int16) for p in copied.params]
            with threads(count):
                op(
                    *copied.lists(), lr=0.1, anchors=anchors, remainders=remainders, zero_grads=True,
                    gradient_scale=0.3, backend=f"cpu:{isa}", **hyper,
                )  # fmt: skip
            results.append([*copied.lists(), remainders])
    for other in results[1:]:
        assert_same_bits_in_lists(other, results[0])


@pytest.mark.parametrize(("op", "kind", "hyper"), OPS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remainders": [torch.zeros(3, dtype=torch.int16)]}, "beside a bfloat16 parameter"),
        ({"anchors": [torch.zeros(4)]}, "anchors[0] is float32 (4,) on cpu; expected float32 (3,)"),
        ({"anchors": [torch.zeros(3, dtype=torch.float64)]}, "anchors[0] is float64"),
        ({"anchors": [torch.zeros(3)] * 2}, "anchors has 2 tensors; expected 1"),
    ],
)
def test_wrong_tensors_are_refused_before_anything_moves(op, kind, hyper, options, message):
    case = kind.random([3])
    before = case.to("cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*case.lists(), lr=0.1, **options, **hyper)
    assert_same_bits_in_lists(case.lists(), before.lists())


def test_gradients_that_share_memory_may_be_read_but_not_zeroed():
    case = AdamWCase.random([8, 8])
    case.grads[1] = case.grads[0]
    adamw_(*case.lists(), lr=0.1)
    with pytest.raises(ValueError, match="overlap in memory"):
        adamw_(*case.lists(), lr=0.1, zero_grads=True)


# --- the optimizers --------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("apart", [False, True])
def test_clipping_in_the_step_is_clipping_before_it(kind, apart):
    ours, theirs = parameters(), parameters()
    a = kind(ours, lr=0.1, max_grad_norm=None if apart else 1.0)
    b = kind(theirs, lr=0.1)
    for seed in range(3):
        set_gradients(ours, seed, 0.001 if seed == 1 else 1.0)  # one norm below the limit
        set_gradients(theirs, seed, 0.001 if seed == 1 else 1.0)
        untouched = [p.grad.clone() for p in ours]
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        if apart:
            torch.testing.assert_close(a.clip_grad_norm_(1.0), norm)
        a.step()
        b.step()
        assert a.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert all(torch.equal(p.grad, old) for p, old in zip(ours, untouched, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_norm_measured_apart_counts_for_one_step(kind):
    params = parameters()
    optimizer = kind(params, lr=0.1)
    plain = copy.deepcopy(optimizer)
    set_gradients(params, 0, 100.0)
    optimizer.clip_grad_norm_(1e-3)
    assert not torch.equal(optimizer._gradient_scale() * torch.ones(()), torch.ones(()))
    assert optimizer._gradient_scale() == plain._gradient_scale() == 1.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zero_grad_takes_a_measured_norm_back(kind):
    params = parameters()
    optimizer = kind(params, lr=0.1)
    set_gradients(params, 0, 100.0)
    optimizer.clip_grad_norm_(1e-3)
    optimizer.zero_grad()
    assert optimizer._gradient_scale() == 1.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_two_groups_share_is_not_zeroed_between_them(kind):
    params = parameters(sizes=((5,), (5,)))
    optimizer = kind([{"params": [p]} for p in params], zero_grads=True)
    set_gradients(params, 0)
    params[1].grad = params[0].grad
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_norm_that_is_not_finite_is_skipped_and_counted(kind, bad):
    params = parameters()
    optimizer = kind(params, lr=0.1, max_grad_norm=1.0, zero_grads=True)
    set_gradients(params, 0)
    params[1].grad[3] = bad
    before = [p.detach().clone() for p in params]
    with one_warning("not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all((p.grad == 0).all() for p in params)
    set_gradients(params, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("named", [False, True])
def test_the_parameter_whose_gradient_is_not_finite_is_named(kind, named):
    params = parameters()
    optimizer = kind(zip("abc", params, strict=True) if named else params, error_on_nonfinite=True)
    set_gradients(params, 0)
    params[1].grad[3:5] = math.nan
    before = [p.detach().clone() for p in params]
    place = "b has 2 elements" if named else r"param_groups\[0\]\['params'\]\[1\] has 2 elements"
    with pytest.raises(FloatingPointError, match=place):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_grad_scaler_leaves_unscaling_and_skipping_to_the_step(kind):
    scaled, plain = parameters(), parameters()
    a, b = kind(scaled, lr=0.1), kind(plain, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes its tensors
    for seed, bad in ((0, None), (1, math.inf), (2, None)):
        set_gradients(plain, seed)
        set_gradients(scaled, seed, scaler.get_scale())
        if bad is None:
            b.step()
        else:
            scaled[0].grad[0, 0] = bad
        scaler.step(a)
        scaler.update()
    assert a.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    for p, q in zip(scaled, plain, strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("apart", [False, True])
def test_clipping_is_that_of_unscaled_gradients(kind, apart):
    scaled, plain = parameters(), parameters()
    a, b = kind(scaled, lr=0.1, max_grad_norm=None if apart else 1.0), kind(plain, lr=0.1, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    set_gradients(plain, 0)
    set_gradients(scaled, 0, 1024.0)
    if apart:
        a.clip_grad_norm_(1.0)
    scaler.step(a)
    b.step()
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_anchor_is_where_a_parameter_was_at_its_first_step(kind):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = kind(
        [{"params": params[:2], "anchored": True}, {"params": params[2:]}], lr=0.1, weight_decay=0.5
    )
    for seed in range(2):
        set_gradients(params, seed)
        optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["anchor"], start[0])
    assert "anchor" not in optimizer.state[params[2]]
    by_hand = parameters()
    others = [kind([p], lr=0.1, weight_decay=0.5, anchored=i < 2) for i, p in enumerate(by_hand)]
    for seed in range(2):
        set_gradients(by_hand, seed)
        for other in others:
            other.step()
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, by_hand, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_decay_apart_from_the_learning_rate_follows_the_schedule_alone(kind):
    for lr in (0.1, 0.01):
        optimizer = kind(parameters(), lr=lr, weight_decay=0.2, decouple_lr=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: step / 10
        )  # a warm-up from zero
        group = optimizer.param_groups[0]
        optimizer.step()
        assert group["lr"] * optimizer._weight_decay(group) == 0.0
        for _ in range(5):
            optimizer.step()
            scheduler.step()
        assert group["lr"] * optimizer._weight_decay(group) == pytest.approx(0.5 * 0.2)
    still = kind(parameters(), lr=0.0, decouple_lr=True)
    assert still._weight_decay(still.param_groups[0]) == 0.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_split_parameters_that_are_zeroed_become_zeros(kind):
    params = parameters(torch.bfloat16)
    optimizer = kind(params, lr=1e-3, master_weights="split", betas=(0.0, 0.0))
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
    with torch.no_grad():
        for param in params:
            param.zero_()
            param.grad.zero_()
    optimizer.step()
    assert all((param.abs() < 1e-38).all() for param in params)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hidden_bits_that_another_optimizer_has_no_use_for_are_dropped(kind):
    halves = parameters(torch.bfloat16)
    a = kind(halves, master_weights="split")
    set_gradients(halves, 0)
    a.step()
    for dtype in (torch.bfloat16, torch.float32):
        params = parameters(dtype)
        b = kind(params)
        b.load_state_dict(a.state_dict())
        set_gradients(params, 1)
        b.step()
        assert "remainder" not in b.state[params[0]]
    through = torch.optim.AdamW(parameters(torch.bfloat16))
    through.load_state_dict(a.state_dict() if kind is AdamW else AdamW(parameters()).state_dict())
    c = kind(halves, master_weights="split")
    if kind is AdamW:
        c.load_state_dict(through.state_dict())
        assert c.state[halves[0]]["remainder"].dtype == torch.int16
    set_gradients(halves, 1)
    c.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_a_hook_gives_is_what_is_loaded(kind):
    def swap(optimizer, state_dict):
        return {**state_dict, "state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

    first, second = parameters(sizes=((4,), (4,))), parameters(sizes=((4,), (4,)))
    a, b = kind(first), kind(second)
    set_gradients(first, 0)
    a.step()
    b.register_load_state_dict_pre_hook(swap)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.state[second[0]]["exp_avg"], a.state[first[1]]["exp_avg"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_split_parameters_train_as_float32_ones_do_and_survive_a_checkpoint(kind, tmp_path):
    halves, whole = (
        parameters(torch.bfloat16),
        [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)],
    )
    a, b = kind(halves, lr=1e-3, master_weights="split"), kind(whole, lr=1e-3)

    def train(optimizer, params, seeds):
        for seed in seeds:
            set_gradients(params, seed)
            for p, q in zip(params, whole, strict=True):
                q.grad = p.grad.float()
            optimizer.step()
            b.step()

    train(a, halves, range(3))
    torch.save(a.state_dict(), tmp_path / "optimizer.pt")
    resumed = [nn.Parameter(p.detach().clone()) for p in halves]
    c = kind(resumed, lr=1e-3, master_weights="split")
    c.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert c.state[resumed[0]]["remainder"].dtype == torch.int16
    assert c.state[resumed[0]]["exp_avg"].dtype == torch.float32
    train(c, resumed, range(3, 6))
    for p, q in zip(resumed, whole, strict=True):
        assert same_bits(join(p.detach(), c.state[p]["remainder"]), q.detach())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_without_hidden_bits_begins_with_zeros(kind):
    plain, split_ones = parameters(torch.bfloat16), parameters(torch.bfloat16)
    a = kind(plain)
    set_gradients(plain, 0)
    a.step()
    b = kind(split_ones, master_weights="split")
    b.load_state_dict(a.state_dict())
    set_gradients(split_ones, 1)
    b.step()
    assert b.state[split_ones[0]]["exp_avg"].dtype == torch.float32
    assert (b.state[split_ones[0]]["remainder"] != 0).any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_their_options(kind, copied):
    optimizer = kind(parameters(), max_grad_norm=1.0, zero_grads=True, anchored=True, master_weights="split")
    twin = copied(optimizer)
    assert (twin.max_grad_norm, twin.zero_grads, twin.anchored, twin.master_weights) == (
        1.0,
        True,
        True,
        "split",
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"master_weights": "fp32"}, "master_weights is 'fp32'"),
        ({"state_dtype": torch.int8}, "state_dtype is torch.int8"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **options)


def test_what_torch_steps_takes_nothing_along():
    params = [p.clone().requires_grad_() for p in parameters()]
    optimizer = AdamW(params, max_grad_norm=1e-3, differentiable=True)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="differentiable is True beside max_grad_norm"):
        optimizer.step()
