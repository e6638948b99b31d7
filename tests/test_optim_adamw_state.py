"""The state of superfine.optim.AdamW: checkpoints in both directions, copies, and state that moves under a plan."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from superfine.optim import LAMB, AdamW
from support import one_warning, run_python, same_bits, saved_and_loaded
from test_optim_adamw import SHAPES, assert_close, assert_same_bits, parameters, set_gradients, train
from torch import nn
from torch.utils._pytree import tree_map_only

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


# --- checkpoints --------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize(
    "implementation", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_torch_goes_on_from_our_checkpoint_and_we_from_torchs(implementation, options):
    theirs = parameters()
    b = torch.optim.AdamW(theirs, lr=1e-2, **implementation, **options)
    train(b, theirs, range(3))
    ours = copy.deepcopy(theirs)
    a = AdamW(ours, lr=0.7, **options)  # the rate comes from the checkpoint
    a.load_state_dict(saved_and_loaded(b.state_dict()))
    train(a, ours, range(3, 6))
    train(b, theirs, range(3, 6))
    assert_close(ours, theirs)

    back = copy.deepcopy(ours)
    c = torch.optim.AdamW(back, **options, **implementation)
    c.load_state_dict(saved_and_loaded(a.state_dict()))
    train(a, ours, range(6, 9))
    train(c, back, range(6, 9))
    assert_close(ours, back)
    assert c.param_groups[0]["lr"] == 1e-2
    assert [c.state[p]["step"].item() for p in back] == [9] * len(SHAPES)


def test_torch_fused_goes_on_from_our_checkpoint_with_the_same_bits():
    ours = [nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(16))]
    a = AdamW(ours, lr=1e-2)
    train(a, ours, range(3))
    theirs = copy.deepcopy(ours)
    b = torch.optim.AdamW(theirs, fused=True)
    state = saved_and_loaded(a.state_dict())
    b.load_state_dict(
        {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}
    )
    train(a, ours, range(3, 8))
    train(b, theirs, range(3, 8))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_interrupted_run_goes_on_with_the_same_bits(dtype):
    straight, params = parameters(dtype), parameters(dtype)
    train(AdamW(straight, lr=1e-2, amsgrad=True), straight, range(6))
    first = AdamW(params, lr=1e-2, amsgrad=True)
    train(first, params, range(3))
    second = AdamW(params, lr=0.5, amsgrad=True)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(second, params, range(3, 6))
    assert_same_bits(straight, params)


def test_a_checkpoint_for_another_dtype_is_cast_as_torch_does():
    source = parameters(torch.float32)
    saved = AdamW(source, lr=1e-2)
    train(saved, source, range(3))
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    a, b = AdamW(ours), torch.optim.AdamW(theirs)
    for optimizer, params in ((a, ours), (b, theirs)):
        optimizer.load_state_dict(saved.state_dict())
        train(optimizer, params, range(3, 5))
    assert a.state[ours[0]]["exp_avg"].dtype == torch.bfloat16
    assert a.state[ours[0]]["step"].dtype == torch.float32
    assert_close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)


def test_moments_in_float32_beside_bfloat16_parameters():
    wide, narrow = parameters(torch.float32), []
    narrow = [nn.Parameter(p.data.bfloat16()) for p in wide]
    optimizer = AdamW(narrow, lr=1e-2)
    set_gradients(narrow, 0)
    for param in narrow:
        zeros = [torch.zeros_like(param, dtype=torch.float32) for _ in range(2)]
        optimizer.state[param] = {"step": torch.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    optimizer.step()
    for param in narrow:
        moments = optimizer.state[param]
        assert moments["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(moments["exp_avg"], 0.1 * param.grad.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_steps_of_old_checkpoints_are_numbers(kind):
    ours = parameters()
    a = kind(ours)
    train(a, ours, range(2))
    state = a.state_dict()
    for entries in state["state"].values():
        entries["step"] = 2
    a.load_state_dict(state)
    train(a, ours, range(2, 3))
    assert {float(a.state[p]["step"]) for p in ours} == {3.0}


@pytest.mark.parametrize("kind", [AdamW, LAMB])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_train_on_their_own(clone, kind):
    model = nn.Linear(6, 5)
    optimizer = kind(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    params = list(model.parameters())
    train(optimizer, params, range(2))
    other_model, other = clone((model, optimizer))
    others = list(other_model.parameters())
    before = [p.detach().clone() for p in params]
    train(other, others, range(2, 5))
    assert_same_bits(params, [nn.Parameter(p) for p in before])
    train(optimizer, params, range(2, 5))
    assert_same_bits(params, others)
    assert type(other) is kind
    assert other.grad_norm == optimizer.grad_norm


def test_the_default_device_does_not_decide_where_steps_are_counted():
    params = parameters()
    optimizer = AdamW(params)
    set_gradients(params, 0)
    with torch.device("meta"):
        optimizer.step()
    assert {optimizer.state[p]["step"].device.type for p in params} == {"cpu"}


# --- state that moves --------------------


def _replace_first_moment(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)


def _replace_second_moment(optimizer, params):
    optimizer.state[params[0]]["exp_avg_sq"] = torch.full_like(params[0], 0.5)


def _replace_step(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(100.0)


def _replace_entries(optimizer, params):
    optimizer.state[params[0]] = {k: v.clone() for k, v in optimizer.state[params[0]].items()}


def _replace_state(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _clear_state(optimizer, params):
    optimizer.state.clear()


def _swap_data(optimizer, params):
    params[0].data = torch.ones_like(params[0])


def _move_moments(optimizer, params):
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[params[0]][name]
        moment.data = torch.full_like(moment, 0.25)


def _write_in_place(optimizer, params):
    with torch.no_grad():
        params[0].mul_(2)
        optimizer.state[params[0]]["exp_avg_sq"].mul_(2)
        optimizer.state[params[0]]["step"].fill_(7)


def _reverse_group(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def _share_memory(optimizer, params):
    for entries in optimizer.state.values():
        for value in entries.values():
            value.share_memory_()


@pytest.mark.parametrize(
    "change",
    [
        _replace_first_moment, _replace_second_moment, _replace_step, _replace_entries, _replace_state, _clear_state,
        _swap_data, _move_moments, _write_in_place, _reverse_group, _share_memory,
    ],
)  # fmt: skip
def test_state_changed_between_steps_is_what_the_next_step_reads(change):
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for optimizer, params in ((a, ours), (b, theirs)):
        train(optimizer, params, range(2))
        change(optimizer, params)
        gc.collect()
        train(optimizer, params, range(2, 4))
    assert_close(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][name], b.state[q][name], rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("default:The .grad attribute")
def test_a_resized_parameter_is_refused_and_nothing_moves():
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6))]
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    params[1].data = torch.ones(8)
    params[1].grad = torch.ones(8)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        ValueError, match=r"exp_avgs\[1\] is float32 \(6,\) on cpu; expected float32 \(8,\) on cpu"
    ):
        optimizer.step()
    assert_same_bits(params, [nn.Parameter(p) for p in before])
    assert optimizer.state[params[0]]["step"] == 1


def test_a_first_moment_of_another_dtype_in_the_same_memory_is_noticed():
    # Same address, same objects otherwise: only the dtype says that the second moment no longer fits.
    memory = torch.zeros(4)
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([param])
    optimizer.state[param] = {
        "step": torch.tensor(0.0),
        "exp_avg": memory.view(torch.bfloat16)[:4],
        "exp_avg_sq": torch.zeros(4, dtype=torch.bfloat16),
    }
    train(optimizer, [param], range(1))
    optimizer.state[param]["exp_avg"] = memory
    with pytest.raises(
        ValueError, match=r"exp_avg_sqs\[0\] is bfloat16 \(4,\) on cpu; expected float32 \(4,\)"
    ):
        optimizer.step()


def test_the_same_parameter_in_two_names_is_refused():
    param = nn.Parameter(torch.ones(6))
    alias = nn.Parameter(param.data)
    optimizer = AdamW([param, alias])
    set_gradients([param, alias], 0)
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.step()
    assert torch.equal(param, torch.ones(6))


def test_a_missing_entry_is_named():
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    del optimizer.state[params[1]]["exp_avg_sq"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError, match="exp_avg_sq"):
        optimizer.step()
    assert_same_bits(params, [nn.Parameter(p) for p in before])


# --- parameters that take another way --------------------


def test_slices_of_a_parameter_leave_their_neighbours_alone():
    parent = torch.randn(10, 7)
    before, theirs = parent.clone(), nn.Parameter(parent[:, :3].clone())
    ours = nn.Parameter(parent[:, :3])
    a, b = AdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    with one_warning("layout that no kernel takes"):
        train(a, [ours], range(3))
    train(b, [theirs], range(3))
    assert_close([ours], [theirs])
    assert torch.equal(parent[:, 3:], before[:, 3:])
    assert ours.data_ptr() == parent.data_ptr()


def test_one_warning_covers_all_parameters_that_no_kernel_takes():
    params = [nn.Parameter(torch.ones(3, n, dtype=torch.complex64)) for n in (2, 4, 5)]
    for p in params:
        p.grad = torch.ones_like(p)
    with one_warning("layout that no kernel takes"):
        AdamW(params).step()


def test_channels_last_models_are_stepped_in_place_without_a_warning():
    ours = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    a, b = AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            model.weight.grad = model.weight.grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
    assert_close(list(ours.parameters()), list(theirs.parameters()), 1e-5)
    assert a.state[ours.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_complex_parameters_follow_torch():
    ours = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
    theirs = copy.deepcopy(ours)
    a, b = AdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    with one_warning("torch.complex64"):
        train(a, [ours], range(3))
    train(b, [theirs], range(3))
    assert_close([ours], [theirs])


class Wrapped(torch.Tensor):
    """A tensor whose values lie in another one; every op on it runs on that one."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_parameters_of_a_tensor_subclass_are_stepped_through_their_dispatch(amsgrad):
    inner = torch.randn(5, 7)
    theirs = nn.Parameter(inner.clone())
    ours = nn.Parameter(Wrapped(inner))
    a, b = AdamW([ours], lr=0.1, amsgrad=amsgrad), AdamW([theirs], lr=0.1, amsgrad=amsgrad)
    for step in range(3):
        set_gradients([theirs], step)
        ours.grad = Wrapped(theirs.grad.clone())
        a.step()
        b.step()
    assert same_bits(inner, theirs.data)
    assert type(a.state[ours]["exp_avg"]) is Wrapped
    assert a.state[ours]["step"] == 3


