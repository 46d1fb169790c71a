"""piece_ds.train(): a whole run from Python, such as from a notebook. Settings are named like the command's flags."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piece_ds.cli.run import train as run_settings
from piece_ds.config.settings import load_settings
from piece_ds.data.readers import READERS
from piece_ds.report.results import RunResults
from piece_ds.report.run_page import write_report
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text
from piece_ds.runtime.process import one_process_environment

Rows = Sequence[Mapping[str, Any]]
SPLITS = ("train", "eval", "test")


def train(model: str | Path, tasks: Any, output_dir: str | Path, **settings: Any) -> RunResults:
    """Train a task or a stream of tasks, and write everything that `piece_ds train` writes.

    Args:
        model: a local folder or a Hub id. Save a model that is in memory first.
        tasks: the path of one task's file; or names of tasks in a folder given as task_dir; or a mapping from each
            task's name, in order, to its training rows (a path, or a list of rows in any format), or to a mapping from
            train, eval and test to such rows. Rows that are not in a file are written to OUTPUT_DIR-tasks.
        output_dir: of the run.
        settings: flags by name: method="piece-s", mask_ratio=0.01, deepspeed="zero2", max_steps=10, ...
    Returns:
        The content of results.json.
    Raises:
        UserError: whatever the command would refuse, in the same words.
    """
    if not isinstance(model, str | Path):
        raise UserError(
            f"model is a {type(model).__name__}, expected a folder or a Hub id: write it with save_pretrained() beside "
            "its tokenizer, and give the folder"
        )
    # A notebook is one process without a launcher.
    one_process_environment()
    flags = {"model_name_or_path": model, "output_dir": output_dir, **_task_flags(tasks, Path(output_dir)), **settings}
    argv = [item for name, value in flags.items() for item in _as_flag(name, value)]
    results, folder = run_settings(load_settings(argv))
    if is_main():
        write_report(folder.root, [results])
    return results


def _as_flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"--{name}", ",".join(map(str, value))]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _task_flags(tasks: Any, output_dir: Path) -> dict[str, str]:
    """Return the flags that name the tasks. Rows that are in memory are written to files."""
    if isinstance(tasks, str | Path):
        return {"train_file": str(tasks)}
    if not isinstance(tasks, Mapping):
        return {"tasks": ",".join(map(str, tasks))}
    folder = output_dir.absolute().with_name(f"{output_dir.absolute().name}-tasks")
    for name, given in tasks.items():
        splits = given if isinstance(given, Mapping) else {"train": given}
        unknown = [split for split in splits if split not in SPLITS]
        if unknown or "train" not in splits:
            raise UserError(f"task {name!r} has {list(splits)}; expected train, and eval and test where there are some")
        for split, rows in splits.items():
            _place(folder / str(name) / split, rows)
    return {"task_dir": str(folder), "tasks": ",".join(map(str, tasks))}


def _place(stem: Path, rows: str | Path | Rows) -> None:
    """Put one split where a stream's folder has it: as a link to a file, or as a file of rows."""
    if is_main():
        stem.parent.mkdir(parents=True, exist_ok=True)
        # An earlier call may have left this split in another format.
        for suffix in READERS:
            stem.with_suffix(suffix).unlink(missing_ok=True)
        if isinstance(rows, str | Path):
            stem.with_suffix(Path(rows).suffix).symlink_to(Path(rows).absolute())
        else:
            lines = (json.dumps(dict(row), ensure_ascii=False) for row in rows)
            write_text(stem.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
