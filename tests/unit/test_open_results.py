"""What results.json begins with: the run's name and share, what each task is scored by, and what must be known."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from piece_ds.config.settings import parse
from piece_ds.data.tasks import Task
from piece_ds.training.results import num_finished, num_steps_before, open_results, write_results


def make_task(name: str, num_rows: int, held_out: bool) -> Task:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * num_rows, "labels": [[-100, 2]] * num_rows})
    return Task(name, rows, rows, rows, ["x"] * num_rows, ["y"] * num_rows, held_out=held_out)


TASKS = [make_task("a", 3, True), make_task("b", 5, False)]
SCORERS = {"b": "loss", "a": "word"}


@pytest.mark.parametrize(
    ("flags", "name", "ratio"),
    [
        (["--method", "piece-s", "--mask_ratio", "0.002"], "piece-s 0.2 %", 0.002),
        (["--method", "seqft", "--mask_ratio", "0.002"], "seqft", 1.0),
        (["--method", "lora", "--mask_ratio", "0.002"], "lora", 1.0),
        (["--method", "hft", "--mask_ratio", "0.002"], "hft", 1.0),
    ],
)
def test_a_run_is_named_by_its_method_and_the_share_that_it_selects(
    tmp_path: Path, flags: list[str], name: str, ratio: float
) -> None:
    settings = parse(["--model_name_or_path", "m", "--train_file", "x", "--output_dir", str(tmp_path), *flags])
    results = open_results(tmp_path / "results.json", settings, TASKS, SCORERS, resume=False)
    assert (results.name, results.method, results.ratio) == (name, flags[1], ratio)
    assert (results.tasks, results.matrix.metrics) == (("a", "b"), ("accuracy", "loss"))
    assert results.rows == {"a": 3, "b": 5}
    assert results.notes == ["b was judged on rows it trained on: it has no held-out ones."]
    assert (num_finished(results), num_steps_before(results)) == (0, 0)

    # A resumed run goes on from what is there, another one begins anew.
    kept = replace(results, cost={"a": {"num_steps": 7}, "b": {"num_steps": 4}}, name="earlier")
    write_results(kept, tmp_path / "results.json")
    resumed = open_results(tmp_path / "results.json", settings, TASKS, SCORERS, resume=True)
    assert (resumed.name, num_steps_before(resumed)) == ("earlier", 11)
    assert open_results(tmp_path / "results.json", settings, TASKS, SCORERS, resume=False).name == name
