"""TRACE's tasks for lm-evaluation-harness, with the same scorers as in a run.

The YAML files in this folder use them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from piece_ds.data.files import load_rows
from piece_ds.evaluation.scorers import OF_TRACE, get_scorer
from piece_ds.runtime.errors import UserError

Row = tuple[str, str, str, str]  # task, output, gold, prompt


def load(task: str, task_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the test rows of a task, from task_dir or $TRACE_DIR. Raise UserError if neither has them."""
    folder = task_dir or os.environ.get("TRACE_DIR")
    if not folder or not Path(folder, task, "test.json").is_file():
        raise UserError(f"TRACE: no {task}/test.json in {folder!r}; set TRACE_DIR to the folder of the eight tasks")
    rows = load_rows(str(Path(folder, task, "test.json")))
    return {"test": rows.add_column("task", [task] * len(rows))}


def keep(doc: dict[str, str], results: list[str]) -> dict[str, Row]:
    """Return a row for score(). BLEU is of a whole data set, so rows are not scored one by one."""
    return {"score": (doc["task"], results[0], doc["answer"], doc["prompt"])}


def score(rows: Sequence[Row]) -> float:
    """Return the task's score over all rows, in [0, 1]."""
    tasks, outputs, golds, prompts = zip(*rows, strict=True)
    return get_scorer(OF_TRACE[tasks[0]]).score(outputs, golds, prompts)["score"]
