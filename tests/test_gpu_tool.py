"""tools/gpu.py: says so without a GPU; with one, each stage has a limit and a failing one stops nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    return load("gpu", monkeypatch)


@pytest.fixture
def runner(gpu, tmp_path):
    out, target = tmp_path / "out", tmp_path / "target"
    out.mkdir()
    target.mkdir()
    return gpu.Runner(out, target)


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("script", ["gpu.py", "sanitize_cases.py"])
def test_without_a_gpu_it_says_so_and_fails(script, tmp_path):
    done = subprocess.run([sys.executable, str(TOOLS / script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "expected" in done.stderr
    assert "NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failing_stage_is_reported_and_the_next_one_runs(runner):
    failed = runner.run("one", python("print('from one'); raise SystemExit(3)"), log="a.log", limit=60)
    passed = runner.run(
        "two", python("import os; print(os.getcwd(), os.environ['PYTHONPATH'])"), log="a.log", limit=60
    )
    assert (failed.result, failed.detail) == ("failed", "exit code 3; see a.log")
    assert passed.result == "passed"
    log = (runner.out / "a.log").read_text()
    assert "from one" in log
    assert (
        f"{runner.target} {runner.target}" in log
    )  # outside the repository, the new installation on the path


def test_a_stage_over_its_limit_is_killed_with_its_children(runner, monkeypatch):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    stage = runner.run("slow", python(child), log="a.log", limit=6)
    assert stage.result == "timed out"
    assert time.monotonic() - started < 30


def test_no_stage_starts_when_the_time_is_used_up(gpu, runner):
    runner.deadline = time.monotonic() + 1
    stage = runner.run("late", python("print(1)"), log="a.log", limit=60)
    assert (stage.result, stage.detail) == ("skipped", "no time left")


def test_after_a_failed_build_nothing_else_is_tried(gpu, runner, monkeypatch):
    (runner.target / "pip.py").write_text("raise SystemExit('no compiler')\n")  # found before the real one
    gpu.run_all(runner)
    assert [(stage.name, stage.result) for stage in runner.stages] == [("build", "failed")]
    assert "no compiler" in (runner.out / "build.log").read_text()


def test_all_stages_run_in_order_and_results_are_at_most_eight_flat_files(gpu, tmp_path, monkeypatch):
    class Recorder(gpu.Runner):
        def run(self, name, command, *, log, limit, detail=""):
            return super().run(name, python(f"print({name!r})"), log=log, limit=limit, detail=detail)

    monkeypatch.setattr(gpu, "Runner", Recorder)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "/bin/compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    out = tmp_path / "results"
    assert gpu.main(["--out", str(out)]) == 0
    names = [stage["name"] for stage in json.loads((out / "summary.json").read_text())["stages"]]
    tools = [f"sanitizer {tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")]
    assert names == ["build", "environment", "tests", *tools, "benchmark"]
    assert len(list(out.rglob("*"))) <= 8
    assert all(path.is_file() for path in out.rglob("*"))


def test_a_missing_sanitizer_is_skipped_and_named(gpu, runner, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    gpu._sanitize(runner)
    assert [(stage.result, stage.detail) for stage in runner.stages] == [
        ("skipped", "compute-sanitizer was not found")
    ]


def test_counts_tests_from_the_junit_file(gpu, tmp_path):
    junit = tmp_path / "junit.xml"
    assert gpu._counts(junit) == ""
    junit.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert gpu._counts(junit) == "9 tests, 2 failed, 2 skipped"


def test_a_huge_log_keeps_its_end(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 100)
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * 500 + b"the end")
    gpu._shorten(log)
    assert log.read_bytes().endswith(b"the end")
    assert len(log.read_bytes()) < 200


@pytest.mark.parametrize("op", ["adamw", "cross_entropy"])
def test_the_sanitizer_cases_are_right_where_a_kernel_is(op, monkeypatch):
    """The CPU kernels stand in for the GPU's: inputs, options and comparison are the same."""
    cases = load("sanitize_cases", monkeypatch)
    monkeypatch.setattr(cases, "DEVICE", torch.device("cpu"))
    named = list(getattr(cases, f"{op}_cases")("cpu"))
    assert len(named) >= 6
    assert {name: case() <= 1 for name, case in named} == dict.fromkeys(dict(named), True)


def test_the_sanitizer_cases_see_a_wrong_result(monkeypatch):
    cases = load("sanitize_cases", monkeypatch)
    right = torch.ones(4)
    assert cases._difference(right, right) == 0
    assert cases._difference(right * 1.01, right) > 1
    assert not cases._difference(right * float("nan"), right) <= 1
