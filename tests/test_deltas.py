"""Several deltas on one base, weights between base and tuned, and the way back to the base's bits."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import bert, gpt2, perturb
from superfine.delta import load_delta, merge, save_delta
from superfine.deltas import Deltas
from superfine.select import select
from support import same_bits
from torch import nn


@pytest.fixture
def three(tmp_path):
    """A base, and tuned copies by name: of the head, of the last layer, and of both with a buffer moved."""
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    tuned = {}
    for name, selectors in (("head", ("3.*",)), ("last", ("2.*",)), ("both", ("2.*", "3.*"))):
        model = copy.deepcopy(base)
        plan = select(model, *selectors)
        perturb(plan)
        if name == "both":
            model(torch.randn(8, 4))  # moves BatchNorm's statistics
        save_delta(model, plan, tmp_path / name)
        tuned[name] = model
    return base, tuned, tmp_path


def assert_same(model, expected):
    for name, value in expected.state_dict().items():
        assert same_bits(model.state_dict()[name], value), name


def test_switching_gives_each_models_bits_and_the_bases(three):
    base, tuned, folder = three
    model = copy.deepcopy(base)
    deltas = Deltas(model)
    for name in tuned:
        deltas.add(name, folder / name)
        assert_same(model, base)
    assert deltas.names == ("head", "last", "both")
    for name in ("head", "both", "last", "both", None, "head", None):
        deltas.switch(name)
        assert deltas.active == name
        assert_same(model, base if name is None else tuned[name])


def test_a_delta_can_be_added_and_removed_while_another_is_active(three):
    base, tuned, folder = three
    model = copy.deepcopy(base)
    deltas = Deltas(model)
    deltas.add("both", folder / "both")
    deltas.switch("both")
    deltas.add("head", folder / "head")
    assert_same(model, tuned["both"])
    size = deltas.nbytes
    deltas.remove("both")
    assert_same(model, base)
    assert (deltas.active, deltas.names) == (None, ("head",))
    assert deltas.nbytes < size
    deltas.switch("head")
    assert_same(model, tuned["head"])


def test_only_what_deltas_touch_is_kept(three):
    _, tuned, folder = three
    model = copy.deepcopy(three[0])
    deltas = Deltas(model)
    deltas.add("head", folder / "head")
    buffers = 4 * 4 + 4 * 4 + 8
    assert deltas.nbytes == 2 * (4 * (8 + 2) + buffers)  # the delta, and the base's values of the same
    assert tuned


def test_averages(three):
    base, tuned, folder = three
    model = copy.deepcopy(base)
    deltas = Deltas(model)
    for name in tuned:
        deltas.add(name, folder / name)
    deltas.average({"head": 0.25, "both": 0.75})
    assert deltas.active == "average"
    state, start = model.state_dict(), base.state_dict()
    ours = {name: tuned[name].state_dict() for name in tuned}
    for key in ("2.weight", "3.weight", "1.running_mean"):
        expected = torch.zeros_like(start[key], dtype=torch.float64)
        for name, weight in (("head", 0.25), ("both", 0.75)):
            expected += weight * (ours[name][key].double() - start[key].double())
        torch.testing.assert_close(state[key].double(), start[key].double() + expected, rtol=1e-6, atol=1e-7)
    assert state["1.num_batches_tracked"] == 1  # of the heavier
    for weight, expected in ((1.0, tuned["last"]), (0.0, base)):
        deltas.average({"last": weight})
        assert_same(model, expected)
    deltas.average({"last": -1.0})
    torch.testing.assert_close(model[2].weight, 2 * base[2].weight - tuned["last"][2].weight)
    deltas.switch(None)
    assert_same(model, base)


def test_bad_names_files_and_bases(three):
    base, _, folder = three
    deltas = Deltas(copy.deepcopy(base))
    deltas.add("head", folder / "head")
    for name in ("head", "average", "", None):
        with pytest.raises(ValueError, match="expected a new one"):
            deltas.add(name, folder / "last")
    with pytest.raises(ValueError, match="there is no delta 'tail'; expected one of: 'head'"):
        deltas.switch("tail")
    with pytest.raises(ValueError, match="there is no delta 'tail'"):
        deltas.average({"tail": 1.0})
    for weights in ({}, {"head": float("nan")}):
        with pytest.raises(ValueError, match="expected names with finite numbers"):
            deltas.average(weights)
    with pytest.raises(FileNotFoundError):
        deltas.add("none", folder / "none")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(
        ValueError, match=r"'head' expects base .*trained on another base, or the model was trained"
    ):
        Deltas(other).add("head", folder / "head")
    with pytest.raises(TypeError, match="model is dict"):
        Deltas({})


def test_tied_weights_and_low_precision(tmp_path):
    base = gpt2().bfloat16()
    tuned = copy.deepcopy(base)
    plan = select(tuned, "head", "embeddings")
    perturb(plan)
    save_delta(tuned, plan, tmp_path / "d")
    model = copy.deepcopy(base)
    deltas = Deltas(model)
    deltas.add("d", tmp_path / "d")
    deltas.average({"d": 0.5})
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = (base.lm_head.weight.double() + tuned.lm_head.weight.double()) / 2
    assert torch.equal(model.lm_head.weight, expected.bfloat16())
    deltas.switch(None)
    assert_same(model, base)


# ---- a weight between base and tuned ----


def test_load_delta_stops_part_of_the_way(three):
    base, tuned, folder = three
    model = copy.deepcopy(base)
    load_delta(model, folder / "both", weight=0.25)
    for key in ("2.weight", "3.bias", "1.running_var"):
        expected = torch.lerp(base.state_dict()[key].double(), tuned["both"].state_dict()[key].double(), 0.25)
        assert torch.equal(model.state_dict()[key], expected.float()), key
    assert int(model[1].num_batches_tracked) == 1
    for weight, expected in ((0.0, base), (1.0, tuned["last"])):
        model = copy.deepcopy(base)
        load_delta(model, folder / "last", weight=weight)
        assert_same(model, expected)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"weight is .*; expected a number from 0 to 1"):
            load_delta(base, folder / "last", weight=weight)


def test_merge_between_base_and_tuned_takes_a_new_head_whole(tmp_path):
    import json

    from superfine.cli import app
    from typer.testing import CliRunner

    encoder = bert("BertModel")
    encoder.save_pretrained(tmp_path / "base")
    tuned = bert()
    tuned.bert.load_state_dict(encoder.state_dict())
    plan = select(tuned, "last:1", "head")
    perturb(plan)
    extra = {"model_class": type(tuned).__name__, "config": json.dumps({"num_labels": 3})}
    save_delta(tuned, plan, tmp_path / "d", extra=extra)
    merge(tmp_path / "base", tmp_path / "d", tmp_path / "out", weight=0.5)
    merged = type(tuned).from_pretrained(tmp_path / "out")
    assert torch.equal(merged.classifier.weight, tuned.classifier.weight)
    expected = (
        encoder.encoder.layer[3].output.dense.weight + tuned.bert.encoder.layer[3].output.dense.weight
    ) / 2
    torch.testing.assert_close(merged.bert.encoder.layer[3].output.dense.weight, expected)
    arguments = ["merge", str(tmp_path / "d"), str(tmp_path / "cli"), "--base", str(tmp_path / "base")]
    done = CliRunner().invoke(app, [*arguments, "--weight", "0.5"])
    assert done.exit_code == 0, done.output
    again = type(tuned).from_pretrained(tmp_path / "cli")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in merged.state_dict().items())
