"""superfine_bench.compare: verdicts by interval, across machines by ratio, and never of different devices."""

from __future__ import annotations

import io
import math
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
    baseline="torch fused", median_ms=100.0, p20_ms=100.0, p20_low_ms=100.0, p20_high_ms=100.0,
)  # fmt: skip


def took(milliseconds, low=None, high=None, **changes):
    """A row of ours."""
    low, high = milliseconds if low is None else low, milliseconds if high is None else high
    times = {"p20_ms": milliseconds, "p20_low_ms": low, "p20_high_ms": high, "median_ms": milliseconds}
    return replace(BASE, provider="superfine", **times | changes)


def run(*rows, **environment):
    return Run(environment=CPU | environment, rows=list(rows))


# Rows of others that did not move: so the machine moves nothing, and no row moves alone.
QUIET = [replace(took(10.0), op="quiet", provider="peer", case=f"case {i}") for i in range(3)]


def judged(before, after, threshold=0.03):
    """The comparisons of two runs on a machine where nothing moves by itself."""
    comparisons = compare(run(*before, *QUIET), run(*after, *QUIET), threshold)
    return [c for c in comparisons if c.op != "quiet"]


def one(old, new, threshold=0.03):
    return next(c for c in judged([BASE, old], [BASE, new], threshold) if c.provider == new.provider)


# It took 4 ms, and a change counts from 25%: 5 ms.
@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (5.01, 5.10, "slower"),
        (4.99, 5.10, "unclear"),
        (3.20, 5.01, "unclear"),
        (3.20, 4.99, "same"),
        (2.80, 3.20, "unclear"),
        (2.80, 2.99, "faster"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, verdict):
    comparison = one(took(4.0), took((low + high) / 2, low, high), threshold=0.25)
    assert comparison.verdict == verdict
    assert comparison.low == pytest.approx(low / 4 - 1)
    assert comparison.high == pytest.approx(high / 4 - 1)


def test_independent_errors_add_as_squares():
    comparison = one(took(50.0, 48.5, 51.5), took(50.0, 48.5, 51.5))
    assert comparison.high == pytest.approx(0.03 * 2**0.5, rel=0.05)
    assert comparison.low == pytest.approx(-0.03 * 2**0.5, rel=0.05)


def controls(*moved):
    """Rows of two runs that are not ours, and by what factor each moved."""
    before = [replace(took(10.0), provider=f"peer {i}", case=f"case {i}") for i in range(len(moved))]
    after = [replace(took(10.0 * x), provider=f"peer {i}", case=f"case {i}") for i, x in enumerate(moved)]
    return before, after


def beside(before, after, base, moved=(), spread=0.0, **environment):
    """What is said of a row of ours, with a baseline that went from 100 ms to `base`."""
    old, new = controls(*moved)
    later = replace(took(base, base * (1 - spread), base * (1 + spread)), provider="torch fused")
    comparisons = compare(run(BASE, before, *old), run(later, after, *new, **environment))
    return next(c for c in comparisons if c.provider == "superfine")


def test_a_slow_machine_is_no_slow_kernel():
    comparison = beside(took(50.0), took(100.0), base=200.0)
    assert (comparison.verdict, comparison.by) == ("unclear", "time beside torch fused's")
    assert comparison.change == pytest.approx(0.0)


def own(*moved):
    """Rows of others beside a baseline of theirs that stood still, and by what factor each of them moved."""
    before = [replace(BASE, op="own", case=f"case {i}") for i in range(len(moved))]
    peers = [replace(took(10.0), op="own", provider="peer", case=row.case) for row in before]
    after = [
        replace(took(10.0 * x), op="own", provider="peer", case=f"case {i}") for i, x in enumerate(moved)
    ]
    return [*before, *peers], [*before, *after]


