"""TRACE's tasks cut to a small model's budget, as ordinary task folders, with the two probes of general ability."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.continual.base import GENERAL_NAME
from bench.continual.recipe import StreamRecipe
from piece_ds.demo.tasks import write_jsonl
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json

Row = dict[str, str]
NUM_IMPORTANCE_PIECES = 128


@dataclass(frozen=True)
class StreamFiles:
    """What every run of the experiment reads.

    Attributes:
        base: folder of the base model.
        task_dir: TASK/{train,test}.json.
        general_file: held-out text of the kind that the base model learned.
        instructions_file: instructions and answers, which it did not learn; None where they are not there.
        importance_file: more held-out text, which is not judged on: what piece-ratio takes for general ability.
        digest: of the content of all of them.
    """

    base: Path
    task_dir: Path
    general_file: Path
    instructions_file: Path | None
    importance_file: Path
    digest: str


def write_stream(cache: Path, base: Path, trace: Path, recipe: StreamRecipe) -> StreamFiles:
    """Write the stream under cache, replacing what is there.

    Args:
        base: from make_base().
        trace: folder of TRACE's tasks; beside it general/lima.json, where there is one, is the second probe.
    Raises:
        UserError: a task or a file of the base model is not there.
    """
    folder = cache / "stream"
    shutil.rmtree(folder, ignore_errors=True)
    for task in recipe.tasks:
        for split, num_rows in (("train", recipe.train_rows), ("test", recipe.test_rows)):
            rows = _read(trace / task / f"{split}.json", "--trace expects the folder that holds TRACE's tasks")
            write_json(folder / task / f"{split}.json", [_cut(row, recipe) for row in rows[:num_rows]])
    general = base / GENERAL_NAME
    if not general.is_file():
        raise UserError(f"{general}: no such file; --base expects a folder that this command made")
    pieces = [json.loads(line) for line in general.read_text(encoding="utf-8").splitlines()]
    write_json(folder / "general.json", pieces[: recipe.general_rows])
    write_jsonl(pieces[recipe.general_rows :][:NUM_IMPORTANCE_PIECES], folder / "importance.jsonl")
    lima = trace.parent / "general" / "lima.json"
    if lima.is_file():
        rows = [_cut(row, recipe) for row in _read(lima, "") if row["answer"]]
        write_json(folder / "instructions.json", rows[: recipe.general_rows])
    return StreamFiles(
        base,
        folder,
        folder / "general.json",
        folder / "instructions.json" if lima.is_file() else None,
        folder / "importance.jsonl",
        _digest([base / "model.safetensors", *sorted(folder.rglob("*.json"))]),
    )


def _read(path: Path, hint: str) -> list[Row]:
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    return rows


def _cut(row: dict[str, Any], recipe: StreamRecipe) -> Row:
    return {"prompt": row["prompt"], "answer": row["answer"][: recipe.answer_chars]}


def _digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
