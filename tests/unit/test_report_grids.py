"""Tables of a report by hand: what is summed over layers, which rows count, and what stands in whose column."""

from dataclasses import replace

import pytest

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.grids import MAX_MASKS, changes_grid, divergence_grid, kinds_grid, result_grids, summary_grid
from piece_ds.report.intervals import over_rows, over_rows_of_mean
from piece_ds.report.results import RunResults


def make_run() -> RunResults:
    """Two of three tasks are trained; after each, all three were evaluated."""
    matrix = ResultMatrix(("a", "b", "c"), ("accuracy",) * 3)
    matrix = matrix.with_before({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 3.0, "b": 4.0, "c": 5.0}, 1.0)
    matrix = matrix.with_row({"a": 0.9, "b": 0.4, "c": 0.3}, {"a": 0.5, "b": 3.5, "c": 5.0}, 1.25)
    matrix = matrix.with_row({"a": 0.7, "b": 0.8, "c": 0.2}, {"a": 1.0, "b": 0.25, "c": 4.5}, 1.5)
    return RunResults("x", "piece-s", 0.1, matrix, rows={"a": 10, "b": 40, "c": 1000})


def percents(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def test_certainty_is_that_of_the_tasks_that_were_trained() -> None:
    """The mean of the last row is over them, so its interval is too."""
    scores, _ = result_grids(make_run())
    interval, rows = scores.rows[-2:]
    each = [percents(*over_rows(share, num)) for share, num in ((0.7, 10), (0.8, 40), (0.2, 1000))]
    assert interval == ("95 % interval", *each, percents(*over_rows_of_mean([(0.7, 10), (0.8, 40)])))
    assert rows == ("test rows", "10", "40", "1,000", "50")
    without = replace(make_run(), rows={"b": 40})
    (interval, rows) = result_grids(without)[0].rows[-2:]
    assert interval == ("95 % interval", "-", each[1], "-", each[1])
    assert rows == ("test rows", "-", "40", "-", "40")
    assert len(result_grids(replace(make_run(), rows={}))[0].rows) == 3


def test_every_row_has_the_general_loss_of_its_own_moment() -> None:
    _, losses = result_grids(make_run())
    assert losses.header == ("", "a", "b", "c", "mean of seen", "general text")
    assert losses.rows == (
        ("before", "3.000", "4.000", "5.000", "-", "1.000"),
        ("after a", "0.500", "3.500", "5.000", "0.500", "1.250"),
        ("after b", "1.000", "0.250", "4.500", "0.625", "1.500"),
    )


def test_derived_figures_stand_under_their_names() -> None:
    run = replace(make_run(), divergence={"after a": {"general text": 0.5}, "after b": {"general text": 0.75}})
    grid = summary_grid([run])
    assert dict(zip(grid.header, grid.rows[0], strict=True)) == {
        "run": "x",
        "OP": "75.0 %",
        "learned": "85.0 %",
        "BWT": "-20.0",
        "BWT (authors)": "+0.0",
        "forgetting": "+20.0",
        "FWT": "+20.0",
        "loss OP": "0.625",
        "loss BWT": "+0.500",
        "general loss change": "+0.500",
        "general KL": "0.750",
    }


def cell(selected: int, total: int) -> dict[str, int]:
    return {"selected": selected, "total": total}


def test_kinds_are_summed_over_layers_and_divided_by_all_weights_of_the_kind() -> None:
    """Most selected first; many masks are summed up."""
    first = {"0": {"q": cell(2, 100), "norm": cell(1, 10)}, "1": {"q": cell(4, 100), "norm": cell(0, 10)}}
    second = {"0": {"q": cell(0, 100), "norm": cell(10, 10)}, "1": {"q": cell(0, 100), "norm": cell(10, 10)}}
    grid = kinds_grid("kinds", {"a": first, "b": second})
    assert grid.header == ("kind", "weights", "a", "b")
    assert grid.rows == (("norm", "20", "5 %", "100 %"), ("q", "200", "3 %", "0 %"))
    many = {str(i): {"0": {"q": cell(i, 100)}} for i in range(MAX_MASKS + 1)}
    grid = kinds_grid("kinds", many)
    assert grid.header == ("kind", "weights", "lowest", "mean", "highest")
    assert grid.rows == (("q", "100", "0 %", f"{MAX_MASKS / 2:g} %", f"{MAX_MASKS} %"),)


def test_changes_are_shares_of_the_selected_values_of_each_kind_and_task() -> None:
    run = replace(
        make_run(),
        changes={
            "a": {"q": {"values": 8, "changed": 2}, "norm": {"values": 4, "changed": 4}},
            "b": {"q": {"values": 10, "changed": 5}},
        },
    )
    grid = changes_grid("changes", run)
    assert grid.header == ("kind", "a", "b")
    assert grid.rows == (("q", "25.0 %", "50.0 %"), ("norm", "100.0 %", "-"))


@pytest.mark.parametrize("moments", [["after a"], ["after a", "after b"]])
def test_divergence_has_a_row_a_moment_and_general_text_last(moments: list[str]) -> None:
    found = {"after a": {"a": 0.125, "general text": 0.5}, "after b": {"general text": 0.75, "b": 0.25, "a": 1.0}}
    grid = divergence_grid(replace(make_run(), divergence={moment: found[moment] for moment in moments}))
    expected = {
        1: (("", "a", "general text"), (("after a", "0.125", "0.500"),)),
        2: (
            ("", "a", "b", "general text"),
            (("after a", "0.125", "-", "0.500"), ("after b", "1.000", "0.250", "0.750")),
        ),
    }
    assert (grid.header, grid.rows) == expected[len(moments)]
