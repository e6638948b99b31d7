"""What a step learned about its tensors is used only while it still holds: they may move in any way in between."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch
from superfine.optim import LAMB, AdamW
from support import one_warning, run_python
from torch import Tensor, nn

from superfine_kernels._library import READER
from superfine_kernels._moments import Plan

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

ROLES = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


def test_records_are_compared_with_this_torch():
    assert READER.compares_records


def _new_memory(t: Tensor) -> None:
    t.data = t.detach().clone()


def _offset_in_new_memory(t: Tensor) -> None:
    t.data = torch.cat([torch.full((3,), 9.0), t.detach().flatten()])[3:].view(t.shape)


def _set(t: Tensor) -> None:
    t.detach().set_(t.detach().clone())
    t.data = t.detach()


def _storage_grown(t: Tensor) -> None:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() + 4096)


def _copy_on_write(t: Tensor) -> None:
    t.shared = torch._lazy_clone(t.detach())  # kept, and so shared, to the end


def _as_parameter(t: Tensor) -> None:
    t.requires_grad_(not t.requires_grad)
    t.requires_grad_(not t.requires_grad)


def _of_another_library(t: Tensor) -> None:
    t.data = torch.from_numpy(t.detach().numpy().copy())


def _in_shared_memory(t: Tensor) -> None:
    t.detach().share_memory_()


MOVES = (
    _new_memory, _offset_in_new_memory, _set, _storage_grown, _copy_on_write, _as_parameter, _of_another_library,
    _in_shared_memory,
)  # fmt: skip


def run(optimizer_class: type, move, role: str, *, keeps_plan: bool) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(3, 5, generator=generator)) for _ in range(4)]
    optimizer = optimizer_class(params, lr=1e-2, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.empty_like(p)
    kept = []
    for step in range(5):
        for p in params:
            p.grad.copy_(torch.randn(3, 5, generator=generator))
        if step == 3:
            state = optimizer.state[params[1]]
            victim = {"param": params[1], "grad": params[1].grad, **state}[role]
            move(victim)
            kept += [victim.shared, victim.shared.clone()] if hasattr(victim, "shared") else []
        if not keeps_plan:
            optimizer._plan = Plan()
        optimizer.step()
    state = [t for p in params for t in optimizer.state[p].values()]
    return [*(p.detach() for p in params), *state], kept


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("optimizer_class", [AdamW, LAMB])
def test_a_tensor_that_moved_is_stepped_where_it_is(optimizer_class, move, role):
    expected, _ = run(optimizer_class, lambda t: None, role, keeps_plan=False)
    moved, kept = run(optimizer_class, move, role, keeps_plan=True)
    for a, b in zip(moved, expected, strict=True):
        assert torch.equal(a, b)
    for clone, before in zip(kept[::2], kept[1::2], strict=True):
        assert torch.equal(clone, before)  # what shares memory until it is written was not written


def _transpose(params: list[nn.Parameter], optimizer: AdamW) -> None:
    params[1].data = params[1].data.t()  # of shape (5, 5), so that strides alone tell


def _strided_moment(params: list[nn.Parameter], optimizer: AdamW) -> None:
    moment = optimizer.state[params[1]]["exp_avg"]
    moment.data = torch.stack([moment, torch.full_like(moment, 7.0)], dim=-1)[..., 0]


@pytest.mark.parametrize("change", [_transpose, _strided_moment])
def test_strides_that_changed_alone_are_noticed(change):
    def run(keeps_plan: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.arange(25.0).view(5, 5) + i) for i in range(3)]
        optimizer = AdamW(params, lr=1e-2)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.sin(torch.arange(25.0) * (1 + i)).view(5, 5)
            if step == 2:
                change(params, optimizer)
            if not keeps_plan:
                optimizer._plan = Plan()
            optimizer.step()
        return [p.detach() for p in params]

    with one_warning("layout that no kernel takes"):
        kept = run(True)
    for a, b in zip(kept, run(False), strict=True):
        assert torch.equal(a, b)


def test_another_dtype_in_the_same_memory_is_noticed():
    param = nn.Parameter(torch.ones(8, dtype=torch.float16))
    optimizer = AdamW([param])
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    moment = optimizer.state[param]["exp_avg"]
    moment.data = moment.data.view(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"exp_avgs\[0\] is bfloat16 \(8,\) on cpu; expected float16 \(8,\) on cpu"
    ):
        optimizer.step()
    assert torch.equal(param, before)


def test_parameters_whose_gradients_come_and_go_keep_their_own_state():
    twins = []
    for keeps_plan in (True, False):
        params = [nn.Parameter(torch.full((n,), float(n))) for n in (3, 4, 5, 4)]
        optimizer = AdamW(params, lr=1e-2)
        for step in range(12):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, float(step - i)) if (step + i) % 3 else None
            if not keeps_plan:
                optimizer._plan = Plan()
            optimizer.step()
        twins.append([p.detach() for p in params])
    for a, b in zip(*twins, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer_class", [AdamW, LAMB])
def test_gradients_of_every_origin_are_stepped(optimizer_class):
    """Of a backward pass, set by hand, views, zeroed in place, of a subclass, and none."""

    class Marked(Tensor):
        pass

    def run(keeps_plan: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.linspace(0.1, 1, 6) * (i + 1)) for i in range(5)]
        optimizer = optimizer_class(params, lr=1e-2)
        for step in range(8):
            if step % 2:
                optimizer.zero_grad(set_to_none=step % 4 == 1)
            sum((p.square() * (i + step)).sum() for i, p in enumerate(params)).backward()
            params[1].grad = torch.full((6,), step - 3.0)
            params[2].grad = torch.linspace(-1, 1, 12)[step % 2 * 3 :][:6]
            params[3].grad = (
                params[3].grad.detach().clone().as_subclass(Marked) if step % 3 == 2 else params[3].grad
            )
            params[4].grad = None if step % 3 == 1 else params[4].grad
            if not keeps_plan:
                optimizer._plan = Plan()
            optimizer.step()
        return [p.detach() for p in params]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("zero_grads", [False, True])
def test_versions_count_what_a_step_writes(zero_grads):
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = AdamW(params, zero_grads=zero_grads)
    for step in range(3):
        for p in params[:2]:
            p.grad = torch.ones(3)
        with torch.inference_mode():
            params[2].grad = torch.ones(3)  # has no version
        written = [t for p in params[:2] for t in ((p, p.grad) if zero_grads else (p,))]
        before = [t._version for t in written]
        optimizer.step()
        assert [t._version for t in written] == [version + 1 for version in before]
        assert optimizer.state[params[2]]["step"] == step + 1
        assert params[2].grad.any() == (not zero_grads)


def test_gradients_that_another_thread_drops_live_until_a_long_step_ends():
    param = nn.Parameter(torch.zeros(8 << 20))
    optimizer = AdamW([param], lr=1.0, weight_decay=0.0)
    turn = threading.Semaphore(0)
    rounds, dropped = 5, []

    def drop() -> None:
        for _ in range(rounds):
            turn.acquire()
            # By then the kernel runs. Earlier, torch itself may crash, which lets other threads run while it destroys
            # the Python object of a gradient.
            time.sleep(5e-4)
            param.grad = None
            dropped.append(torch.full_like(param, torch.nan))  # where the gradient was, if its memory is free

    thread = threading.Thread(target=drop)
    thread.start()
    for done in range(1, rounds + 1):
        param.grad = torch.ones_like(param)
        turn.release()
        optimizer.step()
        while len(dropped) < done:
            time.sleep(1e-4)
    thread.join()
    assert torch.isfinite(param).all()


def test_a_long_step_lets_go_of_the_gradients_it_holds():
    param = nn.Parameter(torch.zeros(1 << 20))
    optimizer = AdamW([param])
    for _ in range(3):  # the first of them learns the plan
        param.sum().backward()
        optimizer.step()
        grad = weakref.ref(param.grad)
        param.grad = None
        assert grad() is None


def test_six_dimensions_have_no_room_in_a_record_and_are_read_in_full():
    ours, theirs = (nn.Parameter(torch.ones(1, 2, 1, 3, 1, 2)) for _ in range(2))
    a, b = AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        if step == 2:  # the sizes lie outside the record, where they change unseen
            for p, optimizer in ((ours, a), (theirs, b)):
                for t in (p, *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))):
                    t.data = t.detach()[..., :1].clone()
        for p in (ours, theirs):
            p.grad = None
            p.grad = torch.full_like(p, float(step))
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_a_compiled_step_is_the_step_and_is_not_traced_again_and_again():
    ours, theirs = ([nn.Parameter(torch.ones(5, 3)) for _ in range(3)] for _ in range(2))
    a, b = AdamW(ours, lr=0.1), AdamW(theirs, lr=0.1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(a.step, backend="eager")
        for step in range(10):
            for optimizer, params in ((a, ours), (b, theirs)):
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
                for p in params:
                    p.grad = torch.full_like(p, float(step - 3))
            compiled()
            b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    torch._dynamo.reset()


def test_a_forked_process_steps_on_one_thread_with_a_warning():
    # More elements than one thread takes, of tensors so small that torch fills them on one.
    printed = run_python("""
import os, signal, warnings, torch
from superfine.optim import AdamW
warnings.simplefilter("always")
signal.alarm(60)  # who waits for threads that are not there waits forever
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(20_000)) for _ in range(3)]
optimizer = AdamW(params, lr=0.1)
def step():
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params[0][0].item()
step()
if os.fork() == 0:
    with warnings.catch_warnings(record=True) as caught:
        value = step()
    print([str(w.message)[:24] for w in caught], value, flush=True)
    os._exit(0)
os.wait()
print(step())
""")
    child, parent = printed.splitlines()
    assert child == f"['this process was forked '] {parent}"


@pytest.mark.parametrize("offset", [0, 4])
def test_a_storage_without_memory_is_refused(offset):
    params = [nn.Parameter(torch.ones(offset + 8)[offset:]) for _ in range(2)]
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[1\] is .* expected a tensor with memory of its own"):
        optimizer.step()
    assert torch.equal(params[0], before)