def test_how_far_rows_move_on_their_own_widens_every_interval():
    slowed = {}
    for moved in ((1.0, 1.001, 0.999), (0.93, 1.07, 1.05)):
        before, after = own(*moved)
        comparisons = compare(run(BASE, took(50.0), *before), run(BASE, took(54.0), *after))
        slowed[moved[0]] = next(c for c in comparisons if c.provider == "superfine")
    assert [c.verdict for c in slowed.values()] == ["slower", "unclear"]
    # The root mean square of three changes that were measured without error.
    rho = (sum(math.log(x) ** 2 for x in (0.93, 1.07, 1.05)) / 3) ** 0.5
    assert slowed[0.93].low == pytest.approx(54 / 50 * math.exp(-1.96 * rho) - 1, abs=1e-3)


def test_the_scatter_within_a_run_is_no_move_of_a_row():
    before, after = own(1.02, 0.98, 1.01)
    wide = [replace(row, p20_low_ms=row.p20_ms * 0.9, p20_high_ms=row.p20_ms * 1.1) for row in after]
    comparisons = compare(run(BASE, took(50.0), *before), run(BASE, took(54.0), *wide))
    assert next(c for c in comparisons if c.provider == "superfine").verdict == "slower"


def test_with_too_few_rows_of_others_only_large_changes_count():
    for milliseconds, verdict in ((51.0, "unclear"), (54.0, "unclear"), (60.0, "slower"), (40.0, "faster")):
        comparisons = compare(run(BASE, took(50.0)), run(BASE, took(milliseconds)))
        assert comparisons[1].verdict == verdict


def test_what_the_machine_moved_widens_every_interval():
    quiet, noisy = (1.0, 1.001, 0.999), (0.9, 1.1, 1.05)
    slowed = took(60.0, 59.5, 60.5)
    alone = beside(took(50.0), slowed, base=100.0, moved=quiet, spread=0.1)
    assert alone.verdict == "slower"
    assert alone.change == pytest.approx(0.2, abs=0.001)
    widened = beside(took(50.0), slowed, base=100.0, moved=noisy, spread=0.1)
    assert widened.low < alone.low < alone.high < widened.high
    slightly = took(53.0, 52.5, 53.5)
    assert beside(took(50.0), slightly, base=100.0, moved=quiet, spread=0.1).verdict == "slower"
    assert beside(took(50.0), slightly, base=100.0, moved=noisy, spread=0.1).verdict == "unclear"


def test_a_baseline_is_believed_as_far_as_it_is_known():
    moved = (0.9, 1.1, 0.95, 1.05)
    known = beside(took(50.0), took(60.0), base=120.0, moved=moved, spread=0.001)
    assert known.change == pytest.approx(0.0, abs=0.01)
    vague = beside(took(50.0), took(60.0), base=120.0, moved=moved, spread=0.5)
    assert 0.15 < vague.change < 0.2


def test_a_baseline_that_had_a_bad_day_does_not_make_ours_faster():
    comparison = beside(took(50.0), took(50.0), base=120.0, moved=(1.0, 1.0, 1.0), spread=0.15)
    assert comparison.verdict != "faster"


def test_with_another_torch_times_decide_alone():
    packages = {"packages": {"torch": "another"}}
    comparison = beside(took(50.0), took(60.0), base=120.0, moved=(2.0, 2.0, 2.0), **packages)
    assert (comparison.verdict, comparison.by) == ("slower", "time")
    assert comparison.change == pytest.approx(0.2)


def test_times_are_compared_when_the_baselines_differ():
    comparison = one(took(50.0), took(50.0, baseline="torch foreach"))
    assert (comparison.by, comparison.verdict) == ("time", "same")


def test_a_baseline_may_be_slower_beside_ours_but_not_alone():
    slow = replace(took(120.0, 119.0, 121.0), provider="torch fused")
    comparisons = compare(run(BASE), run(slow))
    assert [c.verdict for c in comparisons] == ["slower"]
    assert failed(comparisons)
    comparisons = compare(run(BASE, took(50.0)), run(slow, took(50.0)))
    assert comparisons[0].verdict == "unclear"
    assert "no change of ours" in comparisons[0].note
    assert not failed(comparisons)