def test_state_of_a_subclass_without_memory_of_its_own_is_refused():
    # In a process of its own: read as plain memory, it would end the process.
    printed = run_python("""
import torch
from torch.testing._internal.two_tensor import TwoTensor
from superfine.optim import LAMB, AdamW
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = AdamW([param])
moment = TwoTensor(torch.zeros(3), torch.zeros(3))
optimizer.state[param] = {"step": torch.tensor(0.0), "exp_avg": moment, "exp_avg_sq": torch.zeros(3)}
try:
    optimizer.step()
except (TypeError, ValueError) as error:
    print(error)
""")
    assert "exp_avgs[0]" in printed
    assert "TwoTensor" in printed


def test_sparse_gradients_are_refused():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises((ValueError, TypeError), match="sparse"):
        AdamW([param]).step()
    assert torch.equal(param, torch.ones(3))


def test_bad_arguments_are_refused_as_by_torch():
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            AdamW([nn.Parameter(torch.ones(1))], **options)
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    optimizer = AdamW([nn.Parameter(torch.ones(1))])
    optimizer.param_groups[0]["lr"] = float("nan")
    set_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="adamw_: lr is nan"):
        optimizer.step()


def test_both_moments_moved_through_data_are_followed_wherever_they_land():
    # The allocator may give the first moment its old address back and the second a new one.
    param = nn.Parameter(torch.ones(1024))
    optimizer = AdamW([param], lr=1e-3)
    for step in range(1, 41):
        param.grad = torch.full_like(param, float(step))
        optimizer.step()
        state = optimizer.state[param]
        saved = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
        for name in saved:
            state[name].data = torch.empty(0)
        for name in saved:
            state[name].data = saved[name].clone()
        param.grad = torch.ones_like(param)
        before = state["exp_avg_sq"].clone()
        optimizer.step()
        assert not torch.equal(before, state["exp_avg_sq"])


def test_a_gradient_dropped_by_another_thread_lives_until_the_step_is_done():
    printed = run_python("""
import threading, time, torch
from superfine.optim import LAMB, AdamW
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.ones(10_000_000))
optimizer = AdamW([param])
param.grad = torch.ones_like(param)
optimizer.step()
step = optimizer.state[param]["step"]
def drop(taken):
    while step.item() == taken:  # it grows right before the kernel runs; torch itself races with an earlier drop
        time.sleep(0)
    param.grad = None
for _ in range(3):
    param.grad = torch.ones_like(param)
    thread = threading.Thread(target=drop, args=(step.item(),))
    thread.start()
    optimizer.step()
    thread.join()
print("alive")
""")
    assert "alive" in printed
