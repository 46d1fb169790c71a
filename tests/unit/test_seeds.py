"""Intervals over seeds: against Student's t worked out by hand, and refused for runs that are not repetitions."""

from dataclasses import replace

import pytest

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.groups import Interval, over_seeds
from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError


def make_run(*scores: float | None, method: str = "piece-s", name: str = "a") -> RunResults:
    """A run of one task with a score, and of one more for each further score."""
    tasks = tuple(f"t{index}" for index in range(len(scores)))
    matrix = ResultMatrix(tasks, ("accuracy",) * len(tasks))
    for stage in range(len(tasks)):
        seen = range(stage + 1)
        matrix = matrix.with_row({tasks[i]: scores[i] for i in seen}, {tasks[i]: 1.0 for i in seen}, 2.0)
    return RunResults(name, method, 0.001, matrix)


def test_interval_is_that_of_students_t() -> None:
    """Of 0.1, 0.2 and 0.3: mean 0.2, deviation 0.1, and 4.302653 for two degrees of freedom at 95 %."""
    found = over_seeds([make_run(0.1), make_run(0.2), make_run(0.3)])["score_overall"]
    assert (found.mean, found.num_runs) == (pytest.approx(0.2), 3)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    wide = over_seeds([make_run(0.1), make_run(0.2), make_run(0.3)], confidence=0.99)["score_overall"]
    assert wide.half_width == pytest.approx(9.924843 * 0.1 / 3**0.5, rel=1e-6)


def test_one_run_has_no_interval_and_absent_figures_are_left_out() -> None:
    found = over_seeds([make_run(0.5)])
    assert found["score_overall"] == Interval(0.5, None, 1)
    assert "score_backward_transfer" not in found
    two = over_seeds([make_run(0.5, 0.5), make_run(0.5, None)])
    assert (two["score_learning"].num_runs, two["score_learning"].half_width) == (2, 0.0)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (make_run(0.1, method="random"), "method"),
        (make_run(0.1, 0.2), "tasks"),
        (replace(make_run(0.1), ratio=0.1), "ratio"),
        (replace(make_run(0.1), matrix=ResultMatrix(("t0",), ("accuracy",))), "number of finished tasks"),
    ],
)
def test_runs_that_are_no_repetitions_are_refused(other: RunResults, what: str) -> None:
    with pytest.raises(UserError, match=f"the same {what}"):
        over_seeds([make_run(0.1), other])
    with pytest.raises(UserError, match="at least one"):
        over_seeds([])
    with pytest.raises(ValueError, match="confidence"):
        over_seeds([make_run(0.1)], confidence=1.0)
