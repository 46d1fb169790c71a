"""A sealed folder is whole, and says so to anybody's sha256sum."""

import subprocess
from pathlib import Path

import pytest

from piece_ds.checkpoint.manifest import SUMS_NAME, is_complete, verify_manifest, write_manifest
from piece_ds.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "deep" / "two.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_sha256sum_agrees(folder: Path) -> None:
    run = subprocess.run(["sha256sum", "-c", "--strict", SUMS_NAME], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["deep/two.json: OK", "one.bin: OK"]


def test_an_untouched_folder_is_accepted(folder: Path) -> None:
    assert is_complete(folder)
    verify_manifest(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "remove", "empty"])
def test_damage_is_found_and_the_file_named(folder: Path, damage: str) -> None:
    path = folder / "one.bin"
    content = path.read_bytes()
    flipped = content[:9] + bytes([content[9] ^ 4]) + content[10:]
    new = {"flip": flipped, "truncate": content[:-1], "lengthen": content + b"\0", "empty": b""}.get(damage)
    path.unlink() if new is None else path.write_bytes(new)
    with pytest.raises(UserError, match=r"one\.bin"):
        verify_manifest(folder)
    verify_manifest(folder, inside="deep/")


@pytest.mark.parametrize(
    "line", ["x", "", f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd", f"{'0' * 63}  one.bin"]
)
def test_sums_that_are_no_sums_or_lead_out_of_the_folder_are_refused(folder: Path, line: str) -> None:
    (folder / SUMS_NAME).write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1: expected a sha256 and a file in the folder"):
        verify_manifest(folder)


def test_a_folder_without_sums_was_not_finished(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    with pytest.raises(UserError, match="not written to its end"):
        verify_manifest(tmp_path)
