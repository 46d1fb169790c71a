"""The result matrix: every figure against numbers worked out by hand."""

import json
import math

import pytest

from piece_ds.evaluation.matrix import Measure, ResultMatrix

# R[i][j]; tasks not yet trained were evaluated too, except where None.
AFTER = ((0.8, 0.1, None), (0.5, 0.9, 0.3), (0.6, 0.5, 0.7))
BEFORE = (0.2, 0.0, 0.1)
ACCURACY = Measure(after=AFTER, before=BEFORE)
LOSS = Measure(after=AFTER, before=BEFORE, higher_is_better=False)


def test_overall_is_the_mean_of_the_last_row_over_tasks_seen() -> None:
    assert ACCURACY.overall() == pytest.approx((0.6 + 0.5 + 0.7) / 3)
    assert ACCURACY.overall(stage=1) == pytest.approx((0.5 + 0.9) / 2)
    assert ACCURACY.overall(stage=0) == pytest.approx(0.8)


def test_learning_is_the_mean_of_the_diagonal() -> None:
    assert ACCURACY.learning() == pytest.approx((0.8 + 0.9 + 0.7) / 3)


def test_backward_transfer_is_the_change_since_each_task_was_learned() -> None:
    assert ACCURACY.backward_transfer() == pytest.approx(((0.6 - 0.8) + (0.5 - 0.9)) / 2)


def test_authors_backward_transfer_leaves_out_the_last_task_and_counts_its_zero_term() -> None:
    assert ACCURACY.backward_transfer_authors() == pytest.approx(((0.5 - 0.8) + 0.0) / 2)
    assert Measure(after=AFTER[:2]).backward_transfer_authors() == 0.0  # two tasks: that term alone


def test_forgetting_is_measured_from_the_best_earlier_stage() -> None:
    assert ACCURACY.forgetting() == pytest.approx(((0.8 - 0.6) + (0.9 - 0.5)) / 2)
    revived = Measure(after=((0.2, 0.0, 0.0), (0.6, 0.4, 0.0), (0.5, 0.5, 0.1)))
    assert revived.forgetting() == pytest.approx(((0.6 - 0.5) + (0.4 - 0.5)) / 2)


def test_forgetting_of_a_loss_is_its_rise_above_the_lowest() -> None:
    assert LOSS.forgetting() == pytest.approx(((0.6 - 0.5) + (0.5 - 0.9)) / 2)


def test_forward_transfer_is_the_gain_before_training_on_a_task() -> None:
    assert ACCURACY.forward_transfer() == pytest.approx(((0.1 - 0.0) + (0.3 - 0.1)) / 2)
    assert Measure(after=AFTER).forward_transfer() is None


@pytest.mark.parametrize("figure", ["backward_transfer", "backward_transfer_authors", "forgetting", "forward_transfer"])
@pytest.mark.parametrize("after", [(), ((0.8, None),)], ids=["no-task", "one-task"])
def test_one_task_forgets_nothing_and_transfers_nothing(
    figure: str, after: tuple[tuple[float | None, ...], ...]
) -> None:
    assert getattr(Measure(after=after, before=(0.1, 0.2)), figure)() is None


def test_tasks_without_the_measure_leave_the_means() -> None:
    measure = Measure(after=((0.8, None, None), (0.6, None, None), (0.4, None, 1.0)))
    assert measure.overall() == pytest.approx(0.7)
    assert measure.backward_transfer() == pytest.approx(-0.4)
    assert measure.forgetting() == pytest.approx(0.4)
    assert Measure(after=((None,),)).overall() is None


def test_diverged_result_is_not_hidden() -> None:
    assert math.isnan(Measure(after=((math.nan,),)).overall() or 0.0)


def filled() -> ResultMatrix:
    matrix = ResultMatrix(("qa", "code"), ("accuracy", "loss")).with_before({"qa": 0.1}, {"qa": 3.0, "code": 2.0}, 1.5)
    matrix = matrix.with_row({"qa": 1 / 3}, {"qa": 0.5, "code": 2.5}, 1.6)
    return matrix.with_row({"qa": 0.2}, {"qa": 0.75, "code": math.inf}, 1.75)


def test_rows_grow_in_order_and_absent_results_are_none() -> None:
    matrix = filled()
    assert matrix.accuracy.after == ((1 / 3, None), (0.2, None))
    assert matrix.accuracy.before == (0.1, None)
    assert matrix.score == matrix.accuracy
    assert matrix.summary()["general_loss_change"] == pytest.approx(0.25)
    assert matrix.summary()["accuracy_backward_transfer"] == pytest.approx(0.2 - 1 / 3)
    with pytest.raises(ValueError, match="all 2 tasks"):
        matrix.with_row({}, {})
    with pytest.raises(ValueError, match="no task 'QA'"):
        ResultMatrix(("qa",), ("accuracy",)).with_row({"QA": 0.1}, {})


@pytest.mark.parametrize("matrix", [filled(), ResultMatrix(("a",), ("loss",)), ResultMatrix((), ())])
def test_json_is_standard_and_exact(matrix: ResultMatrix) -> None:
    text = json.dumps(matrix.to_json(), allow_nan=False)
    assert ResultMatrix.from_json(json.loads(text)) == matrix
