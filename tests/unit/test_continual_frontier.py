"""The experiment's comparison at matched learning, against numbers worked out by hand."""

from math import inf, nan

import pytest

from bench.continual.curves import methods_of, start_and_best
from bench.continual.frontier import Point, levels, lost_at, matched, why_not
from bench.continual.real import summary as real
from bench.continual.tables import summary_page

# Rates that learn more and more (the loss falls) and lose more and more, but for the last, which is too large.
CURVE = [Point(1e-4, 4.0, 0.0), Point(1e-3, 3.0, 0.4), Point(1e-2, 2.0, 2.0), Point(1e-1, 3.5, 6.0)]


@pytest.mark.parametrize(
    ("level", "lost"),
    [
        (3.0, 0.4),  # a point itself
        (3.5, 0.2),  # half way from the first to the second; the last point lies on it too, but its rate is too large
        (2.25, 1.6),  # three quarters from the second to the third
        (4.0, 0.0),  # the ends count
        (2.0, 2.0),
        (4.1, None),  # the smallest rate learned more
        (1.9, None),  # never learned
    ],
)
def test_what_is_lost_at_a_level_lies_on_the_line_between_neighbouring_rates(level: float, lost: float | None) -> None:
    assert lost_at(CURVE, level) == pytest.approx(lost)


def test_the_best_of_several_passages_counts() -> None:
    """A method may be run at the best rate for a level; a worse passage is nobody's choice."""
    wavy = [Point(1.0, 4.0, 1.0), Point(2.0, 2.5, 2.5), Point(3.0, 3.5, 0.5), Point(4.0, 2.0, 3.5)]
    assert lost_at(wavy, 3.0) == pytest.approx(1.5)  # 2.0 between the first two rates
    assert lost_at(wavy[::-1], 3.0) == pytest.approx(1.5)  # by rate, not by place


def test_rates_above_the_one_that_learned_the_most_do_not_count() -> None:
    """Where a larger rate learns less, the way back through a level is damage, not a choice."""
    too_large = [Point(1.0, 2.0, 0.1), Point(2.0, 4.0, 5.0)]
    assert lost_at(too_large, 3.0) is None
    assert why_not([too_large], 3.0) == "passed"


def test_runs_that_diverged_are_left_out() -> None:
    diverged = [*CURVE, Point(0.5, nan, 1.0), Point(0.05, 2.5, inf)]
    assert lost_at(diverged, 2.25) == lost_at(CURVE, 2.25)
    assert lost_at([Point(1.0, nan, nan)], 2.0) is None


def test_a_curve_of_one_rate_has_a_value_at_its_own_level_alone() -> None:
    assert lost_at(CURVE[:1], 4.0) == 0.0
    assert lost_at(CURVE[:1], 3.9) is None


def test_matched_is_students_interval_over_the_seeds_that_pass() -> None:
    """Values 0.2 and 0.4: mean 0.3, half width t(0.975, 1) * 0.1414 / sqrt(2) = 12.706 * 0.1."""
    other = [Point(1e-4, 4.0, 0.2), Point(1e-3, 3.0, 0.6)]
    found, missing = matched([CURVE, other, CURVE[1:3]], 3.5)
    assert found is not None
    assert (found.mean, found.half_width) == (pytest.approx(0.3), pytest.approx(1.2706, abs=1e-4))
    assert missing == 1


def test_a_method_without_a_value_is_told_why() -> None:
    assert why_not([CURVE], 1.5) == "not reached"
    assert why_not([CURVE], 5.0) == "passed"
    assert matched([CURVE], 1.5) == (None, 1)


def test_levels_are_shares_of_the_way_from_the_start_to_the_best() -> None:
    assert levels(8.0, 3.0, (0.0, 0.5, 1.0)) == [8.0, 5.5, 3.0]


def run_row(method: str, rate: float, seed: int, learned: float, lost: float) -> dict[str, str]:
    return {
        "method": method,
        "ratio": "0.01",
        "rate": f"{rate:g}",
        "seed": str(seed),
        "recipe": "r",
        "selected": "7",
        "loss_before": "8.0",
        "loss_learned": str(learned),
        "general_loss_change": str(lost),
        "device": "cpu",
        "torch": "2",
        "date": "2026-01-01",
        "general_loss_before": "2.5",
        "accuracy_before": "0.0",
    }


def test_the_page_has_the_interpolated_values_and_says_what_was_not_reached() -> None:
    rows = [
        run_row("piece-s", 1e-3, 1, 5.0, 0.1),
        run_row("piece-s", 1e-2, 1, 3.0, 0.5),
        run_row("random", 1e-3, 1, 7.0, 0.0),
        run_row("random", 1e-2, 1, 5.5, 0.3),
    ]
    methods = methods_of(rows)
    assert start_and_best(methods) == (8.0, 3.0)
    # 70 % of the way from 8 to 3 is 4.5: a quarter from 5.0 to 3.0, hence 0.2.
    page = summary_page(methods, rows)
    assert "| piece-s 1 % | 1 | 0.200 | 0.300 | 0.400 |" in page
    assert "| random 1 % | 1 | not reached | not reached | not reached |" in page
    assert "Not made: piece-f" in page


def test_the_studys_page_holds_every_run_against_full_fine_tuning_and_lora_at_equal_learning() -> None:
    def run(name: str, rate: float, learned: float, rise: float, seed: str = "1") -> dict[str, str]:
        numbers = {"rate": rate, "learned_before": 7.0, "learned": learned, "rise": rise, "kl": rise}
        values = {key: str(value) for key, value in numbers.items()}
        return {"name": name, "task": "a", "seed": seed, "device": "cpu", "delta_bytes": "0", "seconds": "1", **values}

    page = real.summary_page(
        [
            run("full", 1e-4, 1.0, 0.1),
            run("full", 3e-4, 0.5, 0.6),
            run("LoRA", 1e-3, 0.7, 0.9),
            run("ratio 1 %, scaled steps", 1e-3, 0.8, 0.1),  # full has lost 0.3 there
            run("ratio 1 %, scaled steps", 3e-3, 0.6, 0.2),
            run("ratio 1 %, scaled steps", 1e-2, 0.7, 9.0),  # learns less than a smaller rate: left out
            # Another seed is held against runs of its own.
            run("full", 1e-4, 1.0, 1.0, "2"),
            run("full", 3e-4, 0.5, 2.0, "2"),
            run("ratio 1 %, scaled steps", 1e-3, 0.8, 0.1, "2"),
        ]
    )
    rows = [line for line in page.splitlines() if line.startswith("| a |") and "ratio 1 %, scaled steps |" in line]
    assert rows == [
        "| a | 1 | ratio 1 %, scaled steps | 0.001 | 0.800 | +0.100 | +0.300 (x 3.0) | passed | not run |",
        "| a | 1 | ratio 1 %, scaled steps | 0.003 | 0.600 | +0.200 | +0.500 (x 2.5) | not reached | not run |",
        "| a | 2 | ratio 1 %, scaled steps | 0.001 | 0.800 | +0.100 | +1.400 (x 14.0) | not run | not run |",
    ]
