"""A start that fails leaves no claim on its folder; --overwrite_output_dir removes a run and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from piece_ds.config.settings import parse
from piece_ds.preflight.checks import check_overwrite
from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.runtime.signals import Preempted
from piece_ds.training.claim import Claim
from piece_ds.training.run_folder import RunFolder

CONFIGURATION: dict[str, Any] = {"seed": 42}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piece_ds.runtime.folder_lock.WAIT_SECONDS", 0.0)


def claim_of(root: Path, **options: Any) -> Claim:
    return Claim(RunFolder(root), CONFIGURATION, **options)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def run_until(claim: Claim, place: str, error: Exception) -> None:
    """What a run does in its folder, up to an error: before the engine, in selection, or after the first step."""
    with claim.given_back_unless_begun():
        (claim.folder.root / "00-a").mkdir(parents=True)  # as transformers does for a trainer
        if place == "before":
            raise error
        claim.make()
        (claim.folder.root / "00-a" / "metrics.jsonl").write_text("")
        claim.folder.results_file.write_text("{}")
        (claim.folder.root / "predictions" / "before").mkdir(parents=True)
        if place == "partial":
            (claim.folder.root / "00-a" / "statistics.partial" / "000000004").mkdir(parents=True)
        if place == "after":
            claim.is_begun = True
        raise error


def fail_after_claim(claim: Claim) -> None:
    with claim.given_back_unless_begun():
        claim.make()
        raise RuntimeError


ERRORS = (UserError("data"), MachineError("disk"), RuntimeError("out of memory"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["before", "selection"])
@pytest.mark.parametrize("notes", [False, True])
def test_a_failure_before_the_first_step_leaves_the_folder_as_it_was(
    tmp_path: Path, error: Exception, place: str, notes: bool
) -> None:
    root = tmp_path / "out"
    if notes:
        root.mkdir()
        (root / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(type(error)):
        run_until(claim_of(root), place, error)
    assert tree(tmp_path) == before
    other = Claim(RunFolder(root), {"seed": 1})  # the mended command, with other settings
    other.check()
    other.make()


def test_a_failure_after_the_first_step_keeps_everything(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_until(claim_of(tmp_path), "after", RuntimeError())
    assert {"run.json", "results.json", "00-a/metrics.jsonl", "predictions/before"} <= tree(tmp_path)


@pytest.mark.parametrize("error", [Preempted("stopped"), MachineError("disk")], ids=["signal", "machine"])
def test_sums_that_can_be_resumed_from_are_kept(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_until(claim_of(tmp_path), "partial", error)
    assert {"run.json", "00-a/statistics.partial/000000004"} <= tree(tmp_path)
    claim_of(tmp_path, resume=True).check()


def test_input_that_cannot_be_used_gives_the_folder_back_with_its_sums(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_until(claim_of(tmp_path), "partial", UserError("no gradient"))
    assert tree(tmp_path) == set()


def test_a_resumed_run_that_fails_again_keeps_what_was_there(tmp_path: Path) -> None:
    claim_of(tmp_path).make()
    (tmp_path / "00-a").mkdir()
    (tmp_path / "00-a" / "mask.safetensors").write_text("")
    before = tree(tmp_path)
    claim = claim_of(tmp_path, resume=True)
    with pytest.raises(RuntimeError):
        fail_after_claim(claim)
    assert tree(tmp_path) == before


def test_checking_writes_nothing(tmp_path: Path) -> None:
    claim_of(tmp_path / "a" / "b").check()
    assert tree(tmp_path) == set()


def test_of_two_starts_the_second_to_have_an_engine_is_refused(tmp_path: Path) -> None:
    first, second = claim_of(tmp_path), claim_of(tmp_path)
    first.check()
    second.check()
    first.make()
    first.make()
    with pytest.raises(UserError, match="is at work"), second.given_back_unless_begun():
        second.make()
    del first  # it has ended
    with pytest.raises(UserError, match="holds a run already"), second.given_back_unless_begun():
        second.make()
    assert (tmp_path / "run.json").is_file()


def test_a_run_at_work_is_neither_resumed_nor_overwritten_nor_tidied(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with claim_of(root).given_back_unless_begun():
        pass
    first = claim_of(root)
    with first.given_back_unless_begun():
        first.make()
        (root / "00-a").mkdir()  # empty, as a trainer's folder is at first
        before = tree(tmp_path)
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match=f"another run is at work in --output_dir {root}: wait"):
                claim_of(root, **options).check()
            second = claim_of(root, **options)
            with pytest.raises(UserError, match="is at work"), second.given_back_unless_begun():
                second.make()
            assert tree(tmp_path) == before
    claim_of(root, resume=True).check()
    claim_of(root, overwrite=True).check()


def test_overwriting_removes_the_run_when_the_first_step_can_be_taken_and_nothing_else(tmp_path: Path) -> None:
    Claim(RunFolder(tmp_path), {"seed": 1}).make()
    for name in ("00-a/model/x", "predictions/00-a/x", "figures/x.png", "general_statistics/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    for name in ("results.json", "report.html", "notes.txt"):
        (tmp_path / name).write_text("")
    before = tree(tmp_path)
    claim = claim_of(tmp_path, overwrite=True)
    claim.check()
    assert tree(tmp_path) == before
    claim.make()
    assert tree(tmp_path) == {"run.json", "notes.txt"}
    del claim
    claim_of(tmp_path, resume=True).check()


def test_only_a_runs_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00-mine").mkdir()
    (tmp_path / "00-mine" / "x").write_text("")
    with pytest.raises(UserError, match=r"holds 00-mine but no run\.json"):
        claim_of(tmp_path, overwrite=True).check()


def test_overwriting_what_the_run_reads_or_would_resume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "00-a" / "model").mkdir(parents=True)
    flags = ["--output_dir", str(tmp_path), "--overwrite_output_dir", "True", "--use_cpu", "True"]
    check_overwrite(parse(flags), tmp_path)
    with pytest.raises(UserError, match=r"--model_name_or_path .* lies in --output_dir"):
        check_overwrite(parse([*flags, "--model_name_or_path", str(tmp_path / "00-a" / "model")]), tmp_path)
    with pytest.raises(UserError, match="exclude each other"):
        check_overwrite(parse([*flags, "--resume_from_checkpoint", "True"]), tmp_path)
