"""A model that has left compact mode trains in another engine as if it had never been there."""

from typing import Any

import pytest
from support.jobs import result_of, run_job


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job("support.second_engine_job", 2, tmp_path_factory.mktemp("job"))


def test_no_mark_is_left_and_every_unfrozen_weight_can_train(results: dict[str, Any]) -> None:
    got = result_of(results, "after-compact")
    assert (got["marked while it evaluates"], got["left"]) == (2, 0)
    never = result_of(results, "never-compact")["losses"]
    assert got["losses"] == pytest.approx(never, rel=1e-6)
    assert never[-1] != never[0]


def test_an_engine_evaluates_after_its_update_is_gone(results: dict[str, Any]) -> None:
    got = result_of(results, "after-compact")
    assert got["evaluated"] == pytest.approx(got["evaluated whole"], rel=1e-5)


def test_an_update_that_outlives_its_engine_leaves_no_mark(results: dict[str, Any]) -> None:
    got = result_of(results, "destroyed-first")
    assert got["left"] == 0
    assert got["losses"] == pytest.approx(result_of(results, "never-compact")["losses"], rel=1e-6)
