"""Whole training steps: every provider does the same steps, and a wrong one is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import superfine_bench
import torch
from superfine_bench import Settings, UnavailableError, measure, train_step
from superfine_bench.train_step import BASE, SELECTIONS, Size

CPU = torch.device("cpu")
# The smallest models with a last:2 that is not everything; rows of several tokens, so that labels are shifted.
TINY = Size(layers=3, hidden=64, heads=4, vocabulary=64, rows=2, tokens=8)
ONE_TURN = Settings(seconds=0.0, turns=6, quick=True)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for what it has renamed
]


def make(family, selection, dtype=torch.float32):
    case = train_step._case(family, TINY, selection, dtype)
    inputs = case.inputs(CPU)
    if isinstance(inputs, UnavailableError):
        pytest.skip(str(inputs))
    return case, inputs, {provider.name: provider for provider in case.providers}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", BASE)
def test_superfine_and_torch_make_the_steps_of_the_plain_loop(family, selection):
    case, inputs, providers = make(family, selection)
    for name in ("eager", "torch fused", "superfine"):
        assert case.check(inputs, providers[name].build(inputs)) <= 1, name


@pytest.mark.parametrize("family", BASE)
def test_autocast_stays_within_its_tolerance(family):
    case, inputs, providers = make(family, "last:2", torch.bfloat16)
    error = case.check(inputs, providers["superfine"].build(inputs))
    assert 1e-4 < error <= 1  # not zero: autocast was on


def test_the_check_sees_a_step_that_trains_nothing_and_a_clipping_that_is_left_out(monkeypatch):
    case, inputs, providers = make("gpt2", "full")
    assert max(norm for _, norm in inputs.expected) > train_step.MAX_GRAD_NORM
    call = providers["eager"].build(inputs)
    monkeypatch.setattr(train_step, "MAX_GRAD_NORM", 1e6)
    assert case.check(inputs, call) > 1
    monkeypatch.undo()
    assert case.check(inputs, call) <= 1
    (optimizer,) = inputs.optimizers
    monkeypatch.setattr(optimizer, "step", lambda: None)
    assert case.check(inputs, call) > 1


def test_a_step_leaves_frozen_parameters_without_gradients_and_where_they_were():
    case, inputs, providers = make("bert", "last:2")
    trained = set(inputs.plan.names)
    before = {name: parameter.detach().clone() for name, parameter in inputs.model.named_parameters()}
    providers["superfine"].build(inputs)()
    for name, parameter in inputs.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        assert parameter.grad is None
    case.before(inputs)
    assert all(torch.equal(parameter, before[name]) for name, parameter in inputs.model.named_parameters())


def test_rows_hold_the_three_parts_of_a_step():
    rows = measure(train_step._case("bert", TINY, "head"), CPU, ONE_TURN)
    assert [row.provider for row in rows] == ["eager", "torch fused", "superfine"]
    for row in rows:
        assert row.status == "ok", row.note
        assert list(row.split) == ["forward", "backward", "optimizer"]
        assert sum(row.split.values()) > 0


def test_without_peft_every_provider_says_how_to_get_it(monkeypatch):
    def missing(module, package):
        if module == "peft":
            raise UnavailableError("peft is not installed: pip install --no-deps peft")
        return require(module, package)

    require = train_step.require
    monkeypatch.setattr(train_step, "require", missing)
    case = train_step._case("llama", TINY, "LoRA")
    rows = measure(case, CPU, ONE_TURN)
    assert {row.status for row in rows} == {"unavailable"}
    assert {row.note for row in rows} == {"peft is not installed: pip install --no-deps peft"}
    assert case.cost().flops == 0


def test_flops_count_forward_input_gradients_and_weight_gradients():
    flops = {name: train_step._cost("gpt2", TINY, name).flops for name in SELECTIONS if name != "LoRA"}
    tokens, hidden = TINY.rows * TINY.tokens, TINY.hidden
    block, head = 12 * hidden**2, TINY.vocabulary * hidden
    assert flops["full"] == 6 * tokens * (3 * block + head)
    # The first trained product needs no gradient of its input; the frozen head does.
    assert flops["last:2"] == tokens * (2 * block + 2 * 6 * block + 4 * head)
    assert flops["head"] == tokens * (2 * 3 * block + 4 * head)
    assert flops["norms"] == 4 * tokens * (3 * block + head)


@pytest.mark.parametrize(("device", "dtypes"), [("cpu", 1), ("cuda", 2)])
def test_the_chosen_device_decides_on_the_sizes(device, dtypes):
    cases = superfine_bench.all_cases("train_step", device)
    quick = [case for case in cases if case.in_quick]
    assert len(quick) == 3 * dtypes
    assert {"12x768" in case.name for case in quick} == {device == "cuda"}
    assert len(superfine_bench.all_cases("adamw", device)) == len(superfine_bench.all_cases("adamw"))


def test_a_full_run_has_every_model_with_every_selection():
    cases = train_step.cases()
    names = {case.name for case in cases}
    for family in BASE:
        for selection in SELECTIONS:
            assert any(name.startswith(family) and name.endswith(f", {selection}") for name in names)
    quick = {case.name.replace(case.name.split()[1], "") for case in cases if case.in_quick}
    assert quick == {"bert  full", "bert  last:2", "gpt2  last:2"}
    assert len({case.key for case in cases}) == len(cases)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_compiled_steps_are_right_or_say_why_they_cannot_run():
    case = train_step._case("bert", TINY, "last:2")
    quick = [provider.name for provider in case.providers if provider.in_quick]
    rows = measure(case, CPU, replace(ONE_TURN, quick=False), leave_out=quick)
    assert [row.provider for row in rows] == ["torch fused, compiled", "superfine, compiled"]
    for row in rows:
        assert row.status in ("ok", "unavailable"), row.note
