"""A disk that is full or cannot be written: one line, the last good state stays, and the run goes on from it."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.launches import CONFIGS, error_lines, launch, make_model_folder, make_rows, tree, weights, write_rows
from support.readers import READERS, made

from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.training.claim import Claim
from piece_ds.training.run_folder import RunFolder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk(options) mounts a file system in memory, or mounts it again with other options; returns its folder."""
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        again = "remount," if folder.exists() else ""
        folder.mkdir(exist_ok=True)
        run = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", folder], capture_output=True, text=True
        )
        if run.returncode:
            pytest.skip(f"no file system can be mounted here: {run.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], check=False, capture_output=True)


def in_a_child(work: Callable[[], object]) -> int:
    """Call work() in a forked process; its exit code: 0, 3 for a MachineError, 1 for anything else."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except MachineError as error:
            code = 3 if "could not be written" in str(error) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kind", ["mask", "delta", "statistics", "selected", "seal", "predictions"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, kind: str) -> None:
    """The limit on a file's size stands for the disk: what is written fails in the middle."""
    path = made(READERS[kind], tmp_path / "f")
    before = {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir() if file.name != "one.bin"}

    def write_again() -> None:
        limit = min(len(content) for content in before.values()) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if kind == "seal":  # the file that it seals is there already
            from piece_ds.checkpoint.manifest import write_manifest

            write_manifest(path.parent)
        else:
            READERS[kind].make(path.parent)

    assert in_a_child(write_again) == 3
    after = {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir() if file.name != "one.bin"}
    assert after == before
    READERS[kind].read(tmp_path / "f")


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(disk: Callable[[str], Path]) -> None:
    root = disk("size=1m")
    disk("ro")
    for folder in (root, root / "new"):
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): use another folder"):
            Claim(RunFolder(folder), {"a": 1}).make()
    assert tree(root) == set()


@pytest.mark.slow
def test_a_run_goes_on_after_its_disk_was_full(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    make_model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.json", make_rows(1, 32, ("A", "B")))
    full = disk("size=400k")
    flags = [
        "--deepspeed",
        CONFIGS / "zero3.json",
        "--model_name_or_path",
        tmp_path / "model",
        "--train_file",
        tmp_path / "rows.json",
        "--mask_ratio",
        "0.05",
        "--max_steps",
        "4",
        "--save_steps",
        "1",
        "--max_eval_samples",
        "2",
        "--update_mode",
        "masked",
        "--max_new_tokens",
        "2",
    ]
    run = launch("python", 1, "train.py", *flags, "--output_dir", full)
    assert run.returncode == 1, run.stderr[-3000:]
    assert len(error_lines(run)) == 1, run.stderr[-3000:]
    assert "could not be written" in error_lines(run)[0]
    assert "Traceback" not in run.stderr + run.stdout
    disk("size=64m")
    resumed = launch("python", 1, "train.py", *flags, "--output_dir", full, "--resume_from_checkpoint", "True")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    alone = launch("python", 1, "train.py", *flags, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr[-3000:]
    first, second = (weights(folder / "00-rows" / "model") for folder in (full, tmp_path / "alone"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert tree(full) == tree(tmp_path / "alone")
