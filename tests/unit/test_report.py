"""The report: results read back as written, tables with every number, a page that needs no other file."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report import heat_maps
from piece_ds.report.grids import cost_grid, quantity, result_grids, run_grids, summary_grid
from piece_ds.report.heat_maps import mask_heat_maps, overlap_heat_map, result_heat_map, result_heat_maps
from piece_ds.report.lines import smoothed, stream_figure, training_figure
from piece_ds.report.results import RunResults, read_results
from piece_ds.report.run_figures import make_figures
from piece_ds.report.run_page import write_report
from piece_ds.report.table import print_results
from piece_ds.report.validation import kept_points, validation_grid
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(name: str = "piece-s 5 %", loss: float = 0.5) -> RunResults:
    matrix = ResultMatrix(("qa|b", "摘要"), ("accuracy", "loss")).with_before(
        {"qa|b": 0.1}, {"qa|b": 3.0, "摘要": 2.0}, 1.5
    )
    matrix = matrix.with_row({"qa|b": 0.8}, {"qa|b": loss}, 1.6)
    matrix = matrix.with_row({"qa|b": 0.6}, {"qa|b": loss + 0.25, "摘要": 1.25}, 1.75)
    counts = {
        "0": {"q_proj": {"selected": 3, "total": 100}, "norm": {"selected": 0, "total": 10}},
        "other": {"lm_head": {"selected": 1, "total": 50}},
    }
    log = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_runtime": 3.0}]
    cost = {"select_seconds": 1.25, "train_seconds": 10.0, "num_steps": 2, "peak_bytes": None}
    return RunResults(
        name=name,
        method="piece-s",
        ratio=0.05,
        matrix=matrix,
        masks={"qa|b": counts, "摘要": counts},
        overlaps=[[1.0, 0.25], [0.25, 1.0]],
        logs={"qa|b": log, "摘要": []},
        cost={"qa|b": cost, "摘要": {**cost, "peak_bytes": 2**30}},
        settings={"learning_rate": 1e-3, "model": "<tiny> & small"},
        notes=["qa|b was judged on its training rows."],
    )


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run.to_json()))
    assert read_results(path) == run
    assert read_results(path, name="other").name == "other"


def test_results_without_the_optional_parts_take_the_method_as_name() -> None:
    values = {key: value for key, value in make_run().to_json().items() if key not in ("name", "settings", "notes")}
    run = RunResults.from_json(values)
    assert (run.name, run.settings, run.notes) == ("piece-s", {}, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "Input should be an object"),
        ('{"format": "piece-results", "version": 2}', "version: Input should be 1, got 2"),
        ('{"format": "piece-results", "version": 1}', "method: Field required"),
    ],
)
def test_unusable_results_are_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"results\.json: .*{message}") as refusal:
        read_results(path)
    assert "\n" not in str(refusal.value)


def test_a_matrix_that_does_not_fit_its_tasks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for at, value, message in (
        (("tasks",), ["qa|b", "qa|b"], "a task is named twice"),
        (("metrics",), ["loss"], "1 metrics for 2 tasks"),
        (("loss", "after"), [[1.0, 1.0]] * 3, "3 rows of losses for 2 tasks"),
        (("general_loss", "after"), [1.0], "2 rows of losses for 2 tasks"),
        (("accuracy", "after"), [[1.0, None]], "rows of a measure"),
        (("accuracy", "after"), [[1.0], [1.0]], "rows of a measure"),
        (("loss", "after"), [[1.0, 1.0], [1.0]], "rows of a measure"),
        (("loss", "before"), [1.0, 1.0, 1.0], "rows of a measure"),
        (("score",), {"before": None, "after": [[1.0, 1.0]]}, "rows of a measure"),
    ):
        content = json.loads(json.dumps(make_run().to_json()))
        *outer, last = ("matrix", *at)
        inside = content
        for key in outer:
            inside = inside[key]
        inside[last] = value
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_results(path)


def test_derived_values_of_masks_and_logs() -> None:
    run = make_run()
    assert run.selected_counts == {"qa|b": (4, 160), "摘要": (4, 160)}
    assert run.training_losses == {"qa|b": [(1, 2.0), (2, 1.0)], "摘要": []}
    assert run.general_divergence is None
    moved = {f"after {task}": {"general text": nats} for task, nats in (("qa|b", 0.25), ("摘要", 0.5))}
    assert replace(run, divergence=moved).general_divergence == 0.5  # after the last task


def test_result_tables_hold_every_number() -> None:
    accuracy, loss = result_grids(make_run())
    assert accuracy.header == ("", "qa|b", "摘要", "mean of seen")
    assert accuracy.rows == (
        ("before", "10.0 %", "-", "-"),
        ("after qa|b", "80.0 %", "-", "80.0 %"),
        ("after 摘要", "60.0 %", "-", "60.0 %"),
    )
    assert loss.header[-1] == "general text"
    assert loss.rows[-1] == ("after 摘要", "0.750", "1.250", "1.000", "1.750")


def test_what_was_measured_beside_the_scores_has_a_table() -> None:
    measures = {"before": {"qa|b": {"bleu_4": 0.25, "sari": 0.5}}, "after 摘要": {"qa|b": {"bleu_4": 0.125}}}
    run = replace(make_run(), measures=measures, ability={"before": {"wiki perplexity": 12.5}})
    assert RunResults.from_json(run.to_json()) == run
    grid = run_grids(run)[-1]
    assert grid.header == ("", "task", "bleu_4", "sari", "wiki perplexity")
    assert grid.rows == (
        ("before", "qa|b", "0.250", "0.500", "-"),
        ("after 摘要", "qa|b", "0.125", "-", "-"),
        ("before", "general ability", "-", "-", "12.500"),
    )
    assert len(run_grids(make_run())) == 2


def test_scores_of_several_kinds_are_not_called_accuracy() -> None:
    matrix = ResultMatrix(("a", "b", "c"), ("accuracy", "edit similarity", "loss"))
    matrix = matrix.with_row({"a": 0.5, "b": 0.25}, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert (matrix.score_name, matrix.accuracy.after) == ("score", ((0.5, None, None),))
    assert result_grids(RunResults("x", "random", 0.1, matrix))[0].rows == (
        ("after a", "50.0 %", "25.0 %", "-", "50.0 %"),
    )


def test_summary_has_a_row_a_run_and_no_empty_column() -> None:
    grid = summary_grid([make_run("a"), make_run("b", loss=1.0)])
    row = dict(zip(grid.header, grid.rows[0], strict=True))
    assert row["run"] == "a"
    assert row["OP"] == "60.0 %"
    assert row["BWT"] == "-20.0"
    assert row["BWT (authors)"] == "+0.0"
    assert row["general loss change"] == "+0.250"
    assert "FWT" not in row
    assert len(grid.rows) == 2


def test_runs_without_accuracy_have_no_accuracy_table() -> None:
    run = RunResults("x", "seqft", 1.0, ResultMatrix(("a",), ("loss",)).with_row({}, {"a": 1.0}))
    assert [grid.title for grid in result_grids(run)] == ["x: loss (nats per answer token)"]
    assert "OP" not in summary_grid([run]).header


def test_cost_says_its_units() -> None:
    grid = cost_grid([make_run()])
    assert grid.header == ("task", "selected weights", "select", "train", "steps", "peak memory")
    assert grid.rows[0] == ("qa|b", "4 of 160", "1.2 s", "10.0 s", "2", "-")
    assert grid.rows[1][-1] == "1.0 GiB"
    bare = cost_grid([replace(make_run(), masks={}, cost={"qa|b": {"train_seconds": 5.0, "peak_bytes": None}})])
    assert (bare.header, bare.rows) == (("task", "train"), (("qa|b", "5.0 s"),))
    assert cost_grid([make_run("a"), make_run("b")]).rows[3][:2] == ("b", "摘要")


def test_steps_not_taken_are_a_column_where_there_were_any() -> None:
    cost = {"qa|b": {"train_seconds": 5.0, "nonfinite_steps": 0, "overflow_steps": 2}}
    assert cost_grid([replace(make_run(), masks={}, cost=cost)]).header == ("task", "train", "overflow steps")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens_per_second", 4007.075, "4,007"),
        ("tokens_per_second", 12.5, "12.5"),
        ("num_steps", 12345, "12,345"),
        ("x_seconds", 0.034, "0.03 s"),
        ("x_seconds", 119.0, "119.0 s"),
        ("x_seconds", 300.0, "5.0 min"),
        ("x_seconds", 9000.0, "2.5 h"),
        ("x_bytes", 512, "512 B"),
        ("x_bytes", 3 * 2**19, "1.5 MiB"),
        ("x_bytes", 5 * 2**30, "5.0 GiB"),
        ("x", None, "-"),
        ("x", "text", "text"),
    ],
)
def test_quantities_are_in_the_unit_of_their_name(name: str, value: object, text: str) -> None:
    assert quantity(name, value) == text


def test_console_without_a_terminal_gets_plain_aligned_lines() -> None:
    out = io.StringIO()
    print_results([make_run()], Console(file=out, width=20))
    text = out.getvalue()
    assert text.isascii() or "\x1b" not in text
    assert not re.search("[│━┃]", text)
    assert re.search(r"^after qa\|b +80\.0 % +- +80\.0 %$", text, re.MULTILINE)


def test_terminal_gets_a_table_and_brackets_survive() -> None:
    out = io.StringIO()
    print_results([make_run("[red] run")], Console(file=out, width=160, force_terminal=True))
    assert "[red] run: accuracy" in re.sub("\x1b[^m]*m", "", out.getvalue())


class Page(HTMLParser):
    """Collects what a page refers to and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    path = write_report(tmp_path / "out", [make_run(), make_run("seqft <1>", loss=1.0)], title="A & B")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "seqft &lt;1&gt;" in text
    assert "seqft <1>" not in text
    assert "&lt;tiny&gt; &amp; small" in text
    assert "qa|b was judged on its training rows." in text
    figures = sorted(file.name for file in (tmp_path / "out" / "figures").iterdir())
    assert len(figures) == len(page.sources)
    assert {"stream.png", "training.png", "1-seqft--1-accuracy.png", "0-piece-s-5-overlap.png"} <= set(figures)
    assert not list(tmp_path.rglob("*.tmp"))


