"""Delta files: what they hold, what they refuse, and that base + delta is the tuned model, bit for bit."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import bert, gpt2, llama, logits, mlp, perturb, roberta, t5
from superfine import delta as delta_module
from superfine import slices
from superfine.delta import DeltaInfo, base_hash, load_delta, save_delta
from superfine.select import select
from support import contents
from torch import nn


@pytest.fixture
def saved(tmp_path):
    """An MLP base, the tuned copy of it, its plan and the delta file."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    tuned = copy.deepcopy(base)
    plan = select(tuned, "last:1")
    perturb(plan)
    path = tmp_path / "delta.safetensors"
    save_delta(tuned, plan, path, extra={"note": "hello"})
    return base, tuned, plan, path


# ---- round trips ----


@pytest.mark.parametrize(
    ("build", "selectors"),
    [
        (bert, ("last:1", "head")),
        (roberta, ("biases", "norms")),
        (gpt2, ("head", "embeddings")),  # one tied parameter under two names
        (llama, ("last:1", "head")),
        (t5, ("last:1", "norms")),
        (bert, ("all",)),
    ],
)
def test_base_plus_delta_is_the_tuned_model(tmp_path, build, selectors):
    base = build()
    tuned = copy.deepcopy(base)
    plan = select(tuned, *selectors)
    perturb(plan)
    save_delta(tuned, plan, tmp_path / "delta.safetensors")
    assert not torch.equal(logits(base), logits(tuned))
    info = load_delta(base, tmp_path / "delta.safetensors")
    assert torch.equal(logits(base), logits(tuned))
    assert info == DeltaInfo(plan.names, selectors, base_hash(tuned, plan.names), {})
    assert contents(tmp_path) == ["delta.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_round_trips(tmp_path, dtype):
    base = nn.Linear(3, 2).to(dtype)
    tuned = copy.deepcopy(base)
    plan = select(tuned, "weight")
    perturb(plan)
    save_delta(tuned, plan, tmp_path / "d.safetensors")
    load_delta(base, tmp_path / "d.safetensors")
    assert torch.equal(base.weight, tuned.weight)


def test_file_holds_the_selection_buffers_and_metadata(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    plan = select(model, "2.*")
    model(torch.randn(8, 4))  # moves the running statistics
    save_delta(model, plan, tmp_path / "delta.safetensors", extra={"task": "{}"})
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert load_file(tmp_path / "delta.safetensors").keys() == {"2.weight", "2.bias"} | statistics
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["task"]) == ("superfine-delta", "2", "{}")
    assert json.loads(metadata["names"]) == ["2.weight", "2.bias"]
    assert json.loads(metadata["selectors"]) == ["2.*"]
    assert json.loads(metadata["versions"])["torch"] == torch.__version__

    fresh = copy.deepcopy(model)
    fresh[1].reset_running_stats()
    load_delta(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)
    assert int(fresh[1].num_batches_tracked) == 1


def test_slices_of_a_larger_memory_are_saved_alone(tmp_path):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(100, 8)[3:7, ::2])
    plan = select(model, "weight")
    save_delta(model, plan, tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").stat().st_size < 2000
    fresh = nn.Linear(4, 4)
    fresh.bias = copy.deepcopy(model.bias)
    load_delta(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh.weight, model.weight)


def test_loading_keeps_requires_grad_and_returns_extra(saved):
    base, tuned, _, path = saved
    flags = [parameter.requires_grad for parameter in base.parameters()]
    info = load_delta(base, path)
    assert info.extra == {"note": "hello"}
    assert info.selectors == ("last:1",)
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    load_delta(tuned, path)  # idempotent: what the delta holds does not count for the base's identity


def test_base_hash_sees_names_dtypes_shapes_and_bits_but_not_the_selection():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    start = base_hash(model, ["1.weight"])
    assert start == base_hash(copy.deepcopy(model), ["1.weight"])
    with torch.no_grad():
        model[1].weight.add_(1)
    assert base_hash(model, ["1.weight"]) == start
    assert base_hash(model, ["1.bias"]) != start
    assert base_hash(copy.deepcopy(model).double(), ["1.weight"]) != start
    strided = copy.deepcopy(model)
    strided[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert base_hash(strided, ["1.weight"]) == start  # strides are not values
    strided[0].weight.data.view(torch.int32)[0, 0] ^= 1
    assert base_hash(strided, ["1.weight"]) != start


# ---- slices ----


SLICED = [
    (llama, {"rows": {"lm_head": [3, 30]}, "cols": {"*.down_proj": 0.2}}),
    (gpt2, {"rows": {"wte": [3, 4, 5]}, "cols": {"*.c_fc": [0, 2]}}),
    (lambda: llama(tied=True), {"rows": {"lm_head": [3, 5]}, "tied": "head"}),
]


@pytest.mark.parametrize(("build", "chosen"), SLICED)
def test_base_plus_slices_is_the_tuned_model(tmp_path, build, chosen):
    base = build()
    tuned, path = copy.deepcopy(base), tmp_path / "delta.safetensors"
    plan = select(tuned, "norms", **chosen)
    start = base_hash(tuned, plan.names, plan.slices)
    slices.install(tuned, plan.slices)
    perturb(plan)
    assert base_hash(tuned, plan.names, plan.slices) == start  # the slice's region does not count
    save_delta(tuned, plan, path)
    outputs, saved = logits(tuned), load_file(path)
    slices.remove(tuned)
    save_delta(tuned, plan, path)
    again = load_file(path)  # installed or not
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)

    info = load_delta(base, path)
    assert info == DeltaInfo(plan.names, plan.selectors, start, {}, plan.slices)
    assert torch.equal(logits(base), outputs)
    load_delta(base, path)  # idempotent
    assert torch.equal(logits(base), outputs)


def test_a_delta_goes_into_a_model_with_slices_of_its_own(tmp_path):
    base = llama()
    tuned, whole, path = copy.deepcopy(base), copy.deepcopy(base), tmp_path / "delta.safetensors"
    plan = select(tuned, rows={"lm_head": [3, 5]})
    slices.install(tuned, plan.slices)
    perturb(plan)
    save_delta(tuned, plan, path)
    slices.install(base, select(base, rows={"lm_head": [5, 7]}).slices)
    load_delta(base, path)
    assert torch.equal(base.lm_head.weight_rows[0], tuned.lm_head.weight_rows[1])
    assert torch.equal(logits(base), logits(tuned))
    all_of_it = select(whole, "head")
    perturb(all_of_it)
    save_delta(whole, all_of_it, path)
    load_delta(base, path)
    assert torch.equal(logits(base), logits(whole))


def test_a_delta_of_slices_is_as_small_as_they_are(tmp_path):
    model = nn.Sequential(nn.Embedding(4000, 64), nn.Linear(64, 4000))
    plan = select(model, rows={"0": range(40), "1": "random:0.01"})
    save_delta(model, plan, tmp_path / "delta.safetensors")
    whole = 4 * plan.num_total
    share = plan.num_trainable / plan.num_total
    assert (tmp_path / "delta.safetensors").stat().st_size <= (share + 0.01) * whole


def test_the_rest_of_a_sliced_weight_must_be_the_base(tmp_path):
    base, path = llama(), tmp_path / "delta.safetensors"
    plan = select(base, rows={"lm_head": [3, 5]})
    save_delta(base, plan, path)
    with torch.no_grad():
        base.lm_head.weight[5] += 1
    load_delta(base, path)
    with torch.no_grad():
        base.lm_head.weight[4] += 1
    refused(base, path, "belongs to another base")
    refused(mlp(), path, r"model has no parameter 'lm_head\.weight'")
    refused(base.double(), path, r"'lm_head\.weight_rows' in the delta is float32 \(2, 8\); expected float64")


def test_files_of_version_1_are_read(saved):
    base, tuned, _, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"version": "1"}
    del metadata["content_hash"], metadata["slices"]
    metadata["content_hash"] = delta_module._content_hash(metadata, tensors)
    save_file(tensors, path, metadata)
    assert load_delta(base, path).slices == ()
    assert torch.equal(base[2].weight, tuned[2].weight)


