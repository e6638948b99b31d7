"""superfine_bench: who is wrong gets no speed, who cannot run gets a row, and equal work is compared."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import superfine_bench
import torch
from superfine_bench import Case, Ceilings, Provider, Settings, UnavailableError, harness, measure
from superfine_bench.__main__ import main

CPU = torch.device("cpu")
FAST = Settings(seconds=0.0, min_calls=6, max_calls=6, turn_seconds=0.0)


def double(inputs):
    return lambda: inputs["x"].mul(2)


def check(inputs, call):
    return (call() - 2 * inputs["x"]).abs().max().item() / 1e-6


def make_case(*providers, **changes):
    case = Case(
        op="double",
        name="64",
        dtype="float32",
        work="x -> 2x",
        cost=lambda: SimpleNamespace(bytes=512, flops=64),
        traffic="copy",
        memory=512,
        inputs=lambda device: {"x": torch.arange(64.0, device=device), "before": 0},
        before=lambda inputs: inputs.update(before=inputs["before"] + 1),
        check=check,
        providers=(Provider("first", double), *providers),
    )
    return replace(case, **changes)


def by_name(rows):
    return {row.provider: row for row in rows}


def test_reports_percentiles_ratio_and_rate():
    def slow(inputs):
        def call():
            time.sleep(0.002)
            return inputs["x"].mul(2)

        return call

    rows = by_name(measure(make_case(Provider("slow", slow)), CPU, FAST))
    first, other = rows["first"], rows["slow"]
    assert (first.status, other.status) == ("ok", "ok")
    assert first.calls == other.calls == 6
    assert other.p20_ms <= other.median_ms <= other.p80_ms
    assert other.median_ms >= 2
    assert first.ratio == 1
    assert other.ratio == pytest.approx(first.median_ms / other.median_ms)
    assert other.gb_per_s == pytest.approx(512 / other.median_ms / 1e6)
    assert other.percent_of_ceiling is None


def test_a_wrong_provider_gets_no_speed():
    wrong = Provider("wrong", lambda inputs: lambda: inputs["x"].mul(2.01))
    row = by_name(measure(make_case(wrong), CPU, FAST))["wrong"]
    assert row.status == "wrong"
    assert row.median_ms is None
    assert row.gb_per_s is None
    assert "times the tolerance" in row.note


def test_a_provider_that_is_right_at_first_and_wrong_later_gets_no_speed():
    def build(inputs):
        calls = 0

        def call():
            nonlocal calls
            calls += 1
            return inputs["x"].mul(2 if calls < 4 else 3)

        return call

    row = by_name(measure(make_case(Provider("decays", build)), CPU, FAST))["decays"]
    assert row.status == "wrong"
    assert row.median_ms is None


def test_nan_is_wrong():
    row = by_name(
        measure(make_case(Provider("nan", lambda inputs: lambda: inputs["x"] * torch.nan)), CPU, FAST)
    )
    assert row["nan"].status == "wrong"


def test_who_cannot_run_or_raises_gets_a_row_and_the_others_go_on():
    def missing(inputs):
        raise UnavailableError("not installed")

    def broken(inputs):
        raise RuntimeError("first line\nsecond line")

    def raises_when_called(inputs):
        def call():
            raise torch.OutOfMemoryError("no room")

        return call

    case = make_case(
        Provider("missing", missing),
        Provider("broken", broken),
        Provider("full", raises_when_called),
        Provider("last", double),
    )
    rows = by_name(measure(case, CPU, FAST))
    assert (rows["missing"].status, rows["missing"].note) == ("unavailable", "not installed")
    assert (rows["broken"].status, rows["broken"].note) == ("error", "RuntimeError: first line")
    assert rows["full"].status == "out of memory"
    assert rows["last"].status == "ok"


def test_no_ratio_without_a_baseline():
    case = make_case(Provider("last", double))
    wrong_first = Provider("first", lambda inputs: lambda: inputs["x"])
    rows = by_name(measure(replace(case, providers=(wrong_first, case.providers[1])), CPU, FAST))
    assert rows["last"].median_ms is not None
    assert rows["last"].ratio is None


def test_a_case_that_does_not_fit_into_memory_is_skipped_before_its_inputs_are_made():
    def never(device):
        raise AssertionError("inputs were made")

    (row,) = measure(make_case(memory=2**60, inputs=never), CPU, FAST)
    assert row.status == "skipped"
    assert "GiB are free" in row.note


def test_faster_than_the_measured_ceiling_is_suspect():
    size = harness.SMALLEST_BANDWIDTH_CASE
    case = make_case(cost=lambda: SimpleNamespace(bytes=1000 * size, flops=0))
    (row,) = measure(case, CPU, FAST, Ceilings("cpu", {"copy": [(size, 0.001)]}))
    assert row.status == "suspect"
    assert row.percent_of_ceiling > 102
    assert row.median_ms is not None


def test_the_ceiling_of_the_nearest_size_counts_and_small_cases_have_none():
    ceilings = Ceilings("cpu", {"copy": [(2**25, 80.0), (2**28, 40.0)], "4r3w": []})
    assert ceilings.for_bytes("copy", 2**25) == 80
    assert ceilings.for_bytes("copy", 2**29) == 40
    assert ceilings.for_bytes("copy", 4096) is None
    assert ceilings.for_bytes("4r3w", 2**28) is None


def test_measured_ceilings_are_positive_for_every_size_and_traffic():
    ceilings = harness.measure_ceilings(CPU, sizes=[2**20, 2**21])  # small: the figures are not used
    assert [size for size, _ in ceilings.rates["copy"]] == [2**20, 2**21]
    assert all(rate > 0 for measured in ceilings.rates.values() for _, rate in measured)


def test_providers_take_turns_and_inputs_are_restored_before_each_call():
    order = []

    def named(name):
        def build(inputs):
            def call():
                order.append((name, inputs["before"]))
                return inputs["x"].mul(2)

            return call

        return Provider(name, build)

    case = make_case()
    case = replace(case, providers=(named("a"), named("b")))
    rows = measure(case, CPU, FAST)
    assert [row.provider for row in rows] == ["a", "b"]
    # 2 checks, 2 x 2 for warm-up, 6 turns of each, 2 checks; `before` runs ahead of every one.
    names = "".join(name for name, _ in order)
    assert names == "ab" + "aabb" + "ab" * 6 + "ab"
    assert [count for _, count in order] == list(range(1, len(order) + 1))


def test_quick_leaves_out_what_is_not_marked_for_it():
    case = make_case(Provider("compiles", double, in_quick=False))
    assert [row.provider for row in measure(case, CPU, replace(FAST, quick=True))] == ["first"]


def test_every_case_of_every_op_names_itself_and_counts_its_bytes():
    cases = superfine_bench.all_cases()
    assert {case.op for case in cases} == set(superfine_bench.OPS)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.cost().bytes > 0
        assert case.memory > 0
        assert any(provider.name.startswith("superfine") for provider in case.providers)
        assert case.traffic in ("copy", "4r3w")


SMALL = [case for case in superfine_bench.all_cases() if case.memory < 2**24]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.key)
def test_the_real_providers_pass_the_check_of_small_cases(case):
    rows = measure(case, CPU, replace(FAST, quick=True))
    assert len(rows) >= 3
    assert {row.provider: (row.status, row.note) for row in rows} == {
        row.provider: ("ok", "") for row in rows
    }


def test_the_check_of_adamw_sees_an_error_in_one_element():
    case = next(case for case in SMALL if case.op == "adamw")
    inputs = case.inputs(CPU)
    call = case.providers[0].build(inputs)

    def spoiled():
        step = call()
        with torch.no_grad():
            inputs.params[150][3] += 1e-5
        return step

    assert case.check(inputs, call) <= 1
    assert case.check(inputs, spoiled) > 1


def test_the_check_of_cross_entropy_sees_a_wrong_gradient_and_a_wrong_loss():
    case = next(case for case in SMALL if case.op == "cross_entropy")
    inputs = case.inputs(CPU)
    loss, grad = case.providers[0].build(inputs)()
    assert case.check(inputs, lambda: (loss, grad)) <= 1
    assert case.check(inputs, lambda: (loss * 1.001, grad)) > 1
    assert case.check(inputs, lambda: (loss, grad * 1.001)) > 1
    unmasked = grad.clone()
    unmasked[0] = 0.01  # an ignored row
    assert case.check(inputs, lambda: (loss, unmasked)) > 1


def test_command_line_writes_one_line_for_each_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "superfine_bench.__main__.all_cases", lambda only: [make_case(Provider("other", double))]
    )
    monkeypatch.setattr(
        "superfine_bench.__main__.measure_ceilings", lambda device: Ceilings("cpu", {"copy": [(2**25, 50.0)]})
    )
    monkeypatch.setattr("superfine_bench.__main__.measure_alone", measure)
    assert main(["--quick", "--out", str(tmp_path / "results")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results" / "bench.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["environment", "ceilings", "row", "row"]
    assert lines[0]["packages"]["torch"]
    assert lines[2]["provider"] == "first"
    assert lines[3]["median_ms"] > 0
    output = capsys.readouterr().out
    assert "other" in output
    assert "50.0 GB/s at 32 MiB" in output


def test_command_line_fails_when_a_result_is_wrong(monkeypatch, capsys):
    wrong = Provider("wrong", lambda inputs: lambda: inputs["x"])
    monkeypatch.setattr("superfine_bench.__main__.all_cases", lambda only: [make_case(wrong)])
    monkeypatch.setattr("superfine_bench.__main__.measure_ceilings", lambda device: Ceilings("cpu", {}))
    monkeypatch.setattr("superfine_bench.__main__.measure_alone", measure)
    assert main(["--quick"]) == 1
    assert "double/64/float32: wrong is wrong" in capsys.readouterr().err


def test_an_unknown_op_is_an_error_with_a_near_miss(capsys):
    with pytest.raises(ValueError, match=r"only is 'adam'; expected one of .*did you mean 'adamw'"):
        superfine_bench.all_cases("adam")
    with pytest.raises(SystemExit):
        main(["--only", "adam"])
    assert "did you mean 'adamw'" in capsys.readouterr().err


def test_asking_for_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device is cuda; expected" in capsys.readouterr().err
