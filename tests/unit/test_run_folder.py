"""An output folder belongs to one run."""

import json
from pathlib import Path
from typing import Any

import pytest

from piece_ds.runtime.errors import UserError
from piece_ds.training.claim import Claim
from piece_ds.training.run_folder import RunFolder, written_bytes

CONFIGURATION: dict[str, Any] = {
    "MethodArguments": {"mask_ratio": 0.1, "method": "piece-s"},
    "world_size": 2,
    "TrainingArguments": {"seed": 42},
}


def changed_in(part: str, **values: Any) -> dict[str, Any]:
    return {**CONFIGURATION, part: {**CONFIGURATION[part], **values}}


def test_claim_writes_configuration_and_versions_and_makes_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    Claim(folder, CONFIGURATION).make()
    run = json.loads(folder.run_file.read_text())
    assert CONFIGURATION.items() <= run.items()
    assert {"piece_ds", "torch", "deepspeed", "transformers", "python", "device"} <= run["versions"].keys()
    assert [path.name for path in folder.root.iterdir()] == ["run.json"]


def test_folder_with_other_things_in_it_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    Claim(RunFolder(tmp_path), CONFIGURATION, resume=False).make()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_same_run_may_go_on_and_its_run_file_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    Claim(folder, CONFIGURATION).make()
    before = folder.run_file.read_bytes()
    Claim(folder, CONFIGURATION, resume=True).make()
    assert folder.run_file.read_bytes() == before


def test_resuming_where_nothing_was_begun_begins(tmp_path: Path) -> None:
    Claim(RunFolder(tmp_path / "new"), CONFIGURATION, resume=True).make()
    assert (tmp_path / "new" / "run.json").is_file()


def test_same_run_without_resume_is_refused(tmp_path: Path) -> None:
    Claim(RunFolder(tmp_path), CONFIGURATION, resume=False).make()
    with pytest.raises(UserError, match="holds a run already: add --resume_from_checkpoint True"):
        Claim(RunFolder(tmp_path), CONFIGURATION, resume=False).make()
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder(tmp_path).require_free(resume=False)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (changed_in("MethodArguments", mask_ratio=0.2), r"MethodArguments\.mask_ratio was 0\.1, is 0\.2"),
        (changed_in("TrainingArguments", seed=1), r"TrainingArguments\.seed was 42, is 1"),
        ({**CONFIGURATION, "world_size": 1}, r"world_size was 2, is 1"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    tmp_path: Path, other: dict[str, Any], difference: str, resume: bool
) -> None:
    Claim(RunFolder(tmp_path), CONFIGURATION, resume=False).make()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError, match=rf"belongs to another run \({difference}\)"):
        Claim(RunFolder(tmp_path), other, resume).make()
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("left", ["00-sums", "results.json"])
def test_results_without_a_run_file_are_not_touched(tmp_path: Path, left: str) -> None:
    (tmp_path / left / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=f"holds {left} but no run.json"):
        Claim(RunFolder(tmp_path), CONFIGURATION, resume=False).make()


def test_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file, expected a folder"):
        Claim(RunFolder(tmp_path / "out"), CONFIGURATION, resume=False).make()


def test_damaged_run_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Claim(RunFolder(tmp_path), CONFIGURATION, resume=True).make()


def test_tasks_are_numbered_folders_with_a_model_inside(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).task(3, "sums") == tmp_path / "03-sums"
    assert RunFolder(tmp_path).model(11, "a b") == tmp_path / "11-a b" / "model"


def test_written_bytes_are_counted_by_kind_without_checkpoints_and_logs(tmp_path: Path) -> None:
    files = {
        "mask.safetensors": 3,
        "delta.safetensors": 5,
        "model/a.safetensors": 7,
        "model/config.json": 11,
        "adapter/b.bin": 13,
        "extra.bin": 1,
        "checkpoint-4/c.bin": 100,
        "previous.safetensors": 100,
        "metrics.jsonl": 100,
    }
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert written_bytes(tmp_path) == {"mask_bytes": 3, "delta_bytes": 5, "model_bytes": 18, "other_bytes": 14}
