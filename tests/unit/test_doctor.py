"""The doctor passes on a machine that works, and finds what would fail a run."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import ROOT, environment
from support.ranks import on_ranks

from piece_ds.__main__ import main
from piece_ds.doctor import machine, probe, processes
from piece_ds.doctor.findings import BAD, GOOD, NOTE, Finding
from piece_ds.doctor.machine import _folder
from piece_ds.ops import extension
from piece_ds.ops.build_specs import BUILD_SPECS
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy


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


def test_the_probe_says_what_works_and_names_each_collective_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks; each collective in turn gives wrong numbers."""

    def found() -> dict[str, str]:
        return probe._finding(*probe._try_collectives())

    right = {"status": GOOD, "found": "all-reduce, all-gather, all-to-all, broadcast over gloo, 2 processes"}
    assert on_ranks(2, found) == [right, right]
    for name, function in (
        ("all-reduce", "all_reduce"),
        ("all-gather", "all_gather"),
        ("all-to-all", "all_to_all_single"),
        ("broadcast", "broadcast"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(probe.dist, function, partial(_writes_sevens, getattr(torch.distributed, function)))
            results = on_ranks(2, found)
        said = "; ".join(f"{name} gives wrong numbers on rank {rank}" for rank in (0, 1))
        assert results == [{"status": BAD, "found": said}] * 2


def _writes_sevens(real: Callable[..., object], written: Any, *others: object, **more: Any) -> None:
    """A collective that ends with 7 in every tensor that it writes."""
    real(written, *others, **more)
    for tensor in written if isinstance(written, list) else [written]:
        tensor.fill_(7)


def test_the_probe_trains_the_selected_weights_and_notices_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks at ZeRO-3 as the doctor starts them: a right step, one without a mask, and one that moves nothing."""

    def found() -> list[dict[str, str]]:
        right = probe._finding(*probe._try_training())
        real = torch.optim.AdamW
        torch.optim.AdamW = lambda params, lr: real(params, lr=0.0)
        idle = probe._finding(*probe._try_training())
        return [right, idle]

    for right, idle in on_ranks(2, found):
        assert right == {"status": GOOD, "found": "64 of 64 selected weights moved, the other 6416 kept all bits"}
        assert idle["status"] == BAD
        assert idle["found"] == "; ".join(f"0 of 64 selected weights moved on rank {rank}" for rank in (0, 1))


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
    places = "output", "temporary files", "compiled kernels", "the Hub's models", "piece_ds' cache"
    assert [f"folder for {place}" for place in places] == what[-5:]


def test_a_folder_for_models_that_cannot_be_written_is_a_note_that_says_what_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("PIECE_DS_CACHE", "~nobody-has-this-name/cache")
    hub, own = machine._model_folders()
    assert hub.status == own.status == NOTE
    assert "cannot be written" in hub.found
    assert "HF_HOME" in hub.found
    assert "has no home" in own.found
    assert "PIECE_DS_CACHE" in own.found


def test_ops_that_do_not_load_are_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(device: str) -> str:
        raise UserError("cannot be built")

    monkeypatch.setattr(machine, "run_self_test", lambda num_ranks: pytest.fail("every process would say it again"))
    monkeypatch.setattr(machine.backends, "load", fail)
    findings = list(machine.examine(str(tmp_path), 1))
    assert sum("cannot be built" in finding.found for finding in findings) == 1
    assert findings[-1].status == BAD
    assert findings[-1].found.startswith("not tried")


def test_a_machine_without_compiler_passes_if_the_ops_load_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They came compiled, were compiled before, or are torch's alone (PIECE_DS_BACKEND=reference)."""
    monkeypatch.setattr(machine, "compiler_version", lambda: "")
    monkeypatch.setattr(machine.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(machine, "run_self_test", lambda num_ranks: iter(()))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def fail(device: str) -> str:
        raise UserError("cannot be built")

    for loads, shipped, status, words in (
        (lambda device: "cpp", tmp_path / "piece_ds_cpu.abi3.so", NOTE, "came compiled with the package"),
        (lambda device: "reference", None, NOTE, "work without one"),
        (fail, None, BAD, "PIECE_DS_BACKEND=reference"),
    ):
        monkeypatch.setattr(machine.backends, "load", loads)
        monkeypatch.setattr(machine, "prebuilt", lambda device, shipped=shipped: shipped)
        findings = {finding.what: finding for finding in machine.examine(str(tmp_path), 1)}
        assert findings["C++ compiler"].status == findings["ninja"].status == status
        assert words in findings["C++ compiler"].found
        assert machine._deepspeed_ops().status == NOTE  # those need the compiler all the same
        assert findings["piece_ds ops on cpu"].found.startswith("cannot be built") == (status == BAD)  # in plain words


def test_deepspeeds_ops_are_looked_for_where_torch_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "compiler_version", lambda: "")
    assert machine._deepspeed_ops().status == NOTE
    (tmp_path / "torch_extensions" / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "torch_extensions" / "py311_cpu" / "cpu_adam" / "cpu_adam.so").touch()
    assert machine._deepspeed_ops().status == GOOD


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_self_test_of_no_processes_is_refused(ranks: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["doctor", "--ranks", str(ranks)])
    assert leave.value.code == 2
    assert capsys.readouterr().err == f"error: --ranks must be at least 1, got {ranks}\n"


def test_the_library_of_the_package_is_found_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    assert extension.prebuilt("cpu") is None
    (tmp_path / "piece_ds_cpu_000000000000.abi3.so").touch()  # of other sources
    assert extension.prebuilt("cpu") is None
    library = tmp_path / f"{BUILD_SPECS['cpu'].library_name()}.abi3.so"
    library.touch()
    assert extension.prebuilt("cpu") == library


def test_one_process_that_fails_is_enough_whatever_was_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start", lambda *_: None)
    for codes, status in (([0, 0], GOOD), ([0, 1], BAD), ([-9, 0], BAD)):
        monkeypatch.setattr(processes, "_wait", lambda *_, codes=codes: codes)
        monkeypatch.setattr(processes, "_last_words", lambda *_: "")
        *_, last = processes.run_self_test(2)
        assert (last.what, last.status) == ("self-test", status), codes


def test_the_processes_of_the_self_test_meet_at_a_port_that_is_held() -> None:
    """One that is only looked for can be another process's when rank 0 has imported what it needs."""
    meeting = processes._meeting_place(2)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", meeting.port))
