"""Runs compared: seeds become one row with hand-made intervals, what differs becomes a column, the page is whole."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piece_ds.__main__ import main
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.comparison_figures import _along_lines, comparison_figures
from piece_ds.report.comparison_page import write_comparison
from piece_ds.report.comparison_table import comparison_grids
from piece_ds.report.grids import ABSENT
from piece_ds.report.groups import group_runs
from piece_ds.report.results import RunResults
from piece_ds.report.style import line_styles
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(
    score: float = 0.5, method: str = "piece-s", ratio: float = 0.001, finished: int = 2, **settings: Any
) -> RunResults:
    """Two tasks: the first scored `score` and, after the second, 0.1 less; general loss from 1.0 to 1.5."""
    matrix = ResultMatrix(("a", "b"), ("accuracy", "accuracy")).with_before({"a": 0, "b": 0}, {"a": 9, "b": 9}, 1.0)
    if finished > 0:
        matrix = matrix.with_row({"a": score}, {"a": 1.0}, 1.25)
    if finished > 1:
        matrix = matrix.with_row({"a": score - 0.1, "b": score}, {"a": 1.5, "b": 1.0}, 1.5)
    costs = {
        task: {
            "train_seconds": 2.0,
            "save_seconds": 1.0,
            "num_steps": 4,
            "peak_bytes": 2**20,
            "mask_bytes": 512,
            "delta_bytes": 512,
        }
        for task in ("a", "b")[:finished]
    }
    logs = {task: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0 + score}] for task in costs}
    name = f"{method} {100 * ratio:g} %"
    return RunResults(name, method, ratio, matrix, logs=logs, cost=costs, settings=settings)


def named(*runs: RunResults) -> list[tuple[str, RunResults]]:
    return [(f"runs/{index}", run) for index, run in enumerate(runs)]


def row_of(*runs: RunResults) -> dict[str, str]:
    grid = comparison_grids(group_runs(named(*runs)))[0]
    assert len(grid.rows) == 1
    return dict(zip(grid.header, grid.rows[0], strict=True))


def test_seeds_become_one_row_with_students_interval() -> None:
    """0.4, 0.5 and 0.6: mean 0.5, deviation 0.1, half width 4.302653 * 0.1 / sqrt(3) = 0.24841."""
    row = row_of(*(make_run(score, seed=seed) for seed, score in enumerate((0.4, 0.5, 0.6))))
    assert {row.pop("BWT")[:5], row.pop("forgetting")[:5]} == {"-10.0", "+10.0"}
    assert row == {
        "run": "piece-s 0.1 %",
        "seeds": "3",
        "learned": "50.0 ± 24.8 %",
        "OP": "45.0 ± 24.8 %",
        "general loss before": "1.000",
        "general loss after": "1.500",
        "time": "6.0 s",
        "peak memory": "1.0 MiB",
        "written": "2.0 KiB",
    }


def test_the_highest_peak_of_all_tasks_and_seeds_is_shown() -> None:
    for highest in range(2):
        runs = [make_run(seed=seed) for seed in (1, 2)]
        runs[highest].cost["a"]["peak_bytes"] = 3 * 2**20  # type: ignore[index]
        assert row_of(*runs)["peak memory"] == "3.0 MiB"


def test_one_run_has_no_interval() -> None:
    row = row_of(make_run(0.5, seed=1))
    assert (row["learned"], row["OP"], row["BWT"]) == ("50.0 %", "45.0 %", "-10.0")
    assert "seeds" not in row


def test_a_diverged_seed_is_shown_and_not_hidden_in_a_mean() -> None:
    diverged = make_run(0.5, seed=1)
    diverged = replace(diverged, matrix=replace(diverged.matrix, general_loss=(1.0, float("nan"))))
    assert row_of(make_run(0.5, seed=0), diverged)["general loss after"] == "nan"


def test_what_differs_is_a_column_and_a_label_and_what_does_not_is_neither() -> None:
    runs = [
        make_run(seed=0, learning_rate=1e-3, weight_decay=0.1, output_dir="x"),
        make_run(seed=0, learning_rate=1e-4, weight_decay=0.1, output_dir="y"),
        make_run(method="random", seed=0, learning_rate=1e-4, weight_decay=0.1),
    ]
    groups = group_runs(named(*runs))
    assert [group.label for group in groups] == [
        "piece-s 0.1 %, learning_rate 0.0001",
        "piece-s 0.1 %, learning_rate 0.001",
        "random 0.1 %",
    ]
    grid = comparison_grids(groups)[0]
    assert grid.header[:3] == ("run", "learning_rate", "learned")
    assert [row[:2] for row in grid.rows] == [
        ("piece-s 0.1 %", "0.0001"),
        ("piece-s 0.1 %", "0.001"),
        ("random 0.1 %", "0.0001"),
    ]


def test_runs_of_another_ratio_or_as_far_as_another_task_stand_alone() -> None:
    groups = group_runs(named(make_run(seed=0), make_run(seed=1, finished=1), make_run(seed=2, ratio=0.01)))
    assert [group.label for group in groups] == [
        "piece-s 0.1 %, 2 of 2 tasks",
        "piece-s 0.1 %, 1 of 2 tasks",
        "piece-s 1 %",
    ]
    grid = comparison_grids(groups)[0]
    assert [dict(zip(grid.header, row, strict=True))["tasks done"] for row in grid.rows] == [
        "2 of 2",
        "1 of 2",
        "2 of 2",
    ]
    assert [dict(zip(grid.header, row, strict=True))["trained"] for row in grid.rows] == ["0.1 %", "0.1 %", "1 %"]


def test_a_column_stays_if_any_run_has_a_value_and_goes_if_none_has() -> None:
    """One run judged general text and knows its peak, the others do not."""
    whole = make_run(seed=0, learning_rate=1e-3)
    costs: dict[str, Any] = {"a": {"train_seconds": 2.0}}
    bare = make_run(method="random", seed=0, learning_rate=None)
    bare = replace(bare, matrix=replace(bare.matrix, general_loss=(), general_loss_before=None), cost=costs)
    rest = ("general loss before", "general loss after", "peak memory", "written")
    for other, kept, missing in (
        (whole, ("learning_rate", *rest), ABSENT),
        (replace(bare, name="second", method="lora"), (), None),
    ):
        for runs in ((bare, other), (other, bare)):
            grid = comparison_grids(group_runs(named(*runs)))[0]
            assert [name for name in grid.header if name in ("learning_rate", *rest)] == list(kept)
            (row,) = [dict(zip(grid.header, row, strict=True)) for row in grid.rows if row[0] == "random 0.1 %"]
            assert [row.get(name) for name in ("learning_rate", *rest)] == [missing] * 5
            assert (row["learned"], row["time"]) == ("50.0 %", "2.0 s")
            assert grid.num_text_columns == 1 + len(kept[:1])  # names, and the rate where there is one


def test_more_settings_than_fit_have_a_table_of_their_own_which_a_number_links() -> None:
    """Four stay beside the results. Of five, each is a row where there are four runs, and all are one cell of more."""
    four = {name: [1, 2] for name in ("alpha", "beta", "delta", "gamma")}
    for names, num_runs in ((list(four), 2), ([*four, "zeta"], 4), ([*four, "zeta"], 5)):
        runs = [make_run(0.5, seed=0, **dict.fromkeys(names, index)) for index in range(num_runs)]
        grids = comparison_grids(group_runs(named(*runs)))
        methods = grids[0]
        assert (methods.title, methods.header[0]) == ("Methods", "run")
        assert all(len(row) == len(methods.header) for row in methods.rows)
        if len(names) == 4:
            assert len(grids) == 1
            assert (methods.header[1:6], methods.num_text_columns) == ((*names, "learned"), 5)
            assert [row[:6] for row in methods.rows] == [("piece-s 0.1 %", *[str(n)] * 4, "50.0 %") for n in range(2)]
            continue
        labels = [f"{number}. piece-s 0.1 %" for number in range(1, num_runs + 1)]
        assert (methods.header[1], methods.num_text_columns) == ("learned", 1)
        assert [row[0] for row in methods.rows] == labels
        (other,) = grids[1:]
        assert other.title == "What the runs differ in"
        if num_runs == 4:
            assert (other.header, other.num_text_columns) == (("setting", *labels), 5)
            assert list(other.rows) == [(name, "0", "1", "2", "3") for name in names]
        else:
            assert (other.header, other.num_text_columns) == (("run", "settings"), 2)
            cells = ["; ".join(f"{name} {index}" for name in names) for index in range(5)]
            assert list(other.rows) == list(zip(labels, cells, strict=True))


def test_seeds_are_counted_where_any_run_has_several() -> None:
    for order in (1, -1):
        runs = [make_run(seed=0), make_run(seed=1), make_run(method="random", seed=0)][::order]
        grid = comparison_grids(group_runs(named(*runs)))[0]
        assert {row[0]: row[grid.header.index("seeds")] for row in grid.rows} == {
            "piece-s 0.1 %": "2",
            "random 0.1 %": "1",
        }


def test_the_same_seed_twice_is_no_repetition() -> None:
    groups = group_runs(named(make_run(0.4, seed=3), make_run(0.6, seed=3), make_run(0.6, seed=3)))
    assert [group.label for group in groups] == [f"piece-s 0.1 % (runs/{index})" for index in range(3)]


def test_a_line_of_the_frontier_goes_from_the_lowest_rate_to_the_highest() -> None:
    """Method by method, in whatever order the runs were given; without rates, by ratio."""
    rates = [(0.01, "piece-s"), (0.001, "lora"), (0.0001, "piece-s"), (0.001, "piece-s"), (0.01, "lora")]
    groups = group_runs(named(*(make_run(0.5, method, learning_rate=rate) for rate, method in rates)))
    found = [(group.first.method, group.settings["learning_rate"]) for group in _along_lines(groups[::-1])]
    assert found in (
        [("lora", 0.001), ("lora", 0.01), ("piece-s", 0.0001), ("piece-s", 0.001), ("piece-s", 0.01)],
        [("piece-s", 0.0001), ("piece-s", 0.001), ("piece-s", 0.01), ("lora", 0.001), ("lora", 0.01)],
    )


def test_runs_of_losses_alone_are_compared_by_loss() -> None:
    matrix = ResultMatrix(("a",), ("loss",)).with_row({}, {"a": 2.0}).to_json()
    row = row_of(RunResults("x", "seqft", 1.0, ResultMatrix.from_json(matrix)))
    assert row == {"run": "x", "loss learned": "2.000", "loss OP": "2.000"}


def test_a_change_of_loss_has_a_sign_and_three_places() -> None:
    matrix = ResultMatrix(("a", "b"), ("loss", "loss")).with_row({}, {"a": 2.0}, 1.0)
    for at_the_end, shown in ((2.25, "+0.250"), (1.5, "-0.500")):
        row = row_of(RunResults("x", "seqft", 1.0, matrix.with_row({}, {"a": at_the_end, "b": 1.0}, 1.0)))
        assert row["loss BWT"] == shown


def test_members_of_a_family_share_a_colour_and_no_two_runs_look_alike() -> None:
    found = line_styles(["a", "a", "b"])
    assert found[0].color == found[1].color != found[2].color
    assert len(set(found)) == 3
    assert len({look.color for look in line_styles(["a", "a", "a"])}) == 3
    assert len(set(line_styles([str(index) for index in range(28)]))) == 28


@pytest.mark.parametrize(
    ("runs", "figures"),
    [
        (
            [make_run(s, seed=s, learning_rate=r) for s in (0.3, 0.5) for r in (1e-3, 1e-2)],
            {"stream.png", "training.png", "frontier.png", "matrices.png"},
        ),
        ([make_run(seed=0)], {"stream.png", "training.png", "matrices.png"}),
        ([make_run(seed=0, finished=0), make_run(seed=1, finished=0)], {"stream.png", "matrices.png"}),
        (
            [make_run(seed=0, learning_rate=rate / 100) for rate in range(1, 12)],
            {"stream.png", "training.png", "frontier.png", "matrices.png"},
        ),
    ],
    ids=["sweep", "one", "begun", "many"],
)
def test_figures_are_those_that_runs_have_data_for(
    runs: list[RunResults], figures: set[str], recwarn: pytest.WarningsRecorder
) -> None:
    found = comparison_figures(group_runs(named(*runs)))
    assert {figure.file_name for figure in found} == figures
    assert all(figure.png.startswith(PNG) for figure in found)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning | RuntimeWarning)]


def write_run(folder: Path, run: RunResults, **run_file: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(run.to_json()))
    if run_file:
        (folder / "run.json").write_text(json.dumps(run_file))
    return folder


def test_command_writes_a_page_that_needs_no_other_file_and_names_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"MethodArguments": {"method": "piece-s", "mask_ratio": 0.001}, "zero_stage": 3, "deepspeed": {"x": 1}}
    for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 1e-2)):
        folder = tmp_path / f"s{seed}-{rate}"
        model = {"ModelArguments": {"model_name_or_path": str(folder / "base")}}  # its own, and yet alike
        training = {"TrainingArguments": {"learning_rate": rate, "seed": seed}}
        write_run(folder, make_run(0.5 + seed / 10), **settings, **model, **training)
    page = tmp_path / "page.html"
    main(["report", *(str(folder) for folder in sorted(tmp_path.iterdir())), "--output", str(page)])
    printed = capsys.readouterr().out
    assert re.search(r"^piece-s 0.1 % +0.001 +2 ", printed, re.MULTILINE)
    assert re.search(r"^piece-s 0.1 % +0.01 +1 ", printed, re.MULTILINE)
    assert "model_name_or_path" not in printed
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert "://" not in re.sub(r'src="data:[^"]*"', "", text)
    assert "<script" not in text
    for name in ("s0-0.001", "s1-0.001", "piece-s 0.1 %, learning_rate 0.01"):
        assert name in text
    assert {path.name for path in (tmp_path / "page_figures").iterdir()} == {
        "stream.png",
        "training.png",
        "frontier.png",
        "matrices.png",
    }


def test_what_cannot_be_compared_is_refused_in_one_line_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(write_run(tmp_path / "good", make_run()))
    (tmp_path / "empty").mkdir()
    damaged = write_run(tmp_path / "damaged", make_run())
    (damaged / "results.json").write_text('{"format": "piece-res')
    cut = write_run(tmp_path / "cut", make_run())
    (cut / "results.json").write_text(json.dumps({**make_run().to_json(), "matrix": {"tasks": ["a"]}}))
    listed = write_run(tmp_path / "listed", make_run())
    (listed / "run.json").write_text("[]")
    other = make_run()
    other = replace(other, matrix=replace(other.matrix, tasks=("a", "c")))
    scored = replace(other, matrix=replace(other.matrix, tasks=("a", "b"), metrics=("accuracy", "edit similarity")))
    page = tmp_path / "page.html"
    for runs, message in (
        ([good, tmp_path / "empty"], r"empty is no run: expected a folder with results\.json"),
        ([tmp_path / "missing"], "missing is no run"),
        ([good, damaged], r"damaged/results\.json: not JSON"),
        ([good, cut], r"cut/results\.json: results: matrix.*Field required"),
        ([good, listed], r"listed/run\.json: Input should be an object"),
        ([good, f"{tmp_path}/./good"], "good is given twice"),
        ([good, write_run(tmp_path / "other", other)], "the tasks of .*good are a, b; those of .*other are a, c"),
        ([good, write_run(tmp_path / "scored", scored)], "the metrics of .*good are accuracy, accuracy"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *map(str, runs), "--output", str(page)])
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    (tmp_path / "folder.html").mkdir()
    for output in (tmp_path, tmp_path / "folder.html", tmp_path / "page.txt", tmp_path / "page"):
        with pytest.raises(SystemExit, match="2"):
            main(["report", good, "--output", str(output)])
        assert f"--output {output}: expected the name of an .html file" in capsys.readouterr().err
    assert not page.exists()
    assert not list(tmp_path.glob("*_figures"))
    with pytest.raises(UserError, match="at least one run"):
        group_runs([])


def test_a_page_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("earlier")
    write_comparison(path, group_runs(named(make_run())))
    assert "piece-s 0.1 %" in path.read_text()
