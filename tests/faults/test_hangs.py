"""A rank that does not come is named with where it was last seen; one that fails ends the job with one traceback."""

from typing import Any

import pytest
from faults.conftest import run_faults
from support.hang_job import CASES, TIMEOUT_SECONDS, WRONG_STEP

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_faults("hang_job", tmp_path_factory.mktemp("hangs"), *CASES)


def test_the_missing_rank_is_named_with_its_place(found: dict[str, Any]) -> None:
    """--ddp_timeout holds for the groups that DeepSpeed makes, too: they are what a step waits in."""
    case = found["sleeps"]
    assert case["codes"][0] == 1, case["log"]
    (line,) = (line for line in case["log"].splitlines() if line.startswith("error:"))
    place = f"step {WRONG_STEP} of 00-train"
    assert f"rank 0 has waited in vain at {place}: rank 1 was last seen at {place}, " in line
    assert "Traceback" not in case["log"]
    assert TIMEOUT_SECONDS - 1 <= case["seconds"] < TIMEOUT_SECONDS + 60


def test_a_failing_rank_ends_the_job_with_its_traceback_once(found: dict[str, Any]) -> None:
    case = found["raises"]
    assert case["codes"] == [1, 1], case["log"]
    assert case["seconds"] < 60
    assert case["log"].count("Traceback (most recent call last)") == 1, case["log"]
    assert "rank 1 failed:" in case["log"]
    assert "KeyError: 'a defect in this rank'" in case["log"]
    assert "error: rank 0 ends, since another rank has ended" in case["log"]
