"""Numbers that go wrong end a run with one line, or are left out and counted; ranks not started alike are refused."""

from typing import Any

import pytest
from faults.conftest import run_faults
from support.soundness_job import NAN_MICRO_BATCH, NAN_RANK, NAN_STEP, OTHERS

FAST = ("rows",)
SLOW = tuple(name for name in OTHERS if name not in FAST)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_faults("soundness_job", tmp_path_factory.mktemp("soundness"), *FAST, "nan")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_faults("soundness_job", tmp_path_factory.mktemp("soundness"), *SLOW, "nan-compared")


def error_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("error:")]


def test_nan_stops_all_ranks_with_one_line_that_names_it(fast: dict[str, Any]) -> None:
    found = fast["nan"]["stop"]
    assert found["codes"] == [1, 1], found["log"]
    assert "Traceback" not in found["log"]
    lines = error_lines(found["log"])
    assert len(set(lines)) == 1
    assert (
        f"step {NAN_STEP} of task train: the loss is nan on rank {NAN_RANK}, micro-batch {NAN_MICRO_BATCH}" in lines[0]
    )
    assert " entries of the gradient are NaN or infinite, the first model." in lines[0]
    assert f"checkpoint-{NAN_STEP - 1}" in fast["nan"]["files"]


def test_a_stopped_run_goes_on_without_the_step(fast: dict[str, Any]) -> None:
    found = fast["nan"]
    assert found["resumed"]["codes"] == [0, 0], found["resumed"]["log"]
    assert found["finite"]
    assert found["cost"]["nonfinite_steps"] == 1


@pytest.mark.slow
def test_it_ends_as_one_that_skipped_it_at_once(slow: dict[str, Any]) -> None:
    found = slow["nan-compared"]
    assert found["skip"]["codes"] == [0, 0], found["skip"]["log"]
    assert found["different"] == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in OTHERS])
def test_ranks_not_started_alike_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue("fast" if name in FAST else "slow")[name]
    assert found["codes"] == [2, 2], found["log"]
    lines = error_lines(found["log"])
    assert len(set(lines)) == 1
    assert f"alike: {OTHERS[name]}: " in lines[0]
    assert " on rank 1, " in lines[0]
    assert not found["written"]
