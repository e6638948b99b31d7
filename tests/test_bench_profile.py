"""The profile: shares that sum to the whole, native kernels in rows of their own, memory over time."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from superfine.cli import app
from superfine_bench import Case, Ceilings, Provider, UnavailableError, counters
from superfine_bench.adamw import PROVIDERS, make_case
from superfine_bench.counters import DRAM_BYTES, SM_PERCENT, Counters, read_counters
from superfine_bench.profile import Profile, find_case, print_profile, profile_case
from superfine_bench.trace import NATIVE, Trace
from typer.testing import CliRunner

from superfine_kernels import _cpu

CPU = torch.device("cpu")
CEILINGS = Ceilings("cpu", {"copy": [(2**20, 30.0)], "4r3w": [(2**20, 30.0)]})


@pytest.fixture
def adamw():
    """AdamW on four small tensors, and the provider of a name."""
    case = make_case("4 tensors of 768", ((768,),) * 4, torch.float32)
    return case, {provider.name: provider for provider in PROVIDERS}


def profiled(case, provider, folder, **options) -> Profile:
    return profile_case(case, provider, CPU, folder, CEILINGS, **options)


def printed(profile):
    text = io.StringIO()
    print_profile(Console(width=120, file=text), profile)
    return text.getvalue()


def share_of(profile, name):
    return sum(entry.share for entry in profile.entries if entry.name == name)


def test_writes_a_trace_the_numbers_and_a_picture(adamw, tmp_path):
    case, providers = adamw
    profile = profiled(case, providers["superfine"], tmp_path / "new", calls=3)
    with gzip.open(tmp_path / "new" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == "adamw: superfine" and event["ph"] == "X" for event in events) == 3
    assert json.loads((tmp_path / "new" / "profile.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(profile))
    )
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert [file.rsplit("/", 1)[1] for file in profile.files] == [
        "trace.json.gz",
        "memory.png",
        "profile.json",
    ]


@pytest.mark.parametrize("provider", ["superfine", "torch foreach"])
def test_shares_sum_to_the_whole(adamw, tmp_path, provider):
    case, providers = adamw
    profile = profiled(case, providers[provider], tmp_path)
    assert sum(entry.share for entry in profile.entries) == pytest.approx(100, abs=0.1)
    assert sum(entry.ms for entry in profile.entries) == pytest.approx(profile.profiled_ms, rel=1e-3)
    assert profile.entries == sorted(profile.entries, key=lambda entry: -entry.share)
    assert share_of(profile, f"adamw: {provider}") == pytest.approx(
        100 * profile.gap_ms / profile.profiled_ms
    )


def test_a_native_kernel_has_a_row_and_its_module_is_as_before(adamw, tmp_path):
    case, providers = adamw
    before = dict(vars(_cpu))
    profile = profiled(case, providers["superfine"], tmp_path)
    native = [entry for entry in profile.entries if entry.name.startswith(f"{NATIVE}adamw")]
    assert sum(entry.calls for entry in native) == 1
    assert dict(vars(_cpu)) == before


def test_rates_come_from_the_cost_and_calls_without_the_profiler(adamw, tmp_path):
    case, providers = adamw
    large = replace(case, cost=lambda: Traffic(bytes=2**25, flops=2**20))
    row = profiled(large, providers["superfine"], tmp_path).row
    assert (row.op, row.case, row.provider, row.device) == ("adamw", "4 tensors of 768", "superfine", "cpu")
    assert row.gb_per_s == pytest.approx(2**25 / row.median_ms / 1e6)
    assert row.percent_of_ceiling == pytest.approx(100 * row.gb_per_s / 30.0)


@dataclasses.dataclass(frozen=True)
class Traffic:
    bytes: int = 64
    flops: int = 0


def case_of(build) -> Case:
    return Case(
        op="steps",
        name="one",
        dtype="float32",
        work="what a test needs",
        cost=Traffic,
        traffic="copy",
        memory=64,
        inputs=lambda device: torch.ones(2**16, device=device),
        before=lambda inputs: None,
        check=lambda inputs, call: 0.0,
        providers=(Provider("only", build),),
    )


def test_memory_is_what_a_call_allocates_beyond_its_inputs(tmp_path):
    def build(inputs):
        def call():
            doubled = inputs * 2  # 256 KiB
            return doubled + 1  # as much again, while the first is there

        return call

    case = case_of(build)
    profile = profiled(case, case.providers[0], tmp_path)
    assert profile.peak_memory == pytest.approx(2 * 4 * 2**16, abs=4096)  # and a few scalars
    assert profile.memory[0] == (0.0, 0)
    assert profile.memory[-1][1] == pytest.approx(4 * 2**16, abs=4096)
    times = [milliseconds for milliseconds, _ in profile.memory]
    assert times == sorted(times)


def test_the_parts_of_a_step_are_shown(tmp_path):
    def build(inputs):
        def call():
            for name in ("forward", "backward"):
                with torch.profiler.record_function(name):
                    inputs.mul(2)

        return call

    case = case_of(build)
    profile = profiled(case, case.providers[0], tmp_path)
    assert list(profile.parts) == ["forward", "backward"]
    assert all(milliseconds > 0 for milliseconds in profile.parts.values())
    assert "backward " in printed(profile)


def test_what_prepares_a_call_is_not_counted(tmp_path):
    case = case_of(lambda inputs: lambda: inputs.mul(2))
    case = replace(case, before=lambda inputs: inputs.tanh())
    profile = profiled(case, case.providers[0], tmp_path)
    assert share_of(profile, "aten::mul") > 0
    assert share_of(profile, "aten::tanh") == 0


def test_prints_rates_rows_and_why_counters_are_missing(adamw, tmp_path):
    case, providers = adamw
    text = printed(profiled(case, providers["superfine"], tmp_path, ncu=True))
    assert "adamw  4 tensors of 768, float32, cpu: superfine" in text
    assert "GB/s" in text
    assert f"{NATIVE}adamw" in text
    assert "no counters: not a GPU" in text
    assert "DRAM" not in text  # a column that nothing is in


def test_a_provider_that_cannot_run_says_so(tmp_path):
    def build(inputs):
        raise UnavailableError("not installed")

    case = case_of(build)
    with pytest.raises(UnavailableError, match="not installed"):
        profiled(case, case.providers[0], tmp_path)


def test_calls_must_be_at_least_one(adamw, tmp_path):
    case, providers = adamw
    with pytest.raises(ValueError, match="profile_case: calls is 0; expected at least 1"):
        profiled(case, providers["superfine"], tmp_path / "new", calls=0)
    assert not (tmp_path / "new").exists()


def test_finds_a_case_by_a_part_of_its_name_and_a_provider_by_name():
    case, provider = find_case("adamw", "300 tensors", "torch foreach")
    assert case.name == "300 tensors of 768"
    assert provider.name == "torch foreach"
    assert find_case("adamw")[1].name == "superfine"
    assert find_case("train", "full", "eager", "cuda")[0].name == "bert 12x768, full"
    assert find_case("train", "full", "eager", "cpu")[0].name == "bert 4x256, full"


def test_a_provider_that_cannot_run_here_is_a_wrong_argument(tmp_path):
    arguments = ["profile", "adamw", "--case", "300", "--device", "cpu", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, [*arguments, "--provider", "apex FusedAdam"])
    assert result.exit_code == 2
    assert "provider is 'apex FusedAdam'; expected one that can run here (apex" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adam",), "did you mean 'adamw'"),
        (("trian",), "did you mean 'train'"),
        (
            ("adamw", "300 tensor of 768/float32"),
            r"case is '300 tensor of .*did you mean '.*300 tensors of 768",
        ),
        (("adamw", None, "superfin"), r"provider is 'superfin'; expected one of .*did you mean 'superfine'"),
    ],
)
def test_what_cannot_be_found_is_an_error_with_a_near_miss(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_case(*arguments)


# --- what a GPU's trace and counters look like -----------------------------------------------------------------


@pytest.fixture
def gpu_trace(tmp_path):
    """Two calls of 100 us; in the first two kernels overlap, then one of 20 us runs alone."""

    def event(category, name, start, duration, **args):
        return {
            "ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": start, "dur": duration, "args": args,
        }  # fmt: skip

    def memory(at, total, change, device=0):
        args = {"Total Allocated": total, "Bytes": change, "Device Type": 1, "Device Id": device}
        return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "args": args}

    launch = {"registers per thread": 32, "shared memory": 0, "block": [256, 1, 1]}
    events = [
        {"ph": "M", "name": "process_name", "ts": 0},
        event("user_annotation", "op: ours", 1000, 100),
        event("gpu_user_annotation", "op: ours", 1010, 80),
        event("user_annotation", "op: ours", 2000, 100),
        event("kernel", "a", 1010, 40, **launch),
        event("kernel", "b", 1030, 40, **launch),
        event("gpu_memset", "Memset (Device)", 1080, 20),
        event("kernel", "a", 1500, 40, **launch),  # between the calls
        event("gpu_user_annotation", "forward", 2010, 30),
        event("user_annotation", "forward", 2001, 5),
        event("cpu_op", "aten::mul", 2002, 3),
        memory(2003, 700, 200),
        memory(2004, 9000, 5000, device=1),
        memory(2050, 400, -300),
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return Trace(path, "op: ours")


def test_a_gpu_trace_gives_kernels_gaps_parts_and_memory(gpu_trace):
    assert gpu_trace.wall_us == 200
    kernels = gpu_trace.kernels()
    assert {name: (total.calls, total.us) for name, total in kernels.items()} == {
        "a": (1, 40),
        "b": (1, 40),
        "Memset (Device)": (1, 20),
    }
    assert kernels["a"].launch["block"] == [256, 1, 1]
    assert gpu_trace.busy_us() == 80  # 20 us of the first two are the same
    assert gpu_trace.parts(("forward", "backward"), on_gpu=True) == {"forward": 0.015}
    assert gpu_trace.parts(("forward", "backward"), on_gpu=False) == {"forward": 0.0025}
    assert gpu_trace.memory(on_gpu=True, index=0) == [(0.0, 0), (0.003, 200), (0.05, -100), (0.1, -100)]


def test_self_times_leave_out_what_is_called(gpu_trace):
    ops = {name: (total.calls, total.us) for name, total in gpu_trace.ops().items()}
    assert ops == {"op: ours": (2, 195), "forward": (1, 2), "aten::mul": (1, 3)}


def test_a_trace_without_the_range_is_an_error(gpu_trace, tmp_path):
    with pytest.raises(
        ValueError, match=r"Trace: label is 'other'; expected a name that .*trace.json.gz has"
    ):
        Trace(tmp_path / "trace.json.gz", "other")


def test_counters_are_summed_over_launches_of_a_kernel():
    lines = [
        "what the program printed",
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
        f'"0","void ours::step<float>(int)","{DRAM_BYTES}","Mbyte","1,000.5"',
        f'"0","void ours::step<float>(int)","{SM_PERCENT}","%","40"',
        f'"1","void ours::step<float>(int)","{DRAM_BYTES}","byte","500000"',
        f'"1","void ours::step<float>(int)","{SM_PERCENT}","%","60"',
    ]
    assert counters.parse("\n".join(lines)) == {"step<float>": Counters(1_001_000_000.0, 50.0)}
    assert counters.parse("==ERROR== nothing was profiled") == {}


def test_counters_that_cannot_be_read_come_with_the_reason(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert (
        read_counters("adamw/a/float32", "superfine", "cuda") == "no counters: ncu is not on the search path"
    )
    monkeypatch.setattr(counters.shutil, "which", lambda name: "/bin/ncu")
    for output, code, reason in [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission",
            1,
            "driver keeps them from this user",
        ),
        ("==ERROR== something else", 9, "ncu ended with code 9: ==ERROR== something else"),
        ("", 0, "ncu saw no kernel"),
    ]:
        ran = counters.subprocess.CompletedProcess([], code, stdout=output, stderr="")
        monkeypatch.setattr(counters.subprocess, "run", lambda command, ran=ran, **options: ran)
        assert reason in read_counters("adamw/a/float32", "superfine", "cuda")
