"""Learning-rate schedules: exact values at the corners, and shape in between."""

from __future__ import annotations

import pytest
from superfine.schedule import lr_scale, warmup_steps


def curve(total, **options):
    return [lr_scale(step, total, **options) for step in range(total)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_rises_in_equal_parts_to_exactly_one(kind):
    assert curve(10, kind=kind, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_stays_at_one():
    assert curve(5, kind="constant") == [1.0] * 5


def test_linear_ends_one_part_above_zero():
    assert curve(4, kind="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle():
    values = curve(8, kind="cosine")
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7])  # one step; as many steps as warm-up; a tail after it
def test_every_step_of_a_short_run_has_a_rate_above_zero(kind, total):
    assert all(0 < value <= 1 for value in curve(total, kind=kind, warmup=min(2, total)))


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [(0, 0), (5, 5), (0.0, 0), (0.1, 3), (0.04, 2), (500, 30)],  # 0.04 * 30 = 1.2 rounds up; 500 > all 30
)
def test_warmup_counts_steps_or_a_fraction(warmup, steps):
    assert warmup_steps(warmup, 30) == steps


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match=f"step is {step}; expected 0 <= step < 10"):
        lr_scale(step, 10)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind is 'step'; expected 'constant', 'linear' or 'cosine'"):
        lr_scale(0, 10, kind="step")
