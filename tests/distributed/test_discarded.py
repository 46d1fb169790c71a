"""Gradients that a loop throws away by zero_grad() are in no step of compact mode either."""

from typing import Any

import pytest
import torch
from support.jobs import result_of, run_job


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job("support.discarded_job", 2, tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["a backward failed", "discarded by the optimizer"])
def test_training_goes_on_as_if_they_had_not_been(results: dict[str, Any], name: str, stage: int) -> None:
    got, expected = (result_of(results, f"{case} {stage}")["weights"] for case in (name, "left alone"))
    assert all(torch.equal(got[weight], expected[weight]) for weight in expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nothing_of_it_stays_on_the_engine(results: dict[str, Any], stage: int) -> None:
    got = result_of(results, f"left alone {stage}")
    assert (got["wrapped"], got["left"]) == (True, False)
