"""State of the optimizers in every storage: checkpoints, conversions, groups of their own; any mix of them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from superfine.optim import LAMB, Adam, AdamW
from support import assert_same_bits_in_lists, same_bits
from torch import nn

from superfine_kernels._storage import dequantize, join

OPTIMIZERS = [AdamW, Adam, LAMB]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
#: (parameters, options) of every way to store the state.
LAYOUTS = [
    (F32, {}),
    (F32, {"state_dtype": "bf16"}),
    (F32, {"state_dtype": "8bit"}),
    (BF16, {}),
    (BF16, {"state_dtype": "fp32"}),
    (BF16, {"stochastic_rounding": True, "state_dtype": torch.uint8, "seed": 4}),
    (BF16, {"master_weights": "split"}),
    (BF16, {"master_weights": "split", "state_dtype": BF16}),
    (BF16, {"master_weights": "split", "state_dtype": "8bit"}),
    (BF16, {"master_weights": "kahan"}),
    (F16, {"master_weights": "kahan", "state_dtype": "8bit"}),
]
SHAPES = [(40, 30), (7,), (3, 5, 20)]


def parameters(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer, params, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def moments(state):
    """Both moments as float32."""
    if "scales" in state:
        return dequantize(state["exp_avg"], state["exp_avg_sq"], state["scales"])
    return state["exp_avg"].float(), state["exp_avg_sq"].float()


# --- checkpoints --------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "options"), LAYOUTS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_cut_off(kind, dtype, options, tmp_path):
    params = parameters(dtype)
    optimizer = kind(params, lr=1e-2, **options)
    train(optimizer, params, range(3))
    torch.save([optimizer.state_dict(), params], tmp_path / "checkpoint.pt")
    train(optimizer, params, range(3, 6))
    saved, resumed = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    other = kind(resumed, lr=1e-2, **options)
    other.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    for p, q in zip(params, resumed, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert_same_bits_in_lists([optimizer.state[p].values()], [other.state[q].values()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_checkpoints_convert_between_layouts(kind, dtype):
    layouts = [options for other, options in LAYOUTS if other == dtype]
    for before in layouts:
        params = parameters(dtype)
        optimizer = kind(params, lr=1e-2, **before)
        train(optimizer, params, range(3))
        for after in layouts:
            other = kind(params, lr=1e-2, **after)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            fresh = kind(parameters(dtype), **after)
            train(fresh, fresh.param_groups[0]["params"], [0])
            for param, made in zip(params, fresh.state.values(), strict=True):
                old, new = optimizer.state[param], other.state[param]
                assert {k: t.dtype for k, t in new.items()} == {k: t.dtype for k, t in made.items()}
                assert new["step"] == 3
                for a, b in zip(moments(old), moments(new), strict=True):
                    largest = a.abs().max()
                    assert ((a - b).abs() <= a.abs() / 15 + 2e-5 * largest).all()


def test_codes_are_loaded_as_they_were_saved():
    # Rounding at random may leave a block without the greatest code, so codes made anew would not be these.
    params = parameters(F32)
    optimizer = AdamW(params, state_dtype="8bit")
    train(optimizer, params, [0])
    for p in params:
        optimizer.state[p]["exp_avg_sq"].clamp_(max=254)
    twin = AdamW(params, state_dtype="8bit")
    twin.load_state_dict(optimizer.state_dict())
    for p in params:
        for name in ("exp_avg", "exp_avg_sq", "scales"):
            assert same_bits(twin.state[p][name], optimizer.state[p][name])
            assert twin.state[p][name].data_ptr() != optimizer.state[p][name].data_ptr()


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_torch_loads_moments_of_float_layouts_and_spoils_codes(kind):
    params = parameters(F32)
    lean = kind(params, lr=1e-2, state_dtype="8bit")
    train(lean, params, range(2))
    theirs = getattr(torch.optim, kind.__name__)(params)
    theirs.load_state_dict(lean.state_dict())  # as floats: torch converts what it does not know
    with pytest.raises(ValueError, match=r"load_state_dict: exp_avg is float32 .* expected torch.uint8"):
        kind(params, state_dtype="8bit").load_state_dict(theirs.state_dict())
    wide = kind(params, lr=1e-2, state_dtype="8bit")
    wide.load_state_dict(getattr(torch.optim, kind.__name__)(params).state_dict())  # without state
    train(wide, params, [2])


@pytest.mark.parametrize(("dtype", "options"), LAYOUTS)
def test_copies_keep_their_layout(dtype, options):
    optimizer = AdamW(parameters(dtype), **options)
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    twins = [optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for twin in twins:
        train(twin, twin.param_groups[0]["params"], [1])
    for p, q, r in zip(*(twin.param_groups[0]["params"] for twin in twins), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert same_bits(p.detach(), r.detach())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_may_have_layouts_of_their_own(kind):
    shapes = [(40, 30)] * 4
    params = parameters(BF16, shapes)
    own = [{}, {"state_dtype": "8bit"}, {"master_weights": "split"}, {"stochastic_rounding": True}]
    optimizer = kind([{"params": [p], **options} for p, options in zip(params, own, strict=True)], lr=1e-2)
    train(optimizer, params, range(2))
    apart = parameters(BF16, shapes)
    others = [kind([p], lr=1e-2, **options) for p, options in zip(apart, own, strict=True)]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for p in apart:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        for other in others:
            other.step()
    for p, q in zip(params, apart, strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float64, {"state_dtype": "8bit"}, "state_dtype is torch.uint8"),
        (torch.complex64, {"state_dtype": "8bit"}, "state_dtype is torch.uint8"),
        (F16, {"state_dtype": "bf16"}, "state_dtype is torch.bfloat16"),
        (F32, {"state_dtype": "int4"}, "state_dtype is 'int4'"),
        (F32, {"master_weights": "fp32"}, "master_weights is 'fp32'"),
        (F32, {"seed": 2**32}, "seed is 4294967296"),
        (BF16, {"stochastic_rounding": True, "master_weights": "kahan"}, "stochastic_rounding is True"),
    ],
)
def test_layouts_that_do_not_go_together_are_refused(kind, dtype, options, message):
    params = [nn.Parameter(torch.zeros(3, dtype=dtype))]
    with pytest.raises(ValueError, match=message):
        train(kind(params, **options), params, [0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_weights": "Split"}, "master_weights is 'Split'"),
        ({"state_dtype": "8-bit"}, "state_dtype is '8-bit'"),
        ({"stochastic_rounding": True}, "stochastic_rounding is True"),
    ],
)
def test_wrong_options_of_a_group_are_refused_when_it_is_added(kind, options, message):
    optimizer = kind(parameters(BF16), master_weights="kahan")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(BF16), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_keep_options_that_the_checkpoint_lacks(kind):
    params = parameters(F32)
    theirs = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    train(theirs, params, [0])
    ours = kind([{"params": params[:1], "state_dtype": "8bit", "anchored": True}, {"params": params[1:]}])
    ours.load_state_dict(theirs.state_dict())
    train(ours, params, [1])
    assert ours.state[params[0]]["exp_avg"].dtype == torch.uint8
    assert "anchor" in ours.state[params[0]]
    assert ours.state[params[1]]["exp_avg"].dtype == F32


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_that_one_group_lacks_is_made_before_any_group_moves(kind):
    # Lists are stepped one by one for subclasses, as they are on a GPU.
    first = torch.ones(4).as_subclass(_Subclass).requires_grad_()
    second = nn.Parameter(torch.ones(4))
    optimizer = kind([{"params": [first]}, {"params": [second]}])
    first.grad = torch.ones_like(first)
    optimizer.step()
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [2, 1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_store_state_as_they_were_made_to_and_not_as_the_checkpoint_did(kind):
    params = parameters(F32)
    lean = kind([{"params": params, "state_dtype": "8bit"}])
    train(lean, params, [0])
    for options, dtype in (({}, F32), ({"state_dtype": "bf16"}, BF16)):
        other = kind([{"params": params, **options}])
        other.load_state_dict(lean.state_dict())
        assert other.state[params[0]]["exp_avg"].dtype == dtype
        train(other, params, [1])


def test_amsgrad_has_no_8_bit_form():
    params = parameters(F32)
    with pytest.raises(ValueError, match="amsgrad, whose maxima have no 8-bit form"):
        train(AdamW(params, amsgrad=True, state_dtype="8bit"), params, [0])


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'clip'"):
        AdamW(parameters(F32), clip=1.0)


# --- Adam --------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_has_the_bits_of_torch_fused(amsgrad):
    ours, theirs = parameters(F32, [(64, 32), (16,)]), parameters(F32, [(64, 32), (16,)])
    train(Adam(ours, weight_decay=0.1, amsgrad=amsgrad), ours, range(20))
    train(torch.optim.Adam(theirs, weight_decay=0.1, amsgrad=amsgrad, fused=True), theirs, range(20))
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.filterwarnings("ignore:.*that no kernel takes")
@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.complex64])
def test_adam_agrees_with_torch_in_every_dtype_and_layout(dtype):
    sliced = [nn.Parameter(torch.ones(8, 6, dtype=dtype)[:, ::2]) for _ in range(2)]
    for a, b in ((parameters(dtype), parameters(dtype)), (sliced[:1], sliced[1:])):
        train(Adam(a, lr=0.01, weight_decay=0.1, maximize=True), a, range(5))
        train(torch.optim.Adam(b, lr=0.01, weight_decay=0.1, maximize=True), b, range(5))
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)


def test_adam_and_adamw_are_told_apart_by_their_groups():
    assert issubclass(Adam, torch.optim.Adam)
    assert issubclass(AdamW, torch.optim.AdamW)
    decoupled, ours = parameters(F32), parameters(F32)
    train(Adam(decoupled, weight_decay=0.1, decoupled_weight_decay=True), decoupled, range(3))
    train(AdamW(ours, weight_decay=0.1), ours, range(3))
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(decoupled, ours, strict=True))


# --- any mix --------------------

layouts = st.sampled_from(LAYOUTS)
shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (17,), (16, 17), (3, 100), (1025,)]), min_size=1, max_size=4
)
rates, decays = st.sampled_from([0.0, 1e-3, 0.05]), st.sampled_from([0.0, 0.1])
groups = st.lists(st.tuples(layouts, shapes, rates, decays), min_size=1, max_size=3)


def exact_step(kind, p, g, m, v, step, lr, weight_decay):
    """One step in float64; returns the new parameter and moments."""
    if kind is Adam:
        g = g + weight_decay * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
    if kind is AdamW:
        update = update + weight_decay * p
    elif kind is LAMB:
        update = update + weight_decay * p
        if weight_decay and p.norm() > 0 and update.norm() > 0:
            update = update * (p.norm() / update.norm())
    return p - lr * update, m, v


@settings(max_examples=40)
@given(st.sampled_from(OPTIMIZERS), groups, st.data())
def test_any_mix_of_groups_layouts_and_missing_gradients_agrees_with_float64(kind, drawn, data):
    made = []
    for (dtype, options), sizes, lr, weight_decay in drawn:
        options = {name: value for name, value in options.items() if name != "seed"}
        params = parameters(dtype, sizes)
        made.append({"params": params, "lr": lr, "weight_decay": weight_decay, **options})
    optimizer = kind(made, eps=1e-6)
    exact = {p: [p.detach().double(), 0.0, 0.0, 0] for group in made for p in group["params"]}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for group in made:
            for p in group["params"]:
                p.grad = None
                if data.draw(st.booleans()):
                    p.grad = torch.randn(p.shape, generator=generator).add(0.5).to(p.dtype)
                    value, m, v, step = exact[p]
                    done = exact_step(
                        kind, value, p.grad.double(), m, v, step + 1, group["lr"], group["weight_decay"]
                    )
                    exact[p] = [*done, step + 1]
        optimizer.step()
    for group in made:
        for p in group["params"]:
            value, _, _, step = exact[p]
            state = optimizer.state.get(p, {})
            assert state.get("step", 0) == step
            actual = p.detach().double()
            if "remainder" in state:
                actual = join(p.detach(), state["remainder"]).double()
            # Storage rounds a parameter by its eps a step; rounded moments change an update by some tenths.
            rounding = 4 * step * torch.finfo(F32 if "remainder" in state else p.dtype).eps
            if state.get("remainder", p).dtype in (F16, BF16) and "remainder" in state:
                rounding = 4 * step * torch.finfo(p.dtype).eps ** 2
            lossy = group.get("state_dtype", p.dtype) not in (F32, "fp32") or p.dtype != F32
            scale = max(1.0, value.norm().item() / math.sqrt(max(1, value.numel())))  # of LAMB's updates
            moved = group["lr"] * step * scale * (0.5 if lossy else 1e-4)
            assert ((actual - value).abs() <= rounding * value.abs() + moved + 1e-7).all()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "scales"])
@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_codes_that_another_optimizer_converted_are_refused_and_nothing_changes(kind, name):
    params = [torch.nn.Parameter(torch.ones(300))]
    optimizer = kind(params, state_dtype="8bit")
    params[0].grad = torch.ones(300)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][0][name] = saved["state"][0][name].double()
    before = copy.deepcopy(optimizer.state_dict())
    message = rf"load_state_dict: {name} is float64 .* beside scales of 8-bit moments; expected torch\."
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
    optimizer.step()
