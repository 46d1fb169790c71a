"""A stream of three tasks: each starts from the one before, is judged where it should be, and steps count on."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.launches import make_model_folder, make_rows, one_process, write_rows
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.deltas.delta import open_delta
from piece_ds.training.reporters import StreamReporters

TASKS = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with one_process():
        make_model_folder(tmp_path / "model")
        for seed, task in enumerate(TASKS):
            write_rows(tmp_path / "tasks" / task / "train.json", make_rows(seed, 8, ("A", "B")))
            write_rows(tmp_path / "tasks" / task / "test.json", make_rows(9, 3 + seed, ("A", "B")))
        yield tmp_path
    unset_hf_deepspeed_config()


def test_rows_of_the_matrix_deltas_and_steps_go_on_from_task_to_task(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[int] = []
    original = StreamReporters.of_task

    def of_task(reporters: StreamReporters, num_steps_before: int) -> Any:
        offsets.append(num_steps_before)
        return original(reporters, num_steps_before)

    monkeypatch.setattr(StreamReporters, "of_task", of_task)
    out = folder / "out"
    train(
        load_settings(
            [
                *("--model_name_or_path", str(folder / "model"), "--task_dir", str(folder / "tasks")),
                *("--tasks", ",".join(TASKS), "--scorers", ",".join(f"{task}=loss" for task in TASKS)),
                *("--deepspeed", "zero1", "--output_dir", str(out), "--max_steps", "2", "--method", "magnitude"),
                *("--per_device_train_batch_size", "4", "--forward_transfer", "True", "--disable_tqdm", "True"),
                *("--learning_rate", "0.1"),
            ]
        )
    )
    results = json.loads((out / "results.json").read_text())
    before, after = results["matrix"]["loss"]["before"], results["matrix"]["loss"]["after"]
    assert all(value is not None for value in before)
    known = [[value is not None for value in row] for row in after]
    assert known == [[True, True, False], [True] * 3, [True] * 3], "the next task too, and no more"
    assert len({round(value, 6) for value in (before[0], *(row[0] for row in after))}) == 4, "each task moved the model"
    assert offsets == [0, 2, 4]
    assert [results["cost"][task]["num_steps"] for task in TASKS] == [2, 2, 2]
    assert results["rows"] == {"a": 3, "b": 4, "c": 5}

    # Each delta goes on where the one before ended.
    deltas = [open_delta(out / f"{index:02d}-{task}" / "delta.safetensors") for index, task in enumerate(TASKS)]
    for first, second in pairwise(deltas):
        assert first.result_fingerprint == second.base_fingerprint != first.base_fingerprint
