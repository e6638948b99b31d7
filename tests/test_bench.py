"""superfine_bench: who is wrong gets no speed, who cannot run gets a row, and equal work is compared."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import superfine_bench
import torch
from superfine_bench import (
    Case,
    Ceilings,
    Provider,
    Settings,
    UnavailableError,
    harness,
    linear_cross_entropy,
    measure,
    records,
    timing,
)

CPU = torch.device("cpu")
FAST = Settings(seconds=0.0, turns=6)


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
        resident=True,
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
    assert first.calls == other.calls == first.turns == 6
    assert other.p20_ms <= other.median_ms <= other.p80_ms
    assert other.low_ms <= other.median_ms <= other.high_ms
    assert other.median_ms >= 2
    assert other.wall_ms >= 2
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert other.ratio_low <= other.ratio <= other.ratio_high < 1
    assert other.baseline == "first"
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
            return inputs["x"].mul(2 if calls < 5 else 3)

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
    size = records.SMALLEST_BANDWIDTH_CASE
    case = make_case(cost=lambda: SimpleNamespace(bytes=1000 * size, flops=0))
    (row,) = measure(case, CPU, FAST, Ceilings("cpu", {"copy": [(size, 0.001)]}))
    assert row.status == "suspect"
    assert row.percent_of_ceiling > 102
    assert row.median_ms is not None


def test_a_matrix_product_is_compared_with_the_measured_one():
    case = make_case(cost=lambda: SimpleNamespace(bytes=512, flops=10**15), gemm="float32")
    (row,) = measure(case, CPU, FAST, Ceilings("cpu", {}, {"float32": 0.1}))
    assert row.status == "suspect"  # 10^15 flops in no time
    assert row.ceiling_tflop_per_s == 0.1


def test_a_provider_that_returns_what_it_returned_before_is_found_out():
    def remembers(inputs):
        known = {}

        def call():
            key = inputs["x"].data_ptr()
            if key not in known:
                known[key] = inputs["x"].mul(2)
            return known[key].clone()

        return call

    def redraw(inputs, seed):
        inputs["x"].copy_(torch.rand(64, generator=torch.Generator().manual_seed(seed)))

    rows = by_name(measure(make_case(Provider("remembers", remembers), redraw=redraw), CPU, FAST))
    assert rows["first"].status == "ok"
    assert rows["remembers"].status == "wrong"
    assert rows["remembers"].median_ms is None


def test_a_slow_machine_does_not_change_the_ratio():
    base = [[1.0], [2.0], [1.0], [4.0], [1.0], [1.0]]
    half = [[t[0] / 2] for t in base]
    assert timing.ratios(base, half) == {"ratio": 2, "ratio_low": 2, "ratio_high": 2}


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (9, 2), (15, 4), (31, 10)])
def test_the_interval_of_the_median_is_the_binomial_one(n, rank):  # ranks as in tables of the sign test
    assert timing.median_interval(range(1, n + 1)) == (rank, n + 1 - rank)


def test_the_interval_of_a_quantile_resamples_turns():
    turns = [[1.0, 1.1], [1.0, 1.2], [5.0, 6.0], [1.0, 1.1], [1.0, 1.3], [1.1, 1.2]]
    low, high = timing.quantile_interval(turns, 0.2)
    assert 1.0 <= low <= timing.quantile([call for turn in turns for call in turn], 0.2) <= high < 5
    assert timing.quantile_interval([[2.0]] * 5, 0.2) == (2, 2)


def test_peak_memory_counts_what_a_provider_allocates():
    def build(inputs):
        def call():
            big = torch.ones(2**24)  # 64 MiB
            return inputs["x"].mul(2) + 0 * big[0]

        return call

    rows = by_name(measure(make_case(Provider("big", build)), CPU, FAST))
    assert 0.95 * 2**26 <= rows["big"].peak_memory < 2**27
    assert rows["first"].peak_memory < 2**25


def test_who_comes_first_does_not_pay_for_what_is_loaded_once():
    loaded = []

    def build(inputs):
        loaded.extend([torch.ones(2**24)] if not loaded else [])  # 64 MiB, as an import would keep
        return lambda: inputs["x"].mul(2)

    rows = by_name(measure(replace(make_case(), providers=(Provider("lazy", build),)), CPU, FAST))
    assert rows["lazy"].peak_memory < 2**25


def test_a_provider_is_dropped_before_it_is_built_again():
    class Call:
        alive = most = 0

        def __init__(self, inputs):
            self.inputs, self.itself = inputs, self  # a cycle, as optimizers have
            Call.alive += 1
            Call.most = max(Call.most, Call.alive)

        def __del__(self):
            Call.alive -= 1

        def __call__(self):
            return self.inputs["x"].mul(2)

    (row,) = measure(replace(make_case(), providers=(Provider("state", Call),)), CPU, FAST)
    assert row.status == "ok"
    assert Call.most == 1


def test_everything_is_driven_out_of_the_cache_of_known_size_or_not():
    assert timing.eviction(2**25) == 2**26
    assert timing.eviction(2**33) == 2**29
    assert timing.eviction(None) == 2**28


@pytest.mark.parametrize("resident", [True, False])
def test_only_a_case_about_the_cost_of_a_call_keeps_its_caches(monkeypatch, resident):
    fillers = []
    monkeypatch.setattr(timing.Clock, "evict", lambda clock: fillers.append(clock._filler))
    measure(make_case(resident=resident), CPU, FAST)
    assert {filler is None for filler in fillers} == {resident}


def test_another_gpu_is_the_current_one_before_anything_is_made(monkeypatch):
    class StoppedError(Exception):
        pass

    def select(device):
        raise StoppedError(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", select)
    with pytest.raises(StoppedError, match="cuda:1"):
        measure(make_case(), torch.device("cuda:1"), FAST)


def test_an_error_on_a_gpu_ends_the_measurement_and_want_of_memory_does_not():
    row = records.Row("o", "c", "float32", "", "p", "cuda:0", "ok")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        harness._failed(row, RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert harness._failed(row, torch.OutOfMemoryError("CUDA out of memory.")).status == "out of memory"
    error = harness._failed(replace(row, device="cpu"), RuntimeError("shapes differ"))
    assert (error.status, error.note) == ("error", "RuntimeError: shapes differ")


def test_want_of_memory_is_a_row_wherever_it_comes():
    def too_much(inputs):
        return lambda: torch.empty(2**60, dtype=torch.uint8)

    def late(inputs):
        calls = iter(range(4))

        def call():
            if next(calls, None) is None:
                raise MemoryError
            return inputs["x"].mul(2)

        return call

    case = make_case(Provider("at once", too_much), Provider("in a turn", late), Provider("last", double))
    rows = by_name(measure(case, CPU, FAST))
    assert [rows[name].status for name in rows] == ["ok", "out of memory", "out of memory", "ok"]
    assert rows["at once"].note
    assert rows["last"].ratio is not None
    (row,) = measure(make_case(inputs=lambda device: torch.empty(2**60, dtype=torch.uint8)), CPU, FAST)
    assert row.status == "out of memory"


def test_a_provider_that_does_other_work_is_rated_by_its_own_cost():
    other = Provider("other", double, cost=lambda: SimpleNamespace(bytes=1024, flops=0))
    rows = by_name(measure(make_case(other), CPU, FAST))
    assert (rows["first"].bytes, rows["first"].flops) == (512, 64)
    assert (rows["other"].bytes, rows["other"].flops) == (1024, 0)


def test_parts_of_a_call_are_kept_apart():
    def build(inputs):
        def call():
            inputs["x"].mul(2)
            return {"forward": 0.25, "backward": 0.5}

        return call

    case = make_case(parts=True, check=lambda inputs, call: call() and 0.0)
    (row,) = measure(replace(case, providers=(Provider("step", build),)), CPU, FAST)
    assert row.split == {"forward": 250, "backward": 500}


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
    # A check, a call to see its memory and time; six turns there and back, a check; `before` ahead of each.
    names = "".join(name for name, _ in order)
    assert names == "aabb" + "abba" * 3 + "ab"
    assert [count for _, count in order] == list(range(1, len(order) + 1))


def test_quick_leaves_out_what_is_not_marked_for_it():
    case = make_case(Provider("compiles", double, in_quick=False))
    assert [row.provider for row in measure(case, CPU, replace(FAST, quick=True))] == ["first"]


def test_every_case_of_every_op_names_itself_and_counts_its_bytes():
    cases = superfine_bench.all_cases()
    assert {case.op for case in cases} == set(superfine_bench.OPS)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.memory > 0
        ours = any(provider.name.startswith("superfine") for provider in case.providers)
        assert ours or "8-bit" in case.name  # which AdamW here has not
        assert case.traffic in ("copy", "4r3w") or case.gemm or case.parts


SMALL = [case for case in superfine_bench.all_cases() if case.memory < 2**24]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.key)
def test_the_real_providers_pass_the_check_of_small_cases(case):
    rows = measure(case, CPU, replace(FAST, quick=True))
    found = {row.provider: (row.status, row.note) for row in rows if row.status != "unavailable"}
    assert len(found) >= 2  # ours and eager torch
    assert found == dict.fromkeys(found, ("ok", ""))


@pytest.mark.parametrize(
    ("dtype", "trains"),
    [
        (torch.float32, "hidden and weight"),
        (torch.bfloat16, "hidden"),
        (torch.bfloat16, "weight"),
        (torch.float32, "hidden and 64 rows"),
    ],
)
def test_the_check_of_linear_cross_entropy_passes_providers_and_sees_an_error(dtype, trains):
    case = linear_cross_entropy._case(dtype, (96, 32, 3000), kept=0.7, trains=trains)
    rows = measure(case, CPU, replace(FAST, quick=True))
    assert {row.status for row in rows} <= {"ok", "unavailable"}
    inputs = case.inputs(CPU)
    call = next(p for p in case.providers if p.name in ("superfine", "superfine, rows")).build(inputs)
    loss, *gradients = call()
    assert case.check(inputs, lambda: (loss, *gradients)) <= 1
    gradients[0][-1] += gradients[0].abs().max()  # of the last row, or the last class: both are in the sample
    assert case.check(inputs, lambda: (loss, *gradients)) > 1
    assert case.check(inputs, lambda: (1.1 * loss, *call()[1:])) > 1


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


def test_an_unknown_op_is_an_error_with_a_near_miss():
    with pytest.raises(ValueError, match=r"op is 'adam'; expected one of .*did you mean 'adamw'"):
        superfine_bench.all_cases("adam")
