"""The lock of torch's compilations: waited for while somebody compiles, named and given up if nobody does."""

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils import file_baton

from piece_ds.doctor import machine
from piece_ds.doctor.findings import BAD, GOOD, NOTE
from piece_ds.runtime import compile_lock
from piece_ds.runtime.compile_lock import (
    ABANDONED_SECONDS,
    HELD_SECONDS,
    abandoned_locks,
    is_held,
    wait_for,
    wait_with_a_limit,
    why_abandoned,
)
from piece_ds.runtime.errors import UserError


def made_lock(root: Path, name: str = "cpu_adam", seconds_ago: float = 0.0) -> Path:
    """A lock as torch makes it, and a file that was compiled, both so many seconds old."""
    folder = root / "py311_cpu" / name
    folder.mkdir(parents=True)
    for file in ("main.o", "lock"):
        (folder / file).touch()
        os.utime(folder / file, (time.time() - seconds_ago,) * 2)
    return folder / "lock"


def test_a_lock_is_abandoned_once_nobody_has_written_beside_it_for_a_while(tmp_path: Path) -> None:
    for number, (seconds, held, is_abandoned) in enumerate(
        (
            (0.0, False, False),
            (ABANDONED_SECONDS - 60, False, False),
            (ABANDONED_SECONDS + 60, False, True),
            (ABANDONED_SECONDS + 60, True, False),
            (HELD_SECONDS + 60, True, True),
        )
    ):
        lock = made_lock(tmp_path, f"op{number}", seconds)
        handle = os.open(lock, os.O_RDONLY) if held else None
        reason = why_abandoned(lock)
        assert (reason is not None) == is_abandoned, (seconds, held)
        assert is_held(lock) == held
        if handle is not None:
            os.close(handle)
    # A compiler that has just written another file is at work.
    lock = made_lock(tmp_path, "busy", ABANDONED_SECONDS + 60)
    (lock.parent / "second.o").touch()
    assert why_abandoned(lock) is None
    assert why_abandoned(tmp_path / "nothing" / "lock") is None
    assert [found.parent.name for found, _ in abandoned_locks(tmp_path)] == [
        "op2",
        "op3",
        "op4",
    ]  # none is held any more


def test_torch_does_not_wait_for_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_baton.FileBaton, "wait", file_baton.FileBaton.wait)  # restored afterwards
    wait_with_a_limit()
    lock = made_lock(tmp_path, seconds_ago=ABANDONED_SECONDS + 60)
    baton = file_baton.FileBaton(str(lock))
    assert not baton.try_acquire()
    with pytest.raises(UserError, match=f"{lock} is held by no process .* remove it, then start again"):
        baton.wait()


def test_a_wait_says_what_it_waits_for_and_ends_with_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for seconds_to_wait, lines in ((3.0, 0), (20.0, 1)):
        lock, clock = made_lock(tmp_path, f"op{lines}"), [0.0]

        def sleep(seconds: float, lock: Path = lock, clock: list[float] = clock, end: float = seconds_to_wait) -> None:
            clock[0] += seconds
            if clock[0] >= end:
                lock.unlink(missing_ok=True)

        monkeypatch.setattr(
            compile_lock, "time", SimpleNamespace(monotonic=lambda clock=clock: clock[0], time=time.time, sleep=sleep)
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            wait_for(lock)
        assert caplog.text.count(f"to compile op{lines}; if none does, end this run and remove {lock}") == lines


def test_the_doctor_names_what_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine._locks().status == GOOD
    other = made_lock(tmp_path, "evoformer_attn", ABANDONED_SECONDS + 60)
    assert machine._locks().status == NOTE
    lock = made_lock(tmp_path, "fused_adam", ABANDONED_SECONDS + 60)
    finding = machine._locks()
    assert finding.status == BAD
    assert all(f"{path} is held by no process" in finding.found for path in (lock, other))
