"""Intervals against hand numbers: Student's t over repetitions, Wilson's over rows."""

import pytest

from piece_ds.report.intervals import Interval, over_repetitions, over_rows, over_rows_of_mean


def test_interval_over_repetitions_is_that_of_students_t() -> None:
    """Of 0.1, 0.2 and 0.3: mean 0.2, deviation 0.1, and 4.302653 for two degrees of freedom at 95 %."""
    found = over_repetitions([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    wide = over_repetitions([0.1, 0.2, 0.3], confidence=0.99)
    assert wide.half_width == pytest.approx(9.924843 * 0.1 / 3**0.5, rel=1e-6)
    assert over_repetitions([0.5]) == Interval(0.5, None)


def test_interval_over_rows_is_wilsons() -> None:
    """0 of 10: z^2 / (n + z^2) = 0.2775 above; 8 of 10: 0.4902 to 0.9433 (Newcombe 1998, method 3)."""
    assert over_rows(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert over_rows(0.8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    low, high = over_rows(0.2, 10)
    assert (1 - high, 1 - low) == pytest.approx(over_rows(0.8, 10))


def test_interval_of_a_mean_is_narrower_than_those_of_its_parts() -> None:
    one = over_rows(0.5, 100)
    assert over_rows_of_mean([(0.5, 100)]) == pytest.approx(one)
    four = over_rows_of_mean([(0.5, 100)] * 4)
    assert four[1] - four[0] == pytest.approx((one[1] - one[0]) / 2)