@pytest.mark.parametrize(
    "stated",
    ["1", "[1]", "[{}]", '[{"name": "2.weight", "dim": 0, "untie": false}]', '[{"name": "2", "dim": "x"}]'],
)
def test_crafted_slices_are_refused(saved, stated):
    base, _, _, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"slices": stated}
    del metadata["content_hash"]
    tensors |= {"2.weight_rows": torch.ones(2, 4), "2.weight_rows.indices": torch.tensor([1, 1])}
    metadata["content_hash"] = delta_module._content_hash(metadata, tensors)
    save_file(tensors, path, metadata)
    refused(base, path, "without a list of slices|no fitting values and indices")


# ---- what loading refuses ----


def refused(model, path, message, error=ValueError):
    """Loading fails with ``message`` and the model keeps its bits."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_delta(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_wrong_base_is_refused(saved):
    base, _, _, path = saved
    with torch.no_grad():
        base[0].bias[0] += 1e-6
    refused(base, path, r"expected base [0-9a-f]{64}, got [0-9a-f]{64}: this delta belongs to another base")


def test_wrong_dtype_shape_and_names_are_refused(saved):
    base, _, _, path = saved
    refused(
        copy.deepcopy(base).double(),
        path,
        r"dtype of '2.weight' \(and 1 other\) is float64 in the model; expected",
    )
    wider = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    refused(wider, path, r"shape of '2.weight' \(and 1 other\) is \(3, 4\) in the model; expected \(2, 4\)")
    refused(nn.Sequential(nn.Linear(4, 4)), path, r"model has no '2.weight' \(and 1 other\)")
    with_buffers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    refused(with_buffers, path, "the delta lacks '1.running_mean'")


def test_a_tie_that_the_tuned_model_did_not_have_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    save_delta(model, select(model, "1.*"), tmp_path / "delta.safetensors")
    model[1].weight = model[0].weight
    refused(model, tmp_path / "delta.safetensors", "model has no '1.weight'|another base")


def test_missing_and_foreign_files_are_refused(tmp_path, saved):
    base = saved[0]
    refused(base, tmp_path / "none.safetensors", "expected a delta file", FileNotFoundError)
    refused(base, tmp_path, "expected a delta file", FileNotFoundError)
    save_file({"2.weight": torch.zeros(2, 4)}, tmp_path / "plain.safetensors")
    refused(base, tmp_path / "plain.safetensors", "a safetensors file of another kind")
    (tmp_path / "text").write_text("hello")
    refused(base, tmp_path / "text", "truncated or no safetensors file")
    torch.save({"2.weight": torch.zeros(2, 4)}, tmp_path / "pickle.pt")
    refused(base, tmp_path / "pickle.pt", "truncated or no safetensors file")


def test_newer_version_is_refused(saved):
    base, _, _, path = saved
    path.write_bytes(path.read_bytes().replace(b'"version":"2"', b'"version":"3"'))
    refused(base, path, "a delta of version 3; expected version 1 or 2")


@pytest.mark.parametrize("names", [None, "1", "[1]", '{"2.weight": 1}', "["])
def test_crafted_statements_are_refused(saved, names):
    base, _, _, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = {
            key: value for key, value in file.metadata().items() if key not in ("names", "content_hash")
        }
    metadata |= {} if names is None else {"names": names}
    metadata["content_hash"] = delta_module._content_hash(metadata, tensors)
    save_file(tensors, path, metadata)
    refused(base, path, "without a list of names; expected a delta")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed(saved, data):
    base, tuned, _, path = saved
    good = path.read_bytes()
    if data.draw(st.booleans(), label="truncate"):
        bad = good[: data.draw(st.integers(0, len(good) - 1), label="length")]
    else:
        position = data.draw(st.integers(0, len(good) - 1), label="position")
        bad = bytearray(good)
        bad[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(bad)
    model = copy.deepcopy(base)
    try:
        load_delta(model, damaged)
    except ValueError:
        expected = base
    else:  # a flip that says the same thing in JSON, such as between kinds of white space
        expected = tuned
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(expected.named_parameters())[name])


# ---- what saving refuses, and that failures leave the previous file ----


def test_bad_save_arguments(saved):
    _, tuned, plan, path = saved
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"extra\['epoch'\] is int; expected strings only"):
        save_delta(tuned, plan, path, extra={"epoch": 3})
    with pytest.raises(ValueError, match="extra has the key 'format'; expected none of"):
        save_delta(tuned, plan, path, extra={"format": "mine"})
    with pytest.raises(ValueError, match=r"model has no parameter '2.weight' \(and 1 other\)"):
        save_delta(nn.Sequential(nn.Linear(4, 4)), plan, path)
    with pytest.raises(ValueError, match="on the meta device"):
        save_delta(copy.deepcopy(tuned).to("meta"), plan, path)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        save_delta(tuned, plan, path.parent / "none" / "delta.safetensors")
    assert path.read_bytes() == before
    assert contents(path.parent) == ["delta.safetensors"]


def test_exception_in_the_writer_keeps_the_previous_file(saved, monkeypatch):
    _, tuned, plan, path = saved
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(delta_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_delta(tuned, plan, path)
    assert path.read_bytes() == before
    assert contents(path.parent) == ["delta.safetensors"]


def test_real_write_error_keeps_the_previous_file(saved):
    _, tuned, plan, path = saved
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # write then fails with EFBIG, as a full disk with ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"save_delta: path is .*; writing it failed"):
            save_delta(tuned, plan, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert contents(path.parent) == ["delta.safetensors"]


def test_kill_during_a_save_leaves_the_previous_file(saved):
    base, tuned, _, path = saved
    before = path.read_bytes()
    # The child saves something else to the same path and is stopped between writing and renaming.
    script = """
import os, sys, time, torch
from superfine import delta
from superfine.select import select
def stall(source, target):
    print("written", flush=True)
    time.sleep(60)
os.replace = stall
model = torch.nn.Linear(3, 3)
delta.save_delta(model, select(model, "all"), sys.argv[1])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    load_delta(base, path)
    assert torch.equal(base[2].weight, tuned[2].weight)
