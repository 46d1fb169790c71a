"""Checkpoints of a run: what is not as it was written is refused in one line, and folders of the user's stay."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.hostile import mutated_tree, text_of
from transformers import TrainerState

from piece_ds.checkpoint.manifest import SUMS_NAME, write_manifest
from piece_ds.runtime.errors import UserError
from piece_ds.training.checkpoints import CUT_NAME, cut_of, last_checkpoint, needs_resharding
from piece_ds.training.run_folder import clear_half_written, forget_resumption

NUM_MUTATIONS = 75  # of each JSON file
ARGUMENTS: Any = SimpleNamespace(
    hf_deepspeed_config=SimpleNamespace(get_value={"zero_optimization.stage": 2, "data_types": None}.get)
)


def make_checkpoint(task: Path, step: int = 7) -> Path:
    folder = task / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "states.pt").write_bytes(os.urandom(300))
    (folder / "latest").write_text(f"global_step{step}")
    (folder / CUT_NAME).write_text(json.dumps(cut_of(ARGUMENTS)))
    log = [{"step": 1, "loss": 2.0, "epoch": 0.1}, {"step": step, "eval_loss": 1.5, "eval_score": None, "epoch": 0.9}]
    state = TrainerState(epoch=0.9, global_step=step, max_steps=9, num_train_epochs=1, log_history=log)
    state.save_to_json(str(folder / "trainer_state.json"))
    write_manifest(folder)
    return folder


def reseal(folder: Path) -> None:
    """As write_manifest() does, without the flushes to a disk that hundreds of mutations would wait for."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS_NAME]
    sums = ((hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(folder)) for path in files)
    (folder / SUMS_NAME).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


def resume(task: Path) -> None:
    """What a resumed run reads before DeepSpeed and transformers do."""
    checkpoint = last_checkpoint(task)
    assert checkpoint is not None
    needs_resharding(checkpoint, ARGUMENTS, masked=True)
    TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def refusal(task: Path) -> str | None:
    try:
        resume(task)
    except UserError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    assert len(said) < 1200
    return said


def test_a_changed_file_is_refused_whatever_the_change(tmp_path: Path) -> None:
    """Every file but the manifest, changed in structure or in one bit, without and with its own sum."""
    rng, folder = random.Random(0), make_checkpoint(tmp_path)
    resume(tmp_path)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS_NAME]:
        content = path.read_bytes()
        for number in range(NUM_MUTATIONS if path.suffix == ".json" else 8):
            tree = path.suffix == ".json" and number
            place = rng.randrange(len(content))
            bit = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            changed = text_of(mutated_tree(json.loads(content), rng)) if tree else bit
            if changed == content:
                continue
            path.write_bytes(changed)
            assert "is damaged" in (refusal(tmp_path) or ""), (path.name, number)
            if path.suffix == ".json":  # sealed again by whoever changed it: read or refused
                reseal(folder)
                refusal(tmp_path)
            path.write_bytes(content)
            reseal(folder)
    resume(tmp_path)


def test_a_state_of_another_step_or_without_its_folder_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    state = json.loads((folder / "trainer_state.json").read_text())
    row = {"step": 3, "loss": 1.0}
    for change, message in (
        ({"global_step": 6}, "trainer_state.json is of step"),
        ({"log_history": [{**row, "step": 8}]}, "is of step 8, its folder of step 7"),
        ({"log_history": [{"loss": 1.0}]}, "log_history.0.step: Field required"),
        ({"log_history": [{**row, "eval_loss": "low"}]}, "eval_loss: .*got 'low'"),
        ({"log_history": [{**row, "eval_general_loss_before": "low"}]}, "eval_general_loss_before is no number"),
        ({"log_history": [{**row, "norms": [1, 2]}]}, "norms"),
        ({"of_tomorrow": 1}, "'of_tomorrow' is not known"),
    ):
        (folder / "trainer_state.json").write_text(json.dumps(state | change))
        reseal(folder)
        with pytest.raises(UserError, match=message):
            resume(tmp_path)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name in ("global_step6", "../checkpoint-7/global_step7", "", "global_step7\n/x"):
        (folder / "latest").write_text(name)
        reseal(folder)
        with pytest.raises(UserError, match=r"latest names .*, which is not there: remove"):
            resume(tmp_path)


def _append(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SUMS_NAME).write_text((folder / SUMS_NAME).read_text() + text)


def test_a_manifest_that_is_not_the_folders_is_refused(tmp_path: Path) -> None:
    line = hashlib.sha256(b"").hexdigest()
    changes: dict[str, Callable[[Path], object]] = {
        "expected a sha256 and a file": _append("0" * 63 + "g  latest\n"),
        "expected a sha256 and a file in": _append(f"{line}  a\0b\n"),
        "expected a sha256 and a file in the": _append(f"{line}  .\n"),
        "stands twice": _append(f"{line}  latest\n"),
        "no such file": _append(f"{line}  gone\n"),
        "found a folder, pipe or device": lambda f: (os.mkfifo(f / "pipe"), _append(f"{line}  pipe\n")(f)),
        "found a folder, pipe": _append(f"{line}  global_step7\n"),
        "optimizer.pt is not named in SHA256SUMS, so it was put there later: move it away$": (
            lambda f: (f / "optimizer.pt").write_bytes(b"x")
        ),
        "not written to its end": lambda f: (f / SUMS_NAME).write_bytes(b"\xff\xfe"),
    }
    for number, (message, change) in enumerate(changes.items()):
        task = tmp_path / str(number)
        change(make_checkpoint(task))
        with pytest.raises(UserError, match=message):
            resume(task)
    # What a file system leaves beside files is nobody's.
    (make_checkpoint(tmp_path / "nfs") / ".nfs0001").write_bytes(b"x")
    resume(tmp_path / "nfs")


def test_folders_that_the_trainer_did_not_name_are_the_users_own(tmp_path: Path) -> None:
    task = tmp_path / "00-law"
    make_checkpoint(task)
    own = ["checkpoint-best", "checkpoint-9-backup", "checkpoint-", "checkpoint-8.old"]
    for name in own:
        (task / name).mkdir()
        (task / name / SUMS_NAME).write_text("mine")
    (task / "checkpoint-99").write_text("a note")
    (task / "checkpoint-98").symlink_to(task / "checkpoint-best")
    resume(task)
    clear_half_written(tmp_path)
    forget_resumption(task)
    assert sorted(path.name for path in task.iterdir()) == sorted([*own, "checkpoint-99", "checkpoint-98"])
