"""superfine_bench.compare: verdicts by interval, across machines by ratio, and never of different devices."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from superfine_bench import Row, Run
from superfine_bench.compare import compare, device_of, failed, print_comparison, verdicts

CPU = {
    "device": "cpu",
    "cpu": {"model": "Xeon", "isa": "avx512", "threads": 2},
    "cuda": {"devices": []},
}
BASE = Row(
    "adamw", "85M", "float32", "one step", "torch fused", "cpu", "ok",
    baseline="torch fused", median_ms=100.0, low_ms=99.5, high_ms=100.5, ratio=1.0, ratio_low=1.0, ratio_high=1.0,
)  # fmt: skip


def ours(ratio=2.0, low=None, high=None, **changes):
    low, high = ratio if low is None else low, ratio if high is None else high
    times = {"median_ms": 100 / ratio, "low_ms": 100 / high, "high_ms": 100 / low}
    row = replace(BASE, provider="superfine", ratio=ratio, ratio_low=low, ratio_high=high, **times)
    return replace(row, **changes)


def run(*rows, **environment):
    return Run(environment=CPU | environment, rows=list(rows))


def one(old, new, threshold=0.03):
    comparisons = compare(run(BASE, old), run(BASE, new), threshold)
    return next(c for c in comparisons if c.provider == new.provider)


# The ratio was 5 and a change counts from 25%; 5 / 4 - 1 is exactly that.
@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (3.90, 3.99, "slower"),
        (3.90, 4.00, "unclear"),  # the bound of an interval may lie on the threshold, not beyond
        (3.99, 6.00, "unclear"),
        (4.00, 6.00, "same"),
        (4.00, 4.00, "same"),
        (6.00, 6.70, "unclear"),
        (6.70, 7.00, "faster"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, verdict):
    comparison = one(ours(5.0), ours((low + high) / 2, low, high), threshold=0.25)
    assert comparison.verdict == verdict
    assert comparison.low == pytest.approx(5 / high - 1)
    assert comparison.high == pytest.approx(5 / low - 1)


def test_both_intervals_widen_the_change():
    comparison = one(ours(2.0, 1.8, 2.2), ours(1.6, 1.5, 1.7))
    assert comparison.change == pytest.approx(2.0 / 1.6 - 1)
    assert comparison.low == pytest.approx(1.8 / 1.7 - 1)
    assert comparison.high == pytest.approx(2.2 / 1.5 - 1)
    assert comparison.verdict == "slower"


def test_a_slow_machine_is_no_slow_kernel():
    old, new = ours(2.0), ours(2.0)
    halved = {name: 2 * getattr(new, name) for name in ("median_ms", "low_ms", "high_ms")}
    slow_base = replace(BASE, **{name: 2 * getattr(BASE, name) for name in halved})
    comparisons = compare(run(BASE, old), run(slow_base, replace(new, **halved)))
    base, mine = comparisons
    assert (mine.verdict, mine.by) == ("same", "ratio to torch fused")
    assert (base.verdict, base.by) == ("unclear", "time")
    assert base.change == pytest.approx(1.0)
    assert not failed(comparisons)


def test_times_are_compared_when_the_baselines_differ():
    comparison = one(ours(2.0), ours(2.0, baseline="torch foreach"))
    assert comparison.by == "time"
    assert comparison.change == pytest.approx(0.0)


def test_a_file_with_nothing_but_a_baseline_is_judged_by_its_time():
    slow = replace(BASE, median_ms=120.0, low_ms=119.0, high_ms=121.0)
    comparisons = compare(run(BASE), run(slow))
    assert [c.verdict for c in comparisons] == ["slower"]
    assert failed(comparisons)


def test_without_intervals_nothing_is_claimed():
    bare = {"low_ms": None, "high_ms": None, "ratio_low": None, "ratio_high": None}
    comparison = one(ours(2.0), replace(ours(1.0), **bare))
    assert (comparison.verdict, comparison.low, comparison.high) == ("unclear", None, None)
    assert comparison.change == pytest.approx(1.0)


@pytest.mark.parametrize("status", ["wrong", "error", "timeout", "out of memory"])
def test_what_worked_and_now_fails_is_broken(status):
    comparisons = compare(
        run(BASE, ours()), run(BASE, replace(BASE, provider="superfine", status=status, note="why"))
    )
    assert comparisons[1].verdict == "broken"
    assert "why" in comparisons[1].note
    assert failed(comparisons)


def test_rows_of_one_file_are_new_or_missing():
    peer = replace(ours(), provider="liger")
    gone = replace(ours(), case="300 tensors")
    unavailable = replace(BASE, provider="apex", status="unavailable", note="not installed")
    comparisons = compare(
        run(BASE, gone, ours(), replace(ours(), provider="apex")), run(BASE, ours(), peer, unavailable)
    )
    found = {(c.case, c.provider): c.verdict for c in comparisons}
    assert found == {
        ("85M, fp32", "torch fused"): "same",
        ("85M, fp32", "superfine"): "same",
        ("85M, fp32", "liger"): "new",
        ("85M, fp32", "apex"): "missing",
        ("300 tensors, fp32", "superfine"): "missing",
    }
    assert not failed(comparisons)


def test_an_op_is_as_good_as_the_worst_of_ours():
    peer, second = replace(ours(), provider="liger"), replace(ours(), provider="superfine, in place")
    slow = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
    before = run(BASE, ours(), second, peer)
    comparisons = compare(before, run(BASE, ours(3.0), second, replace(peer, **slow)))
    assert [c.verdict for c in comparisons] == ["same", "faster", "same", "slower"]
    assert verdicts(comparisons) == {"adamw": "same"}
    assert not failed(comparisons)  # a peer's regression is not ours
    comparisons = compare(before, run(BASE, ours(3.0), replace(second, **slow), peer))
    assert verdicts(comparisons) == {"adamw": "slower"}
    assert failed(comparisons)


GPU = {
    "device": "cuda:1",
    "cuda": {"devices": [{"name": "A100", "uuid": "a"}, {"name": "H100", "uuid": "b"}]},
}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"cpu": CPU["cpu"] | {"model": "EPYC"}}, "EPYC"),
        ({"cpu": CPU["cpu"] | {"isa": "avx2"}}, "avx2"),
        ({"cpu": CPU["cpu"] | {"threads": 16}}, "16 threads"),
        (GPU, "H100 (b)"),
    ],
)
def test_refuses_different_devices_by_name(other, named):
    before, after = run(BASE, ours()), run(BASE, ours(), **other)
    with pytest.raises(ValueError, match="compare: device is") as refused:
        compare(before, after)
    assert named in str(refused.value)
    assert device_of(before) in str(refused.value)
    assert [c.verdict for c in compare(before, after, force=True)] == ["same", "same"]


def test_two_gpus_of_one_model_are_two_devices():
    twin = {"device": "cuda", "cuda": {"devices": [{"name": "H100", "uuid": "c"}]}}
    with pytest.raises(ValueError, match=r"H100 \(c\)"):
        compare(run(BASE, **GPU), run(BASE, **twin))


def test_refuses_a_negative_threshold():
    with pytest.raises(ValueError, match=r"threshold is -0\.1; expected 0 or more"):
        compare(run(BASE), run(BASE), threshold=-0.1)


def test_prints_every_verdict_within_110_columns():
    rows = [
        BASE,
        ours(),
        replace(ours(), provider="superfine, [in place]", case="a case with a long name " * 3),
    ]
    broken = replace(rows[2], status="error", note="RuntimeError: [red] is no style here")
    console = Console(file=io.StringIO(), width=110)
    print_comparison(console, compare(run(*rows), run(BASE, ours(1.0), broken)))
    printed = console.file.getvalue()
    assert "adamw: broken (all rows: 1 broken, 1 slower, 1 same)" in printed
    assert "+100.0%" in printed
    assert "RuntimeError: [red] is no style here" in printed.replace("\n", " ")
    assert max(map(len, printed.splitlines())) <= 110


def quiet(row, p20, spread=0.02):
    return replace(row, p20_ms=p20, p20_low_ms=p20 * (1 - spread), p20_high_ms=p20 * (1 + spread))


def by_p20(before, after, base_before=100.0, base_after=100.0, **options):
    old = run(quiet(BASE, base_before, **options), quiet(ours(2.0, 1.0, 4.0), before, **options))
    new = run(quiet(BASE, base_after, **options), quiet(ours(2.0, 1.0, 4.0), after, **options))
    return compare(old, new)[1]


def test_a_kernel_slowed_by_a_fifth_is_slower_however_wide_the_medians_scatter():
    comparison = by_p20(50.0, 60.0)
    assert (comparison.verdict, comparison.by) == ("slower", "time, and ratio to torch fused")
    assert comparison.change == pytest.approx(0.2)
    assert 0.15 < comparison.low < 0.2 < comparison.high < 0.25
    assert by_p20(60.0, 50.0).verdict == "faster"


def test_neither_a_slow_machine_nor_a_slow_baseline_changes_the_verdict():
    assert by_p20(50.0, 60.0, base_after=120.0).verdict == "unclear"  # both slower: the machine
    assert by_p20(50.0, 50.0, base_after=120.0).verdict == "same"  # torch's bad day is not our good one
    assert by_p20(50.0, 50.5, spread=0.005).verdict == "same"


def test_independent_errors_add_as_squares():
    comparison = by_p20(50.0, 50.0, spread=0.03)
    assert comparison.high == pytest.approx(0.03 * 2**0.5, rel=0.05)
