"""What figures draw is what was measured: places, means, bands, cells and the direction of their axes."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report import frontier, heat_maps, lines
from piece_ds.report.frontier import FrontierPoint, frontier_figure
from piece_ds.report.heat_maps import mask_heat_maps, overlap_heat_map, result_heat_maps
from piece_ds.report.lines import smoothed, stream_figure, training_figure
from piece_ds.report.results import RunResults
from piece_ds.report.run_figures import line_figures

Drawn = Callable[[], list[Axes]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Return the axes of the last figure."""
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    for module in (lines, frontier, heat_maps):
        monkeypatch.setattr(module, "png", keep)
    return lambda: figures[-1].axes


def curves(axes: Axes, label: str | None = None) -> list[list[tuple[float, float]]]:
    found = [line for line in axes.lines if label is None or line.get_label() == label]
    return [list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)) for line in found]


def band(axes: Axes) -> set[tuple[float, float]]:
    (filled,) = axes.collections
    return {(float(x), float(y)) for x, y in filled.get_paths()[0].vertices}


def test_a_task_begins_where_the_longest_curve_of_the_one_before_ends(drawn: Drawn) -> None:
    """Of two runs, the second is longer in the first task and has repetitions; a star is the step that is kept."""
    losses = {
        "short": [{"a": [(1, 4.0), (2, 3.0)], "b": [(1, 2.0), (3, 1.0)]}],
        "long": [
            {"a": [(1, 5.0), (6, 3.0)], "b": [(2, 2.0)]},
            {"a": [(1, 7.0), (6, 4.0)], "b": [(2, 6.0)]},
        ],
    }
    training_figure(
        losses,
        ["a", "b"],
        held_out={"short": {"b": [(1, 2.5), (3, 1.5)]}},
        kept={"short": {"b": (3, 1.5)}},
    )
    (axes,) = drawn()
    shown = curves(axes)
    for curve in (
        [(1, 4), (2, 3)],
        [(7, 2), (9, 1)],
        [(1, 6), (6, 3.5)],
        [(8, 4)],
        [(7, 2.5), (9, 1.5)],
        [(9, 1.5)],
    ):
        assert curve in shown, curve
    between = [curve[0][0] for curve in shown if len(curve) == 2 and curve[0][0] == curve[1][0]]
    assert between == [0, 6]
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"a": 3.0, "b": 7.5}


def test_a_smoothed_curve_keeps_its_places_and_its_raw_values(drawn: Drawn) -> None:
    raw = [(step, float(step % 7)) for step in range(1, 201)]
    training_figure({"x": [{"a": raw}]}, ["a"])
    shown = curves(drawn()[0])
    assert raw in shown
    assert [(step, value) for (step, _), value in zip(raw, smoothed([y for _, y in raw]), strict=True)] in shown


def test_a_line_is_the_mean_of_repetitions_and_its_band_spans_them(drawn: Drawn) -> None:
    """What was not measured, or diverged, is left out of the mean at its place alone."""
    several = [[None, 1.0, 2.0], [None, 3.0, float("inf")]]
    stream_figure({"loss": {"x": several}, "score": {"x": [[0.5, 0.25, None]]}}, ["before", "a", "b"], shares=["score"])
    loss, score = drawn()
    assert curves(loss, "x") == [[(1, 2), (2, 2)]]
    assert band(loss) >= {(1, 1), (1, 3), (2, 2)}
    assert curves(score, "x") == [[(0, 0.5), (1, 0.25)]]
    assert score.get_ylim() == pytest.approx((-0.02, 1.02))


