"""Names that would steer a terminal, end a page's markup, be read as mathematics or fit no file are shown as they are.

Over every place that prints or draws a name: tables on a terminal and in a file, pages, figures, logs, errors.
"""

import html
import io
import logging
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from piece_ds.__main__ import main
from piece_ds.cli.doctor import _table
from piece_ds.doctor.findings import GOOD, Finding
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.comparison_page import write_comparison
from piece_ds.report.comparison_table import comparison_grids
from piece_ds.report.grids import Grid, cost_grid, page_grids, summary_grid
from piece_ds.report.groups import group_runs
from piece_ds.report.results import RunResults
from piece_ds.report.run_figures import make_figures
from piece_ds.report.run_page import write_report
from piece_ds.report.table import print_grids
from piece_ds.runtime.text import PrintableFormatter, printable

pytestmark = pytest.mark.heavy

NAMES = (
    "\udc80 surrogate",
    "$5_to_$10",
    "$\\frac{",
    "[/a][bold]",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "</td><script>alert(1)</script>",
    "&amp;{{ 7 * 7 }}",
    "a|b`c`*d*",
    "\u202eexe.txt",
    "new\nline\r\x00",
    "%s %d {0}",
    "\U000e0041\ue000",
    "摘要 é",
)


def hostile_run(name: str, num_tasks: int = 14) -> RunResults:
    """A run whose every text is hostile."""
    tasks = tuple(NAMES[:num_tasks])
    matrix = ResultMatrix(tasks, ("accuracy",) * len(tasks))
    matrix = matrix.with_before(dict.fromkeys(tasks, 0.1), dict.fromkeys(tasks, 3.0), 2.0)
    matrix = matrix.with_row({tasks[0]: 0.5}, {tasks[0]: 1.0}, 2.0).with_row({}, {tasks[1]: 1.0}, 2.1)
    counts = {name: {kind: {"selected": 1, "total": 9} for kind in NAMES}}
    return RunResults(
        name,
        "piece-s",
        0.1,
        matrix,
        masks=dict.fromkeys(tasks[:2], counts),
        overlaps=[[1.0, 0.5], [0.5, 1.0]],
        measures={"before": {tasks[0]: {name: 0.5}}},
        ability={name: {name: 1.0}},
        logs={task: [{"step": 1, "loss": 1.0}] for task in tasks[:2]},
        cost={task: {"train_seconds": 1.0, f"{name}_bytes": 3} for task in tasks[:2]},
        settings={name: name},
        notes=[name],
        rows=dict.fromkeys(tasks, 10),
    )


def is_clean(text: str) -> bool:
    """No character that a terminal obeys or that UTF-8 does not have, but line ends."""
    return all(unicodedata.category(letter) not in ("Cc", "Cf", "Cs") or letter == "\n" for letter in text)


def test_every_visible_character_stays_and_no_other() -> None:
    for name in NAMES:
        text = printable(name)
        assert is_clean(text.replace("\n", "\\n"))
        assert printable(text) == text
        text.encode("utf-8")
    for name in ("摘要 é", "$5_to_$10", "[/a]", "a\u200cb"):
        assert printable(name) == name


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_show_names_whole(terminal: bool) -> None:
    for name in NAMES:
        run = hostile_run(name)
        grids = [*page_grids(run), summary_grid([run]), cost_grid([run]), *comparison_grids(group_runs([(name, run)]))]
        out = io.StringIO()
        print_grids(grids, Console(file=out, width=4000, force_terminal=terminal, color_system=None))
        printed = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert is_clean(printed)
        assert printable(name) in printed
        for task in NAMES:
            assert printable(task) in printed