def test_report_of_an_unfinished_run_and_of_none(tmp_path: Path) -> None:
    begun = RunResults("x", "seqft", 1.0, ResultMatrix(("a",), ("loss",)))
    assert make_figures([begun]) == []
    assert write_report(tmp_path, [begun]).is_file()
    with pytest.raises(UserError, match="at least one run"):
        write_report(tmp_path, [])
    with pytest.raises(UserError, match="each with its own name"):
        write_report(tmp_path, [begun, begun])


def test_runs_of_other_tasks_are_left_out_of_the_common_figures() -> None:
    other = replace(
        make_run("other"),
        matrix=ResultMatrix(("z",), ("accuracy",)).with_row({"z": 1.0}, {"z": 1.0}),
        masks={},
        overlaps=[],
    )
    names = [figure.file_name for figure in make_figures([make_run(), other])]
    assert "1-other-accuracy.png" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "png",
    [
        lambda: result_heat_map([[0.5]], ["after a"], ["a"], "one cell"),
        lambda: result_heat_map([[None, None]], ["before"], ["a", "b"], "nothing known"),
        lambda: result_heat_map([[float("nan"), 1.0]], ["before"], ["a", "b"], "diverged"),
        lambda: result_heat_map([[0.1] * 40] * 40, ["r"] * 40, ["a long task name"] * 40, "many"),
        lambda: result_heat_maps({"far": [[1.0, None], [0.5, 1.0]], "begun": []}, ["after a", "after b"], ["a", "b"]),
        lambda: mask_heat_maps({"nothing selected": {"0": {"q": {"selected": 0, "total": 4}}}}),
        lambda: mask_heat_maps({"deep": {str(i): {"q": {"selected": i, "total": 4}} for i in range(80)}}),
        lambda: mask_heat_maps({str(i): {"0": {f"m{i}": {"selected": i, "total": 4}}} for i in range(9)}),
        lambda: overlap_heat_map([[1.0]], ["a"], "one mask"),
        lambda: overlap_heat_map([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], "disjoint"),
        lambda: stream_figure({"loss": {str(i): [[None, 1.0, float("inf")]] for i in range(9)}}, ["before", "a", "b"]),
        lambda: training_figure({"x": [{"a": [(i, 1 / i) for i in range(1, 200)], "b": [(1, 2.0)]}]}, ["a", "b", "c"]),
        lambda: training_figure({"x": [{"a": [(i, k / i) for i in range(1, 200)]} for k in (1, 2)]}, ["a"]),
        lambda: training_figure({"x": [{}]}, ["a"]),
    ],
)
def test_figures_of_extreme_values_are_drawn(png: object, recwarn: pytest.WarningsRecorder) -> None:
    assert png().startswith(PNG)  # type: ignore[operator]
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning | RuntimeWarning)]


