"""superfine bench as a whole: what is on disk, what is resumed, who may crash without ending the run."""

from __future__ import annotations

import json
from dataclasses import replace

import planted_cases
import pytest
import torch
from superfine.cli import app
from superfine_bench import Ceilings, Provider, Settings, measure, records, run
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

    monkeypatch.setattr(run, "all_cases", lambda only: [planted_cases.good("")])
    monkeypatch.setattr(run, "measure_ceilings", ceilings)
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


def test_ctrl_c_keeps_what_is_done(tmp_path, planted, monkeypatch):
    cases = [planted_cases.good(""), replace(planted_cases.good(""), name="never")]

    def stopped(case, device, settings, ceilings):
        if case.name == "never":
            raise KeyboardInterrupt
        return measure(case, device, FAST, ceilings)

    monkeypatch.setattr(run, "all_cases", lambda only: cases)
    monkeypatch.setattr(run, "measure_alone", stopped)
    assert superfine("bench", "--out", tmp_path, "--device", "cpu").exit_code == 130
    assert len(records.read(tmp_path).rows) == 2
    assert (tmp_path / "report.html").is_file()


def test_only_our_own_wrong_results_fail_the_run(tmp_path, planted, monkeypatch):
    def wrong(inputs):
        return lambda: inputs.clone()

    for name, exit_code in (("peer", 0), ("superfine", 1)):
        case = planted_cases.case(Provider(name, wrong))
        monkeypatch.setattr(run, "all_cases", lambda only, case=case: [case])
        result = superfine("bench", "--out", tmp_path / name, "--device", "cpu")
        assert result.exit_code == exit_code, result.output
        row = records.read(tmp_path / name).rows[1]
        assert (row.status, row.median_ms) == ("wrong", None)


def test_a_ceiling_measured_in_a_slow_moment_is_measured_again(monkeypatch):
    row = records.Row("o", "c", "float32", "", "superfine", "cpu", "suspect", "above", traffic="copy")
    row = replace(row, ceiling_gb_per_s=10.0, percent_of_ceiling=120.0)
    for rate, status in ((13.0, "ok"), (11.0, "suspect")):
        again = Ceilings("cpu", {"copy": [(2**25, 99.0), (2**30, rate)]})
        monkeypatch.setattr(run, "measure_ceilings", lambda *a, again=again, **k: again)
        checked = run.recheck_ceiling(row, planted_cases.good(""), CPU)
        assert checked.status == status
        assert checked.percent_of_ceiling == pytest.approx(1200 / rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "adam"], "did you mean 'adamw'"),
        (["--device", "tpu9"], "expected auto, cpu or cuda"),
        (["--quick", "--full"], "expected one of them"),
        (["--resume"], "expected --out DIR"),
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
    assert not (tmp_path / "new").exists()
