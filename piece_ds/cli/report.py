"""The work of `piece_ds report`: read the results of several runs, group them, print a table and write a page."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from piece_ds.report.comparison_page import write_comparison
from piece_ds.report.comparison_table import comparison_grids
from piece_ds.report.groups import group_runs
from piece_ds.report.results import RunResults, read_results
from piece_ds.report.table import print_grids
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import read_json
from piece_ds.runtime.text import printable

RESULTS_NAME, RUN_NAME = "results.json", "run.json"
# Parts of run.json that are no settings, or that hold many more settings than matter for a result.
_LEFT_OUT = {"versions", "all_training_arguments", "deepspeed"}


def report(arguments: argparse.Namespace) -> None:
    """Print the comparison and write its page."""
    path = Path(arguments.output)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path}: expected the name of an .html file")
    groups = group_runs(read_runs([Path(run) for run in arguments.runs]))
    print_grids(comparison_grids(groups))
    print(f"report: {printable(write_comparison(path, groups))}")


def read_runs(folders: Sequence[Path]) -> list[tuple[str, RunResults]]:
    """Return (folder as given, results with the settings of its run.json) of each folder.

    Raises:
        UserError: a folder is no run or is given twice, or a file cannot be read; the message names it.
    """
    given: dict[Path, Path] = {}
    runs = []
    for folder in folders:
        if not (folder / RESULTS_NAME).is_file():
            raise UserError(
                f"{folder} is no run: expected a folder with {RESULTS_NAME}, as launch/train.py writes it "
                "before its first task"
            )
        if folder.resolve() in given:
            raise UserError(f"{folder} is given twice, the first time as {given[folder.resolve()]}: give it once")
        given[folder.resolve()] = folder
        results = read_results(folder / RESULTS_NAME)
        runs.append((str(folder), replace(results, settings=_settings(folder, results.settings))))
    return runs


def _settings(folder: Path, from_results: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a run in one mapping: from run.json, or else from results.json."""
    path = folder / RUN_NAME
    if not path.exists() and not path.is_symlink():
        return dict(from_results)
    content = read_json(path, dict[str, Any], "run's configuration", "copy the run's folder again")
    parts = {name: value for name, value in content.items() if name not in _LEFT_OUT}
    nested = [part for part in parts.values() if isinstance(part, dict)]
    # run.json groups settings (model, data, ...); a comparison needs only their names.
    flat = {name: value for part in nested for name, value in part.items()}
    flat |= {name: value for name, value in parts.items() if not isinstance(value, dict)}
    root = _own_root(folder)
    return {name: _within(value, root) for name, value in flat.items()}


def _own_root(folder: Path) -> Path:
    """Return the folder, or the run that contains it: the embedded default keeps its baseline inside its own folder."""
    folder = folder.resolve()
    return folder.parent if (folder.parent / RESULTS_NAME).is_file() else folder


def _within(value: Any, root: Path) -> Any:
    """Return a path inside the run's own folder relative to it, so that runs of equal form have equal settings."""
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path = Path(value)
    return str(path.relative_to(root)) if path.is_relative_to(root) else value
