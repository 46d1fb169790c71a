"""The checkpoint that a run resumes from is the one with the most steps, whatever its name sorts like."""

from pathlib import Path

from piece_ds.checkpoint.manifest import write_manifest
from piece_ds.training.checkpoints import last_checkpoint, step_of


def test_steps_decide_and_not_names(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((9, True), (10, True), (2, True), (100, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state").write_bytes(b"piece")
        if complete:  # one that was cut short has no manifest
            write_manifest(folder)
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.name, step_of(newest)) == ("checkpoint-10", 10)