def test_a_runs_mean_of_the_tasks_seen_stands_at_its_moment(drawn: Drawn) -> None:
    """Nothing was seen before the first task; general text was read then too."""
    matrix = ResultMatrix(("a", "b"), ("accuracy", "accuracy"))
    matrix = matrix.with_before({"a": 0.1, "b": 0.2}, {"a": 3.0, "b": 4.0}, 1.0)
    matrix = matrix.with_row({"a": 0.75, "b": 0.5}, {"a": 1.0, "b": 3.0}, 1.25)
    matrix = matrix.with_row({"a": 0.25, "b": 1.0}, {"a": 2.0, "b": 1.0}, 1.5)
    line_figures({"x": [RunResults("x", "piece-s", 0.1, matrix)]})
    score, general = drawn()
    assert curves(score, "x") == [[(1, 0.75), (2, 0.625)]]
    assert curves(general, "x") == [[(0, 1), (1, 1.25), (2, 1.5)]]
    assert [text.get_text() for text in score.get_xticklabels()] == ["before", "a", "b"]


def test_the_frontier_has_learned_across_kept_up_and_better_to_the_right_and_above(drawn: Drawn) -> None:
    points = [
        FrontierPoint("piece", "1e-3", 0.5, (0.75, 2.0), [(0.4, (0.7, 1.9)), (0.6, (0.8, None))]),
        FrontierPoint("piece", "1e-2", 0.6, (0.5, None)),
        FrontierPoint("lora", "1e-3", 0.2, (0.1, 3.0)),
    ]
    frontier_figure(points, "learned", ["kept", "general loss"], x_is_loss=False, y_are_losses=[False, True])
    kept, general = drawn()
    assert curves(kept, "piece") == [[(0.5, 0.75), (0.6, 0.5)]]
    assert curves(general, "piece") == [[(0.5, 2)]]
    assert curves(kept, "lora") == [[(0.2, 0.1)]]
    assert {text.get_text() for text in kept.texts} == {"1e-3", "1e-2"}
    assert [axes.yaxis_inverted() for axes in (kept, general)] == [False, True]
    assert not kept.xaxis_inverted()
    frontier_figure(points, "learned", ["kept"], x_is_loss=True)
    assert drawn()[0].xaxis_inverted()


def cells(axes: Axes) -> list[list[float | None]]:
    array = axes.images[0].get_array()
    return [[None if np.ma.is_masked(value) else float(value) for value in row] for row in np.ma.asarray(array)]


def test_a_cell_is_in_the_row_of_its_moment_and_the_column_of_its_task(drawn: Drawn) -> None:
    result_heat_maps({"x": [[0.5, None], [0.75, 0.25]], "y": [[1.0, 0.0]]}, ["after a", "after b"], ["a", "b"])
    first, second = drawn()
    assert cells(first) == [[0.5, None], [0.75, 0.25]]
    assert cells(second) == [[1.0, 0.0], [None, None]]
    assert {(text.get_position(), text.get_text()) for text in first.texts} == {
        ((0, 0), "0.50"),
        ((0, 1), "0.75"),
        ((1, 1), "0.25"),
    }
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.0, 1.0)
    overlap_heat_map([[1.0, 0.2, 0.3], [0.2, 1.0, 0.4], [0.3, 0.4, 1.0]], ["a", "b", "c"], "overlap")
    assert cells(drawn()[0]) == [[None, 0.2, 0.3], [0.2, None, 0.4], [0.3, 0.4, None]]


def test_a_mask_is_drawn_as_the_share_of_each_layers_own_weights(drawn: Drawn) -> None:
    """In powers of ten of a percentage; layer 10 comes after layer 2, and what has no number last."""
    counts = {
        "10": {"q": {"selected": 1, "total": 1000}},
        "other": {"norm": {"selected": 0, "total": 8}},
        "2": {"q": {"selected": 10, "total": 100}, "norm": {"selected": 4, "total": 4}},
    }
    mask_heat_maps({"a": counts})
    axes = drawn()[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "10", "other"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["q", "norm"]
    low = axes.images[0].get_clim()[0]
    assert cells(axes) == [[1.0, 2.0], [-1.0, None], [None, low - 1]]
