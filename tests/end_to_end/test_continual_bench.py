"""The experiment's runner: many runs in one process are those of fresh processes, and finished ones are kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launches import ROOT, environment, make_model_folder, make_rows, make_tasks, same_bits, weights, write_rows

from bench.continual.recipe import StreamRecipe

RUNNER = ROOT / "bench" / "continual" / "run.py"
TEXTS = [{"text": f"some general text, number {index}"} for index in range(8)]

SEVERAL_RUNS = """
import sys
from pathlib import Path
from bench.continual.grid import Setting
from bench.continual.one_run import settings_of
from bench.continual.recipe import StreamRecipe
from bench.continual.tasks import write_stream
from piece_ds.runtime.process import run_command
from piece_ds.cli.run import train

def main(argv):
    root, *methods = argv
    recipe = StreamRecipe(tasks=("letter", "text"), train_rows=16, test_rows=4, general_rows=4, steps=3,
                          scorers="text=loss")
    files = write_stream(Path(root), Path(root).parent / "base", Path(root).parent / "tasks", recipe)
    for index, method in enumerate(methods):
        train(settings_of(Setting(method, 0.1, 1e-2, 1), files, recipe, Path(root) / str(index)))

run_command(main)
"""


def base_model(folder: Path) -> Path:
    make_model_folder(folder)
    write_rows(folder / "general.jsonl", TEXTS)
    return folder


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def run_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of a run's last model, and its result matrix."""
    return weights(folder / "01-text" / "model"), json.loads((folder / "results.json").read_text())["matrix"]


@pytest.mark.slow
def test_a_later_run_in_a_process_has_the_bits_of_a_fresh_process(tmp_path: Path) -> None:
    """Whatever ran before it: a mask with a statistics pass, a drawn mask, full fine-tuning."""
    base_model(tmp_path / "base")
    make_tasks(tmp_path / "tasks")
    python("-c", SEVERAL_RUNS, tmp_path / "many", "piece-s", "random", "seqft", "piece-s", "seqft", "random")
    for method, indices in {"piece-s": (0, 3), "random": (1, 5), "seqft": (2, 4)}.items():
        python("-c", SEVERAL_RUNS, tmp_path / method, method)
        fresh_weights, fresh_matrix = run_of(tmp_path / method / "0")
        for index in indices:
            found_weights, found_matrix = run_of(tmp_path / "many" / str(index))
            assert same_bits(found_weights, fresh_weights), (method, index)
            assert found_matrix == fresh_matrix
    different = weights(tmp_path / "many" / "0" / "01-text" / "model")
    assert not same_bits(different, weights(tmp_path / "many" / "1" / "01-text" / "model"))


@pytest.mark.slow
def test_finished_runs_are_kept_and_the_rest_is_made(tmp_path: Path) -> None:
    for index, task in enumerate(StreamRecipe().tasks):
        choices = ("A", "B") if task in ("C-STANCE", "FOMC", "ScienceQA") else ("3", "14")
        for split, num_rows in (("train", 16), ("test", 4)):
            write_rows(tmp_path / "trace" / task / f"{split}.json", make_rows(10 * index + num_rows, num_rows, choices))
    base, table = base_model(tmp_path / "base"), tmp_path / "runs.csv"
    flags = [
        RUNNER,
        "--trace",
        tmp_path / "trace",
        "--base",
        base,
        "--cache",
        tmp_path / "cache",
        "--runs_file",
        table,
        "--smoke",
        "--methods",
        "seqft",
    ]
    assert "4 of 4 runs to make" in python(*flags, "--seeds", "1", "--in_this_process", "2").stdout
    half = table.read_text().splitlines()
    assert len(half) == 3
    assert "2 of 4 runs to make" in python(*flags, "--seeds", "1").stdout
    whole = table.read_text().splitlines()
    assert whole[:3] == half
    assert len(whole) == 5
    assert "0 of 4 runs to make" in python(*flags, "--seeds", "1").stdout
    assert table.read_text().splitlines() == whole
    assert not (tmp_path / "cache" / "scratch").exists()


def test_without_tasks_the_runner_says_so_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(RUNNER), "--trace", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        f"error: --trace {tmp_path / 'none'}: no such folder; expected TRACE's tasks, TASK/{{train,test}}.json each"
    ]
