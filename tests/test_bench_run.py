"""superfine bench as a whole: what is on disk, what is resumed, who may crash without ending the run."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import planted_cases
import pytest
import torch
from superfine.cli import app
from superfine_bench import (
    Ceilings,
    Provider,
    Settings,
    UnavailableError,
    isolate,
    measure,
    records,
    run,
)
from superfine_bench.isolate import measure_alone
from typer.testing import CliRunner

CPU = torch.device("cpu")
FAST = Settings(seconds=0.0, turns=6, quick=True)


@pytest.fixture
def planted(monkeypatch):
    """The suite is one small case, measured in this process; returns what counts the measurements."""
    measured = []

    def alone(case, device, settings, ceilings):
        measured.append(case.key)
        return measure(case, device, replace(FAST, quick=settings.quick), ceilings)

    def ceilings(device, seconds, say):
        return Ceilings("cpu", {"copy": [(2**25, 50.0)]}, {"float32": 0.1}, 1.5)

    monkeypatch.setattr(run, "all_cases", lambda only, device: [planted_cases.good("")])
    monkeypatch.setattr(run, "ceilings_alone", ceilings)
    monkeypatch.setattr(run, "measure_alone", alone)
    return measured


def superfine(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_who_hangs_crashes_or_leaves_gets_a_row_and_the_others_are_measured():
    rows = measure_alone(planted_cases.bad(""), CPU, replace(FAST, timeout=10.0), None, planted_cases.bad)
    found = {row.provider: (row.status, row.note) for row in rows}
    assert found == {
        "first": ("ok", ""),
        "hangs": ("timeout", "no end after 10 s"),
        "crashes": ("error", "its process died of SIGSEGV"),
        "leaves": ("error", "its process ended with exit code 3"),
        "last": ("ok", ""),
    }
    assert rows[4].ratio is not None


def test_inputs_that_cannot_be_made_give_every_provider_a_row():
    rows = measure_alone(planted_cases.bad_inputs(""), CPU, FAST, None, planted_cases.bad_inputs)
    assert [(row.provider, row.status) for row in rows] == [("first", "error")]


def test_an_error_that_ends_its_process_is_the_row_of_who_made_it(capfd):
    rows = measure_alone(planted_cases.ends_its_process(""), CPU, FAST, None, planted_cases.ends_its_process)
    assert {row.provider: row.status for row in rows} == {"first": "ok", "raises": "error", "last": "ok"}
    assert rows[1].note == "RuntimeError: CUDA error: an illegal memory access"
    assert "Traceback" not in capfd.readouterr().err


def test_a_case_that_cannot_even_be_found_gives_every_provider_its_row():
    rows = measure_alone(planted_cases.good(""), CPU, FAST, None, planted_cases.cannot_be_made)
    found = [(row.provider, row.status, row.note) for row in rows]
    assert found == [(name, "out of memory", "no room for it") for name in ("first", "other")]


def test_a_process_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(isolate, "LEAVE_SECONDS", 0.5)
    started = time.monotonic()
    rows = measure_alone(planted_cases.does_not_end(""), CPU, FAST, None, planted_cases.does_not_end)
    assert {row.provider: row.status for row in rows} == {"first": "ok", "waits": "ok"}
    assert time.monotonic() - started < 50  # its thread sleeps for 60 s


def test_ceilings_that_cannot_be_measured_are_one_error():
    with pytest.raises(RuntimeError, match=r"the ceilings of cpu cannot be measured: .*only is '3r2w'"):
        isolate.ceilings_alone(CPU, 0.1, lambda text: None, only="3r2w")


def test_writes_one_line_for_each_record_and_the_report(tmp_path, planted):
    out = tmp_path / "results"
    result = superfine("bench", "--quick", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["environment", "ceilings", "row", "row"]
    assert lines[0]["packages"]["torch"]
    assert lines[2]["provider"] == "first"
    assert lines[3]["median_ms"] > 0
    assert "other" in result.output
    assert "50.0 at 32 MiB" in result.output
    assert {path.name for path in out.iterdir()} >= {"bench.jsonl", "bench.csv", "bench.png", "report.html"}


def test_resume_measures_only_what_is_missing(tmp_path, planted):
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 0
    again = superfine("bench", "--out", tmp_path, "--device", "cpu")
    assert again.exit_code == 2
    assert "expected a new folder, or --resume" in again.output
    assert len(planted) == 1
    assert superfine("bench", "--out", tmp_path, "--device", "cpu", "--resume").exit_code == 0
    assert len(planted) == 1
    file = tmp_path / "bench.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])  # killed while the last row was written
    assert superfine("bench", "--out", tmp_path, "--device", "cpu", "--resume").exit_code == 0
    assert len(planted) == 2
    assert [row.provider for row in records.read(file).rows] == ["first", "other"]


def test_resume_refuses_results_of_another_installation(tmp_path, planted):
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 0
    file = tmp_path / "bench.jsonl"
    lines = file.read_text().splitlines()
    environment = json.loads(lines[0])
    environment["packages"]["torch"] = "1.0"
    file.write_text("\n".join([json.dumps(environment), *lines[1:]]) + "\n")
    refused = superfine("bench", "--out", tmp_path, "--device", "cpu", "--resume")
    assert refused.exit_code == 2
    assert "was measured with packages" in refused.output


def edited(file, change):
    """Let the environment of a result file be another one."""
    lines = file.read_text().splitlines()
    environment = json.loads(lines[0])
    change(environment)
    file.write_text("\n".join([json.dumps(environment), *lines[1:]]) + "\n")


def test_resume_refuses_another_machine_commit_or_settings(tmp_path, planted):
    changes = [
        (lambda environment: environment["cpu"].update(model="EPYC"), "processor or GPU EPYC"),
        (lambda environment: environment["cpu"].update(threads=99), "99 threads"),
        (lambda environment: environment.update(git={"commit": "0123"}), "commit 0123"),
        (lambda environment: environment["settings"].update(turns=99), "'turns': 99"),
        (lambda environment: environment["peers"].update(liger="1"), "'liger': '1'}"),
    ]
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 0
    file = tmp_path / "bench.jsonl"
    written = file.read_bytes()
    for change, named in changes:
        file.write_bytes(written)
        edited(file, change)
        refused = superfine("bench", "--out", tmp_path, "--device", "cpu", "--resume")
        assert refused.exit_code == 2
        assert named in refused.output
        assert "as here" in refused.output
    assert len(planted) == 1


def test_resume_measures_a_peer_that_has_been_installed_since(tmp_path, planted, monkeypatch):
    def missing(inputs):
        raise UnavailableError("not installed")

    case = planted_cases.case(Provider("peer", missing))
    monkeypatch.setattr(run, "all_cases", lambda only, device: [case])
    again = ("bench", "--out", tmp_path, "--device", "cpu", "--resume")
    assert superfine(*again[:-1]).exit_code == 0
    assert superfine(*again).exit_code == 0
    assert len(planted) == 1
    case = planted_cases.case(Provider("peer", planted_cases.double))
    peers = run.environment()["peers"] | {"peer": "1.0"}
    here = run.environment() | {"peers": peers}
    monkeypatch.setattr(run, "environment", lambda: here)
    assert superfine(*again).exit_code == 0
    assert len(planted) == 2
    found = records.read(tmp_path)
    assert [row.status for row in found.rows] == ["ok", "ok"]
    assert found.environment["peers"] == peers


def test_ctrl_c_keeps_what_is_done(tmp_path, planted, monkeypatch):
    cases = [planted_cases.good(""), replace(planted_cases.good(""), name="never")]

    def stopped(case, device, settings, ceilings):
        if case.name == "never":
            raise KeyboardInterrupt
        return measure(case, device, FAST, ceilings)

    monkeypatch.setattr(run, "all_cases", lambda only, device: cases)
    monkeypatch.setattr(run, "measure_alone", stopped)
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 130
    assert len(records.read(tmp_path).rows) == 2
    assert (tmp_path / "report.html").is_file()


def test_only_our_own_wrong_results_fail_the_run(tmp_path, planted, monkeypatch):
    def wrong(inputs):
        return lambda: inputs.clone()

    for name, exit_code in (("peer", 0), ("superfine", 1)):
        case = planted_cases.case(Provider(name, wrong))
        monkeypatch.setattr(run, "all_cases", lambda only, device, case=case: [case])
        result = superfine("bench", "--out", tmp_path / name, "--device", "cpu")
        assert result.exit_code == exit_code, result.output
        row = records.read(tmp_path / name).rows[1]
        assert (row.status, row.median_ms) == ("wrong", None)


SLOW_MOMENT = Ceilings("cpu", {"copy": [(2**25, 1e-9)]}, {"float32": 1e-9}, 1.5)


@pytest.mark.parametrize(
    ("cost", "only", "again"),
    [
        (SimpleNamespace(bytes=2**25, flops=0), "copy", Ceilings("cpu", {"copy": [(2**25, 1e9)]})),
        (SimpleNamespace(bytes=0, flops=10**6), "float32", Ceilings("cpu", {}, {"float32": 1e9})),
    ],
)
def test_a_ceiling_measured_in_a_slow_moment_is_measured_again(
    tmp_path, planted, monkeypatch, cost, only, again
):
    case = replace(planted_cases.good(""), cost=lambda: cost, gemm="float32")
    asked = []

    def ceilings(device, seconds, say, only=None):
        asked.append(only)
        return SLOW_MOMENT if only is None else again

    monkeypatch.setattr(run, "all_cases", lambda only, device: [case])
    monkeypatch.setattr(run, "ceilings_alone", ceilings)
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 0
    assert asked == [None, only]
    found = records.read(tmp_path)
    assert found.ceilings == SLOW_MOMENT.or_better(again)
    assert [(row.status, row.note) for row in found.rows] == [("ok", "")] * 2
    for row in found.rows:
        assert 1e9 in (row.ceiling_gb_per_s, row.ceiling_tflop_per_s)
        assert row.percent_of_ceiling < 100


def test_the_better_of_two_ceilings_is_taken_figure_by_figure():
    first = Ceilings(
        "cpu", {"copy": [[2**20, 5.0], [2**25, 9.0]], "read": [(2**20, 1.0)]}, {"tf32": 2.0}, 1.5
    )
    second = Ceilings("cpu", {"copy": [(2**25, 7.0), (2**20, 6.0)]}, {"tf32": 3.0, "float32": 1.0})
    better = first.or_better(second)
    assert better.rates == {"copy": [(2**20, 6.0), (2**25, 9.0)], "read": [(2**20, 1.0)]}
    assert (better.gemm, better.launch_us) == ({"tf32": 3.0, "float32": 1.0}, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "adam"], "did you mean 'adamw'"),
        (["--device", "tpu9"], "expected auto, cpu or cuda"),
        (["--quick", "--full"], "expected one of them"),
        (["--resume"], "expected --out DIR"),
        (["--arch", "sm_90"], "--arch is sm_90; expected it with --dry-run"),
        (["--bandwidth", "3350"], "--bandwidth is 3350.0; expected it with --dry-run"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = superfine("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_asking_for_a_gpu_that_is_not_there_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = superfine("bench", "--device", "cuda", "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "device is cuda; expected one that torch finds here" in result.output
    assert re.search("CUDA|NVIDIA", result.output)  # what torch has against it
    assert not (tmp_path / "new").exists()


def test_a_gpu_beyond_those_here_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.find_device("cuda:1") == torch.device("cuda:1")
    result = superfine("bench", "--device", "cuda:2", "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "device is cuda:2; expected cuda:N with N below 2" in result.output
    assert not (tmp_path / "new").exists()
