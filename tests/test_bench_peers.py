"""Peers: each runs or says why not, a wrong one gets a row of its own, and the check cannot be remembered."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import superfine_bench
import torch
import torch.nn.functional as F
from superfine_bench import Settings, UnavailableError, adamw, cross_entropy, measure, peers

CPU = torch.device("cpu")
FAST = Settings(seconds=0.0, turns=6, quick=True)
SHAPES = ((40, 16), (7,))  # a matrix, and a tensor smaller than any vector
SMALL_CASES = (
    adamw.make_case("small", SHAPES, torch.float32),
    adamw.make_case("small", SHAPES, torch.bfloat16),
    adamw._case_8bit("small", SHAPES),
    cross_entropy._case(8, 33, torch.float32),
)
EVERYONE = (*peers.ADAMW, *peers.ADAMW_8BIT, *peers.CROSS_ENTROPY)

pytestmark = pytest.mark.usefixtures("one_thread")


def by_name(rows):
    return {row.provider: row for row in rows}


def install(monkeypatch, name, **attributes):
    """Make ``import name`` find a module with these attributes."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)


def hide(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.key)
def test_every_provider_runs_and_is_right_or_says_why_it_cannot_run(case):
    rows = measure(case, CPU, replace(FAST, quick=False), leave_out=["torch.compile"])
    assert rows
    for row in rows:
        assert row.status in ("ok", "unavailable"), (row.provider, row.note)
        assert row.status == "ok" or row.note


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    hide(monkeypatch, *(peer.module for peer in EVERYONE))
    for peer in EVERYONE:
        with pytest.raises(UnavailableError, match=f"{peer.package} is not installed: ") as raised:
            peer.load(torch.device(peer.devices[0]))
        assert (peer.install or f"pip install --no-deps {peer.package}") in str(raised.value)


def test_a_peer_whose_own_imports_fail_says_so(monkeypatch):
    def broken(name):
        raise ImportError("libcudart.so.99: cannot open")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UnavailableError, match=r"liger-kernel cannot be imported here: libcudart\.so\.99"):
        peers.require("liger_kernel", "liger-kernel")


def test_a_peer_without_a_kernel_for_the_device_is_not_imported(monkeypatch):
    monkeypatch.setattr(peers, "require", lambda *arguments: pytest.fail("was imported"))
    with pytest.raises(UnavailableError, match="liger-kernel has no cpu kernel for this"):
        peers.CROSS_ENTROPY[0].load(CPU)


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_loss_of_a_peer_is_measured_if_right_and_wrong_if_not(monkeypatch, factor):
    install(monkeypatch, "fake.losses", loss=lambda x, t, reduction: factor * F.cross_entropy(x, t))
    fake = peers.Peer("fake", "fake", "fake.losses", "loss", options={"reduction": "mean"}, devices=("cpu",))
    case = cross_entropy._case(8, 33, torch.float32)
    provider = superfine_bench.Provider("fake", lambda inputs: cross_entropy._peer(inputs, peer=fake))
    rows = by_name(measure(replace(case, providers=(case.providers[0], provider)), CPU, FAST))
    assert rows["torch eager"].status == "ok"
    assert rows["fake"].status == ("ok" if factor == 1 else "wrong")
    assert (rows["fake"].median_ms is None) == (factor != 1)


class OtherNames(torch.optim.AdamW):
    """AdamW whose state has other names, as bitsandbytes' has, and a wrong result on request."""

    wrong = 1.0

    def step(self, closure=None):
        for state in self.state.values():
            state.update(exp_avg=state["state1"], exp_avg_sq=state["state2"])
            state["step"] = torch.as_tensor(float(state["step"]))
        super().step()
        for state in self.state.values():
            state["state1"].mul_(self.wrong)


@pytest.mark.parametrize("wrong", [1.0, 1.0001])
def test_an_optimizer_of_a_peer_works_on_the_moments_of_the_case(monkeypatch, wrong):
    install(monkeypatch, "fake", AdamW=type("AdamW", (OtherNames,), {"wrong": wrong}))
    fake = peers.Peer("fake", "fake", "fake", "AdamW", devices=("cpu",), moments=("state1", "state2"))
    case = adamw.make_case("small", SHAPES, torch.float32)
    provider = superfine_bench.Provider("fake", lambda inputs: adamw._peer(inputs, peer=fake))
    rows = by_name(measure(replace(case, providers=(case.providers[0], provider)), CPU, FAST))
    assert rows["torch fused"].status == "ok"
    assert rows["fake"].status == ("ok" if wrong == 1 else "wrong")


def test_a_peer_that_needs_fp32_moments_is_not_given_others(monkeypatch):
    install(monkeypatch, "fake", AdamW=torch.optim.AdamW)
    fake = peers.Peer("fake", "fake", "fake", "AdamW", devices=("cpu",), fp32_moments=True)
    inputs = adamw.make_case("small", SHAPES, torch.bfloat16).inputs(CPU)
    with pytest.raises(UnavailableError, match="keeps float32 moments; this case has bfloat16 ones"):
        adamw._peer(inputs, peer=fake)


def test_the_check_of_8_bit_moments_holds_at_every_step_and_sees_a_wrong_rate():
    case = adamw._case_8bit("small", SHAPES)
    inputs = case.inputs(CPU)
    exact = torch.optim.AdamW(inputs.params, **adamw.HYPERPARAMETERS)
    call = adamw._counted(exact.step)
    assert all(case.check(inputs, call) < 0.1 for _ in range(3))
    exact.param_groups[0]["lr"] *= 1.2
    assert case.check(inputs, call) > 1


def test_redrawn_inputs_expect_other_results_and_find_out_who_remembers():
    case = cross_entropy._case(8, 33, torch.float32)
    inputs = case.inputs(CPU)
    call = case.providers[0].build(inputs)
    remembered = call()
    expected = inputs.expected_loss, inputs.expected_grad_rows.clone(), inputs.logits.data_ptr()
    assert case.check(inputs, lambda: remembered) <= 1

    case.redraw(inputs, 1)
    case.before(inputs)
    assert inputs.expected_loss != expected[0]
    assert not torch.equal(inputs.expected_grad_rows, expected[1])
    assert inputs.logits.data_ptr() == expected[2]
    assert case.check(inputs, lambda: remembered) > 1
    assert case.check(inputs, call) <= 1

    case.redraw(inputs, 0)
    assert (inputs.expected_loss, inputs.logits.data_ptr()) == (expected[0], expected[2])


def test_the_cost_of_a_call_is_measured_with_warm_caches_and_bandwidth_with_cold_ones():
    resident = {case.key for case in superfine_bench.all_cases() if case.resident}
    assert resident == {
        "adamw/300 tensors of 768/float32",
        "lamb/300 tensors of 768/float32",
        "cross_entropy/32x3/float32",
        "bce_with_logits/32/float32",
        "layer_norm/1x64/float32",
        "rms_norm/1x64/float32",
    }


def test_the_install_line_names_each_peer_once_and_none_that_pip_has_under_another_name():
    words = peers.install_line().split()
    for peer in EVERYONE:
        assert words.count(peer.package) == (0 if peer.install else 1), peer.name
    assert words.count("peft") == 1
    assert words[:3] == ["pip", "install", "--no-deps"]
    assert "torch" not in words
