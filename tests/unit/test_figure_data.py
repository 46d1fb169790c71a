"""What figures show: each line, cell, tick and text is read off the drawn figure and compared with what was given."""

from itertools import pairwise
from math import inf, log10, nan

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report import frontier, heat_maps, lines
from piece_ds.report.comparison_figures import comparison_figures
from piece_ds.report.frontier import FrontierPoint, frontier_figure
from piece_ds.report.groups import group_runs
from piece_ds.report.heat_maps import mask_heat_maps, overlap_heat_map, result_heat_maps
from piece_ds.report.lines import smoothed, stream_figure, training_figure
from piece_ds.report.results import RunResults
from piece_ds.report.run_figures import make_figures
from piece_ds.report.style import line_styles


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the test, in order. None becomes a PNG, which would take most of the time."""
    figures: list[Figure] = []
    for module in (lines, heat_maps, frontier):
        monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    return figures


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Labelled lines of axes: label -> points."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def band(axes: Axes, index: int = 0) -> set[tuple[float, float]]:
    return {(float(x), round(float(y), 9)) for x, y in axes.collections[index].get_paths()[0].vertices}


def texts(axes: Axes) -> dict[tuple[float, float], str]:
    """Texts and annotations in axes: where -> what."""
    return {
        tuple(float(value) for value in getattr(text, "xy", text.get_position())): text.get_text()
        for text in axes.texts
    }


def ticks(axis: object) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]  # type: ignore[attr-defined]


def cells(axes: Axes) -> list[list[float]]:
    """Values of a heat map; nan if a cell is empty."""
    return axes.images[0].get_array().filled(nan).tolist()


def test_lines_along_the_stream_are_means_and_bands_span_the_seeds(drawn: list[Figure]) -> None:
    scores = {"x": [[None, 0.5, 0.7], [None, 0.6, 0.9]], "y": [[None, None, 0.3]]}
    losses = {"x": [[1.0, inf, 1.05], [1.0, 1.1, nan]], "y": [[1.05, None, 1.0]]}
    general = {"x": [[1.0, 50.0, 1.0]], "y": [[1.0, 1.0, 1.0]]}
    panels = {"score": scores, "loss": losses, "general": general}
    stream_figure(panels, ["before", "a", "b"], shares=["score"], may_be_log=["general"], families=["f", "g"])
    score, loss, _ = drawn[0].axes

    # Seeds become a mean and a band; what is missing or diverged is left out.
    assert curves(score) == {"x": [(1, pytest.approx(0.55)), (2, pytest.approx(0.8))], "y": [(2, 0.3)]}
    assert band(score) == {(1, 0.5), (1, 0.6), (2, 0.7), (2, 0.9)}
    assert len(score.collections) == 1  # none for a single seed
    assert curves(loss) == {"x": [(0, 1.0), (1, 1.1), (2, 1.05)], "y": [(0, 1.05), (2, 1.0)]}
    assert [line.get_color() for line in score.lines] == [look.color for look in line_styles(["f", "g"])]

    # A panel begins with the first moment that has a value; shares span 0 to 100 %, losses at least the noise.
    assert score.get_xlim() == pytest.approx((0.7, 2.3))
    assert loss.get_xlim() == pytest.approx((-0.3, 2.3))
    assert ticks(loss.xaxis) == ["before", "a", "b"]
    assert score.get_ylim() == pytest.approx((-0.02, 1.02))
    assert score.yaxis.get_major_formatter()(0.5) == "50%"
    assert loss.get_ylim() == pytest.approx((1.05 - 0.11, 1.05 + 0.11))
    assert [axes.get_yscale() for axes in drawn[0].axes] == ["linear", "linear", "log"]
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["score", "loss", "general (log scale)"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["x", "y"]

    # A single run needs no legend; a spread above the noise sets its own limits.
    stream_figure({"loss": {"x": [[1.0, 2.5]]}}, ["before", "a"], may_be_log=["other"])
    assert drawn[1].legends == []
    low, high = drawn[1].axes[0].get_ylim()
    assert low < 1.0 < 2.5 < high
    assert drawn[1].axes[0].get_yscale() == "linear"


def test_a_training_curve_follows_the_task_before_and_has_its_held_out_rows_and_star(drawn: list[Figure]) -> None:
    first = {"a": [(2, 3.0), (4, 2.0)], "b": [(2, 1.0)]}
    second = {"a": [(2, 5.0), (6, 4.0)]}
    held_out, kept = {"y": {"a": [(3, 1.5)], "b": [(1, 1.25)]}}, {"y": {"a": (3, 1.5)}}
    training_figure({"x": [first, second], "y": [first]}, ["a", "b"], held_out=held_out, kept=kept)
    (axes,) = drawn[0].axes
    looks = line_styles(["x", "y"])

    # Task b begins where the longest curve of task a ends: at step 6.
    assert curves(axes) == {"x": [(2, 4.0), (4, 2.0), (6, 4.0)], "y": [(2, 3.0), (4, 2.0)]}
    of = {look.color: [line for line in axes.lines if line.get_color() == look.color] for look in looks}
    points = {
        color: [(line.get_linestyle(), line.get_marker(), np.column_stack(line.get_data()).tolist()) for line in found]
        for color, found in of.items()
    }
    assert ("-", "o", [[8, 1.0]]) in points[looks[0].color]  # a single point is a marker
    assert ("--", "s", [[8, 1.0]]) in points[looks[1].color]
    assert ("--", ".", [[3, 1.5]]) in points[looks[1].color]
    assert ("--", ".", [[7, 1.25]]) in points[looks[1].color]
    assert [data for _, marker, data in points[looks[1].color] if marker == "*"] == [[[3, 1.5]]]
    assert not [data for _, marker, data in points[looks[0].color] if marker in ".*" and data]
    assert band(axes) == {(2, 3.0), (2, 5.0), (4, 2.0), (6, 4.0)}

    # Each task's start is a line, and its name stands above its middle.
    starts = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert starts == [0, 6]
    assert texts(axes) == {(3.0, 1.01): "a", (7.0, 1.01): "b"}
    assert axes.get_xlim() == pytest.approx((0, 1.02 * 8))

    # Names that would touch are left out, from left to right.
    tasks = [f"task-{number}" for number in range(60)]
    training_figure({"x": [{task: [(1, 1.0), (2, 1.0)] for task in tasks}]}, tasks)
    named = [at for at, _ in texts(drawn[1].axes[0])]
    inches = 0.8 * drawn[1].get_figwidth() / 120
    assert named[0] < 20
    assert 5 < len(named) < 60
    assert all(1.0 - 0.01 <= (right - left) * inches < 1.0 + 2 * inches for left, right in pairwise(named))


def test_long_curves_are_smoothed_and_raw_values_stand_behind_a_single_one(drawn: list[Figure]) -> None:
    values = [1.0 + (step % 7) / 10 for step in range(lines.MAX_PLAIN_POINTS + 1)]
    curve = list(enumerate(values))
    training_figure({"x": [{"a": curve[:-1]}]}, ["a"])
    assert list(curves(drawn[0].axes[0]).values()) == [curve[:-1]]
    training_figure({"x": [{"a": curve}]}, ["a"])
    (axes,) = drawn[1].axes
    assert curves(axes) == {"x": list(enumerate(smoothed(values)))}
    (faint,) = [line for line in axes.lines if line.get_alpha()]
    assert list(faint.get_ydata()) == values
    training_figure({"x": [{"a": curve}, {"a": [(step, 2 * loss) for step, loss in curve]}]}, ["a"])
    (axes,) = drawn[2].axes
    assert not [line for line in axes.lines if line.get_alpha()]
    assert [y for _, y in curves(axes)["x"]] == pytest.approx(smoothed([1.5 * value for value in values]))
    sums = [*smoothed(values), *smoothed([2 * value for value in values])]
    assert {y for _, y in band(axes)} == {round(value, 9) for value in sums}
    assert smoothed([0.0, 3.0, 0.0, 0.0]) == [0.0, 1.0, 1.0, 0.0]


def test_cells_of_results_have_their_value_colour_and_text(drawn: list[Figure]) -> None:
    panels = {"far": [[0.0, None], [0.5, 1.0]], "begun": [[nan, 0.25]]}
    result_heat_maps(panels, ["after a", "after b"], ["a", "b"], (0.0, 1.0), lambda value: f"{100 * value:.0f}")
    far, begun = drawn[0].axes
    assert np.array_equal(cells(far), [[0.0, nan], [0.5, 1.0]], equal_nan=True)
    assert np.array_equal(cells(begun), [[nan, 0.25], [nan, nan]], equal_nan=True)
    assert texts(far) == {(0, 0): "0", (0, 1): "50", (1, 1): "100"}
    assert texts(begun) == {(1, 0): "25"}
    assert {text.get_text(): text.get_color() for text in far.texts} == {"0": "white", "50": "white", "100": "black"}
    assert {axes.images[0].get_clim() for axes in (far, begun)} == {(0.0, 1.0)}
    assert to_hex(far.get_facecolor()) == heat_maps.ABSENT_COLOR.lower()

    # Rows are named beside the first panel alone; titles say whose each is.
    assert ticks(far.yaxis) == ["after a", "after b"]
    assert ticks(begun.yaxis) == []
    assert ticks(far.xaxis) == ticks(begun.xaxis) == ["a", "b"]
    assert [axes.get_title(loc="left") for axes in (far, begun)] == ["far", "begun"]

    # Without ends the data give them; a spread below the noise is widened about its middle.
    for rows, ends in (
        ([[1.0, 3.0]], (1.0, 3.0)),
        ([[1.0, 1.1]], (0.95, 1.15)),
        ([[1.0, 1.2]], (1.0, 1.2)),
        ([[2.0, None]], (1.9, 2.1)),
    ):
        result_heat_maps({"x": rows}, ["r"], ["a", "b"])
        assert drawn[-1].axes[0].images[0].get_clim() == pytest.approx(ends)
    assert texts(drawn[-1].axes[0]) == {(0, 0): "2.00"}

    # Numbers that would touch make way for a scale.
    for num_tasks, num_axes in ((heat_maps.MAX_CELLS_WITH_TEXT, 1), (heat_maps.MAX_CELLS_WITH_TEXT + 1, 2)):
        result_heat_maps({"x": [[0.5] * num_tasks]}, ["r"], ["t"] * num_tasks)
        assert len(drawn[-1].axes) == num_axes
        assert len(drawn[-1].axes[0].texts) == (num_tasks if num_axes == 1 else 0)


def test_names_that_would_touch_are_slanted_and_then_skipped(drawn: list[Figure]) -> None:
    for num_tasks, name, slanted in ((3, "a", 0), (3, "a long name of a task", 35), (80, "a long name", 35)):
        result_heat_maps({"x": [[0.5] * num_tasks] * num_tasks}, ["r"] * num_tasks, [name] * num_tasks)
        labels = drawn[-1].axes[0].get_xticklabels()
        assert {label.get_rotation() for label in labels} == {slanted}
        assert (len(labels) < num_tasks) == (num_tasks == 80)
        assert len(labels) > num_tasks / 4


def test_masks_are_shown_by_share_with_other_colours_for_none_and_absent(drawn: list[Figure]) -> None:
    first = {
        "10": {"q": {"selected": 1, "total": 1000}, "k": {"selected": 0, "total": 1000}},
        "2": {"q": {"selected": 500, "total": 1000}},
        "other": {"head": {"selected": 2, "total": 100}},
    }
    mask_heat_maps({"one": first, "two": {"2": {"k": {"selected": 1000, "total": 1000}}}})
    one, two = drawn[0].axes[:2]
    low, high = one.images[0].get_clim()
    assert (low, high) == two.images[0].get_clim() == (-1.0, 2.0)

    # Layers in the order of their numbers; then the others.
    assert ticks(one.yaxis) == ["2", "10", "other"]
    assert ticks(one.xaxis) == ["q", "k", "head"]
    wanted = [[log10(50), nan, nan], [-1.0, low - 1, nan], [nan, nan, log10(2)]]
    assert np.allclose(cells(one), wanted, equal_nan=True)
    assert np.allclose(cells(two), [[nan, 2.0, nan], [nan] * 3, [nan] * 3], equal_nan=True)
    assert to_hex(one.images[0].cmap.get_under()) == heat_maps.NONE_COLOR.lower()
    bar = drawn[0].axes[-1]
    assert [bar.yaxis.get_major_formatter()(power) for power in (-1.0, 0.0, 2.0)] == ["0.1", "1", "100"]

    # A scale spans two decades at least.
    mask_heat_maps({"one": {"0": {"q": {"selected": 5, "total": 1000}, "k": {"selected": 6, "total": 1000}}}})
    assert drawn[1].axes[0].images[0].get_clim() == (-2.0, 0.0)
    mask_heat_maps({"deep": {str(layer): {"q": {"selected": 1, "total": 4}} for layer in range(41)}})
    assert ticks(drawn[2].axes[0].yaxis) == [str(layer) for layer in range(0, 41, 3)]


def test_overlaps_have_no_diagonal_and_begin_at_nothing(drawn: list[Figure]) -> None:
    overlap_heat_map([[1.0, 0.25], [0.25, 1.0]], ["a", "b"], "title")
    (axes,) = drawn[0].axes
    assert np.array_equal(cells(axes), [[nan, 0.25], [0.25, nan]], equal_nan=True)
    assert texts(axes) == {(1, 0): "0.25", (0, 1): "0.25"}
    assert axes.images[0].get_clim() == (0.0, 0.25)
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == ["a", "b"]
    # Of many tasks, whose numbers would touch, the colours have a scale instead.
    many = heat_maps.MAX_CELLS_WITH_TEXT + 1
    overlap_heat_map([[0.5] * many] * many, [str(place) for place in range(many)], "title")
    cells_of_many, scale = drawn[1].axes
    assert (texts(cells_of_many), scale.get_ylabel()) == ({}, "Jaccard index")


def test_the_frontier_has_lines_seeds_labels_and_axes_turned_to_better(drawn: list[Figure]) -> None:
    points = [
        FrontierPoint("p", "0.1", 0.5, (0.4, 1.0), [(0.45, (0.35, 1.0)), (0.55, (0.45, None))]),
        FrontierPoint("p", "0.2", 0.7, (None, 5.0)),
        FrontierPoint("q", "", 0.6, (0.3, 2.0)),
    ]
    frontier_figure(points, "learned", ["kept", "loss"], y_are_losses=[False, True])
    kept, loss = drawn[0].axes
    assert curves(kept) == {"p": [(0.5, 0.4)], "q": [(0.6, 0.3)]}
    assert curves(loss) == {"p": [(0.5, 1.0), (0.7, 5.0)], "q": [(0.6, 2.0)]}
    assert [sorted(map(tuple, found.get_offsets().tolist())) for found in kept.collections] == [
        [(0.45, 0.35), (0.55, 0.45)]
    ]
    assert not loss.collections  # no more seeds than points
    assert texts(kept) == {(0.5, 0.4): "0.1"}
    assert texts(loss) == {(0.5, 1.0): "0.1", (0.7, 5.0): "0.2"}
    assert [(axes.xaxis_inverted(), axes.yaxis_inverted()) for axes in (kept, loss)] == [(False, False), (False, True)]
    assert [axes.get_title(loc="left") for axes in (kept, loss)] == ["kept", "loss (log scale)"]
    assert kept.yaxis.get_major_formatter()(0.5) == kept.xaxis.get_major_formatter()(0.5) == "50%"

    # Learned by loss, with too many points to label.
    many = [FrontierPoint("p", str(number), number / 100, (1.0,)) for number in range(frontier.MAX_LABELS + 1)]
    for shown, num_labels in ((many[1:], len(many) - 1), (many, 0)):
        frontier_figure(shown, "learned", ["loss"], x_is_loss=True, y_are_losses=[True])
        (axes,) = drawn[-1].axes
        assert len(axes.texts) == num_labels
        assert axes.xaxis_inverted()
        assert axes.get_ylim() == pytest.approx((1.11, 0.89))


def run_of(score: float, seed: int = 0, before: bool = True, finished: int = 2, **settings: object) -> RunResults:
    matrix = ResultMatrix(("a", "b"), ("accuracy", "accuracy"))
    if before:
        matrix = matrix.with_before({"a": 0.0, "b": 0.25}, {"a": 9.0, "b": 8.0}, 1.0)
    matrix = matrix.with_row({"a": score}, {"a": 1.0}, 1.25)
    if finished > 1:
        matrix = matrix.with_row({"a": score - 0.25, "b": score}, {"a": 1.5, "b": 1.0}, 1.5)
    return RunResults("piece-s 1 %", "piece-s", 0.01, matrix, settings={"seed": seed, **settings})


def test_one_runs_figures_show_its_matrix(drawn: list[Figure]) -> None:
    for before in (True, False):
        drawn.clear()
        names = [figure.file_name for figure in make_figures([run_of(0.5, before=before)])]
        assert names == ["stream.png", "0-piece-s-1-accuracy.png", "0-piece-s-1-loss.png"]
        stream, score, loss = drawn
        assert curves(stream.axes[0]) == {"piece-s 1 %": [(1, 0.5), (2, 0.375)]}
        general = [(1, 1.25), (2, 1.5)]
        assert curves(stream.axes[1]) == {"piece-s 1 %": [(0, 1.0), *general] if before else general}
        rows = [[0.5, nan], [0.25, 0.5]]
        assert np.array_equal(cells(score.axes[0]), [[0.0, 0.25]] * before + rows, equal_nan=True)
        assert np.array_equal(cells(loss.axes[0]), [[9.0, 8.0]] * before + [[1.0, nan], [1.5, 1.0]], equal_nan=True)
        for found in (score, loss):
            assert ticks(found.axes[0].yaxis) == ["before"] * before + ["after a", "after b"]
        assert score.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_compared_matrices_are_means_over_seeds_and_begin_before_only_if_all_do(drawn: list[Figure]) -> None:
    for before in (True, False):
        drawn.clear()
        rate = {"learning_rate": 0.5}
        runs = [run_of(0.5, 0, **rate), run_of(0.75, 1, before, **rate), run_of(1.0, 0, learning_rate=1)]
        figures = comparison_figures(group_runs([(str(index), run) for index, run in enumerate(runs)]))
        captions = {figure.file_name: figure.caption for figure in figures}
        assert "Means over seeds." in captions["matrices.png"]
        mean, single = drawn[[*captions].index("matrices.png")].axes
        first = [[0.0, 0.25]] * before
        found = {tuple(axes.get_title(loc="left").split(",")[1:]): cells(axes) for axes in (mean, single)}
        values = sorted(found.values(), key=lambda rows: rows[-1][-1])
        assert np.array_equal(values[0], [*first, [0.625, nan], [0.375, 0.625]], equal_nan=True)
        assert np.array_equal(values[1], [*first, [1.0, nan], [0.75, 1.0]], equal_nan=True)
        assert ticks(mean.yaxis) == ["before"] * before + ["after a", "after b"]
