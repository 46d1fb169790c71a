"""The doctor passes on a machine that works, and finds what would fail a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launches import ROOT, environment

from piece_ds.__main__ import main
from piece_ds.doctor import machine, probe, processes
from piece_ds.doctor.findings import BAD, GOOD, NOTE, Finding
from piece_ds.doctor.machine import _folder


@pytest.mark.slow
def test_this_machine_passes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "piece_ds", "doctor", "--json"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    findings = {finding["what"]: finding for finding in json.loads(run.stdout)}
    assert {"versions", "collectives", "statistics, mask, step", "self-test"} <= findings.keys()
    assert all(finding["status"] in (GOOD, NOTE) for finding in findings.values())
    assert (
        "64 of 64 selected weights moved, the other 6416 kept all bits" in findings["statistics, mask, step"]["found"]
    )


def test_a_folder_that_cannot_be_written_fails() -> None:
    found = _folder("folder for output", Path("/proc/nowhere"))
    assert found.status == BAD
    assert "cannot be written" in found.found


def test_a_process_that_ends_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
import os, sys, time
if os.environ.get("RANK") == "1":
    sys.exit("no device for me")
time.sleep(60)
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    findings = {finding.what: finding for finding in processes.run_self_test(2)}
    assert findings["collectives"].status == findings["self-test"].status == BAD
    assert "rank 1: " in findings["collectives"].found
    assert "no device for me" in findings["collectives"].found


def test_a_weight_that_moves_outside_the_mask_is_found() -> None:
    before, selected = {"a": torch.zeros(4), "b": torch.zeros(2)}, {"a": torch.tensor([2])}
    inside = {"a": torch.tensor([0.0, 0.0, 1.0, 0.0]), "b": torch.zeros(2)}
    outside = {"a": torch.tensor([0.0, 1.0, 1.0, 0.0]), "b": torch.tensor([-0.0, 0.0])}
    assert probe.moved_outside(before, inside, selected) == []
    assert probe.moved_outside(before, outside, selected) == ["a", "b"]


def test_a_finding_that_fails_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, code in ((GOOD, None), (NOTE, None), (BAD, 1)):
        monkeypatch.setattr("piece_ds.cli.doctor.examine", lambda *_, s=status: [Finding("disk", s, "[full]")])
        left = None
        try:
            main(["doctor"])
        except SystemExit as leave:
            left = leave.code
        assert left == code
        assert "[full]" in capsys.readouterr().out


def test_each_place_of_a_run_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "run_self_test", lambda num_ranks: iter(()))
    what = [finding.what for finding in machine.examine(".", 2)]
    assert [f"folder for {place}" for place in ("output", "temporary files", "compiled kernels")] == what[-3:]