def test_no_cell_is_cut_in_a_narrow_terminal() -> None:
    header = ("layer", *(f"self_attn.projection_{index}" for index in range(9)))
    grid = Grid("wide", header, (("0", *(f"{index}2345 (0.{index}1 %)" for index in range(9))),))
    out = io.StringIO()
    print_grids([grid], Console(file=out, width=80, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    for cell in (*header, *grid.rows[0]):
        assert cell in out.getvalue()


def test_pages_hold_names_as_text(tmp_path: Path) -> None:
    name = "".join(NAMES)
    run = replace(hostile_run(name), masks={}, overlaps=(), logs={})
    report = write_report(tmp_path, [run], title=name)
    comparison = write_comparison(tmp_path / "comparison.html", group_runs([(name, run)]), title=name)
    for page in (report, comparison):
        text = page.read_text(encoding="utf-8")
        assert is_clean(text)
        assert "<script" not in text
        unquoted = text.replace("&#34;", '"').replace("&#39;", "'")
        assert html.escape(printable(name, keep="\n"), quote=False) in unquoted


def test_a_page_may_load_and_run_nothing(tmp_path: Path) -> None:
    """The policy names the hash of the one style sheet that is there; there is no script, style attribute or link."""
    from base64 import b64encode
    from hashlib import sha256

    text = write_report(tmp_path, [hostile_run("x")]).read_text(encoding="utf-8")
    policy = html.unescape(re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[0])
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"<(script|link|iframe|a|object)\b|\sstyle=|\son\w+=", re.sub(r'src="data:[^"]*"', "", text))


def test_figures_draw_every_name() -> None:
    """Mathematics, lone surrogates and control characters in titles, ticks, legends: none ends the report."""
    runs = [hostile_run(NAMES[0]), hostile_run(NAMES[1]), hostile_run(NAMES[2])]
    assert len(make_figures(runs)) > len(runs)


@pytest.mark.slow
def test_figures_of_a_hundred_tasks_are_small() -> None:
    tasks = tuple(f"task number {index:03d}" for index in range(100))
    matrix = ResultMatrix(tasks, ("accuracy",) * 100).with_before(
        dict.fromkeys(tasks, 0.1), dict.fromkeys(tasks, 3.0), 2.0
    )
    for stage in range(100):
        seen = {task: 0.3 + 0.5 * ((7 * index + stage) % 13) / 13 for index, task in enumerate(tasks[: stage + 1])}
        matrix = matrix.with_row(seen, seen, 2.0 + stage / 100)
    counts = {str(layer): {f"m{kind}": {"selected": layer, "total": 99} for kind in range(9)} for layer in range(32)}
    overlaps = [[((first * second) % 17) / 17 for second in range(100)] for first in range(100)]
    logs = {task: [{"step": step, "loss": 1 / step} for step in range(1, 9)] for task in tasks}
    run = RunResults("x", "piece-s", 0.1, matrix, dict.fromkeys(tasks, counts), overlaps, logs=logs)
    for figure in make_figures([run]):
        assert len(figure.png) < 1_000_000, figure.file_name
        assert figure.page_width <= 1200


def test_logs_and_errors_are_clean_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        record = logging.LogRecord("piece_ds", logging.WARNING, "f", 1, "task %s", (name,), None)
        assert is_clean(PrintableFormatter("%(message)s").format(record))
        for command in (["masks", name], ["report", name], ["delta", "list", name], ["plan", "--model", name]):
            if "\x00" in name and command[0] != "plan":
                continue
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code == 2
            error = capsys.readouterr().err
            assert is_clean(error)
            assert error.count("\n") == 1


def test_the_doctor_s_findings_are_text() -> None:
    for name in NAMES:
        out = io.StringIO()
        Console(file=out, width=400).print(_table([Finding(GOOD, "folder", name)]))
        assert is_clean(out.getvalue())
        assert printable(name) in out.getvalue()


def test_masks_are_printed_under_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from support.models import make_model

    from piece_ds.checkpoint.mask_file import save_mask
    from piece_ds.cli.masks import masks
    from piece_ds.models.layout import layout_of
    from piece_ds.state.mask import Mask

    layout = layout_of(make_model("llama"))
    index = {info.name: torch.arange(0, info.numel, 5) for info in layout.parameters[2:4]}
    paths = [tmp_path / name.replace("/", "-").replace("\x00", "") for name in NAMES[1:]]  # safetensors takes UTF-8
    for path in paths:
        save_mask(path, Mask(layout, index, sum(map(len, index.values())), "random", 0.1))
    masks(SimpleNamespace(masks=[str(path) for path in paths]))
    printed = capsys.readouterr().out
    assert is_clean(printed)
    assert all(printable(path) in printed for path in paths)
