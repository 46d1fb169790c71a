"""Whatever standard output leads to, a program goes on: closed, a reader who has gone, a full disk, few letters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piece_ds.__main__ import main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.launch_environment import require_working_folder
from piece_ds.runtime.streams import _Kept

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from piece_ds.runtime.streams import keep_streams, lost_output
keep_streams()
file = open(sys.argv[1], "w")
assert file.fileno() > 2, "what a library prints would land in the file"
print("caf\\u00e9 \\u4efb" * 5000)
lost = lost_output()
print("after", file=sys.stderr)
os.write(1, b"native")
file.write(f"whole {lost}")
"""


def outcome(folder: Path, redirection: str, **environment: str) -> tuple[int, str, bytes]:
    """Exit code, what the program wrote into its file, and what it said on stderr."""
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = f'"{sys.executable}" "{folder}/program.py" "{folder}/file" {redirection}; exit ${{PIPESTATUS[0]}}'
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, timeout=60, check=False)
    return run.returncode, (folder / "file").read_text(), run.stderr


def test_what_cannot_be_printed_ends_nothing(tmp_path: Path) -> None:
    for redirection in (">&-", ">&- 2>&- <&-", "| true"):
        code, written, said = outcome(tmp_path, redirection)
        assert (code, written) == (0, "whole False"), (redirection, said)
        assert b"Traceback" not in said
    code, written, said = outcome(tmp_path, ">/dev/full")
    assert (code, written) == (0, "whole True")
    assert said.splitlines() == [
        b"standard output could not be written (No space left on device); what a run writes is whole",
        b"after",
    ]


def test_a_command_that_only_prints_ends_with_1_if_that_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", _Kept(full, "stdout"))
        with pytest.raises(SystemExit) as left:
            main(["--help"])
    assert left.value.code == 1
    assert capsys.readouterr().err.count("standard output could not be written (No space left on device)") == 1


def test_letters_that_the_encoding_lacks_are_shown_by_their_numbers(tmp_path: Path) -> None:
    assert outcome(tmp_path, f'> "{tmp_path}/out"', PYTHONIOENCODING="ascii")[:2] == (0, "whole False")
    assert (tmp_path / "out").read_bytes().startswith(rb"caf\xe9 \u4efbcaf")


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_working_folder()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"is not there any more .*: cd to another one"):
        require_working_folder()