def test_smoothing_keeps_length_and_level() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smoothed([float(i) for i in range(100)]) == pytest.approx([float(i) for i in range(100)])


def test_module_types_without_a_selected_weight_are_left_out_of_crowded_mask_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As all of a frozen vision tower; with few types each has its column."""
    shown: list[list[str]] = []
    monkeypatch.setattr(heat_maps, "label_ticks", lambda axes, labels: shown.append(list(labels)))
    for num_types in (20, 10):
        modules = {f"m{i}": {"selected": int(i == 7), "total": 4} for i in range(num_types)}
        mask_heat_maps({"task": {"0": modules}})
    assert shown == [["m7"], [f"m{i}" for i in range(10)]]


def test_the_step_that_a_task_kept_is_in_the_table_and_on_the_curve(tmp_path: Path) -> None:
    curve = [{"step": 1, "loss": 1.5, "score": 0.5}, {"step": 2, "loss": None, "score": 0.25}]
    kept = {"rows": 9, "metric": "loss", "best_step": 1, "used_step": 1, "last_step": 2, "stopped_early": True}
    run = replace(make_run(), validation={"qa|b": {**kept, "curve": curve}})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run.to_json()))
    assert read_results(path) == run
    (row,) = validation_grid(run).rows
    assert row == ("qa|b", "loss", "1", "2 (stopped early)", "1.500", "-", "50.0 %", "25.0 %")
    page = write_report(tmp_path, [run]).read_text()
    assert "step kept" in page
    assert "a star is the step that the task ended with" in page
    assert kept_points(run) == {"qa|b": (1, 1.5)}
    last = replace(run, validation={"qa|b": {**kept, "used_step": 2, "curve": curve}})
    assert validation_grid(last).rows[0][1] == "order: the last one"