def test_without_intervals_nothing_is_claimed():
    comparison = one(took(50.0), took(100.0, p20_low_ms=None))
    assert (comparison.verdict, comparison.low, comparison.high) == ("unclear", None, None)
    assert "no interval" in comparison.note


@pytest.mark.parametrize("status", ["wrong", "error", "timeout", "out of memory"])
def test_what_worked_and_now_fails_is_broken(status):
    comparisons = compare(
        run(BASE, took(50.0)), run(BASE, replace(BASE, provider="superfine", status=status, note="why"))
    )
    assert comparisons[1].verdict == "broken"
    assert "why" in comparisons[1].note
    assert failed(comparisons)


@pytest.mark.parametrize("status", ["wrong", "timeout"])
def test_a_peer_that_fails_is_broken_but_no_failure_of_ours(status):
    peer = replace(took(50.0), provider="liger")
    comparisons = compare(run(BASE, peer), run(BASE, replace(peer, status=status)))
    assert comparisons[1].verdict == "broken"
    assert not failed(comparisons)


def test_ours_unavailable_or_gone_from_its_case_is_broken():
    unavailable = replace(took(50.0), status="unavailable", note="no module")
    for after in ([BASE, unavailable], [BASE]):
        comparisons = compare(run(BASE, took(50.0)), run(*after))
        assert comparisons[1].verdict == "broken"
        assert failed(comparisons)


def test_rows_of_one_file_are_new_or_missing():
    peer = replace(took(50.0), provider="liger")
    gone = replace(took(50.0), case="300 tensors")
    unavailable = replace(BASE, provider="apex", status="unavailable", note="not installed")
    comparisons = judged(
        [BASE, gone, took(50.0), replace(took(50.0), provider="apex")],
        [BASE, took(50.0), peer, unavailable],
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
    peer, second = replace(took(50.0), provider="liger"), replace(took(50.0), provider="superfine, in place")
    slow = {"p20_ms": 60.0, "p20_low_ms": 60.0, "p20_high_ms": 60.0}
    before = [BASE, took(50.0), second, peer]
    # So many rows that stood still that one which did not hardly counts.
    still = [replace(took(10.0), provider=f"peer {i}") for i in range(40)]
    after = [BASE, took(33.0), second, replace(peer, **slow)]
    comparisons = judged([*before, *still], [*after, *still], threshold=0.1)[:4]
    assert [c.verdict for c in comparisons] == ["same", "faster", "same", "slower"]
    assert verdicts(comparisons) == {"adamw": "same"}
    assert not failed(comparisons)  # a peer's regression is not ours
    comparisons = judged(before, [BASE, took(33.0), replace(second, **slow), peer])
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
    before, after = run(BASE, took(50.0)), run(BASE, took(50.0), **other)
    with pytest.raises(ValueError, match="compare: device is") as refused:
        compare(before, after)
    assert named in str(refused.value)
    assert device_of(before) in str(refused.value)
    named_otherwise = [replace(row, device=after.environment["device"]) for row in after.rows]
    comparisons = compare(before, replace(after, rows=named_otherwise), force=True)
    assert [(c.provider, c.change) for c in comparisons] == [("torch fused", 0.0), ("superfine", 0.0)]


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
        took(50.0),
        replace(took(50.0), provider="superfine, [in place]", case="a case with a long name " * 3),
    ]
    broken = replace(rows[2], status="error", note="RuntimeError: [red] is no style here")
    console = Console(file=io.StringIO(), width=110)
    print_comparison(console, judged(rows, [BASE, took(100.0), broken]))
    printed = console.file.getvalue()
    assert "adamw: broken (all rows: 1 broken, 1 slower, 1 same)" in printed
    assert "+100.0%" in printed
    assert "RuntimeError: [red] is no style here" in printed.replace("\n", " ")
    assert max(map(len, printed.splitlines())) <= 110
