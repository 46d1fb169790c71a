"""The loss in chunks on two ranks that need different numbers of chunks: every gradient, and training."""

from pathlib import Path

import numpy as np
import pytest
from support.chunked_loss_job import CHUNK, FAMILIES, STAGES
from support.jobs import Results, result_of, run_job


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: Path = tmp_path_factory.mktemp("chunked")
    return run_job("support.chunked_loss_job", 2, folder)


def test_every_gradient_is_that_of_the_plain_loss(results: Results) -> None:
    for stage in STAGES:
        for family in FAMILIES:
            plain, chunked = (result_of(results, f"{family}-{stage}")[chunk] for chunk in (0, CHUNK))
            for which in ("grad_sum", "square_sum"):
                assert plain[which].keys() == chunked[which].keys()
                scale = max(np.abs(values).max() for values in plain[which].values())
                for name, values in plain[which].items():
                    error = np.abs(values - chunked[which][name]).max() / scale
                    assert error < 2e-6, (family, stage, which, name, error)


def test_training_moves_the_same_weights_as_far(results: Results) -> None:
    for stage in STAGES:
        for mode in ("compact", "masked"):
            found = result_of(results, f"{mode}-{stage}")
            plain, chunked = found["0"], found[str(CHUNK)]
            moved = max(float(change.abs().max()) for change in plain.values())
            assert moved > 1e-3
            for name, change in plain.items():
                assert float((change - chunked[name]).abs().max()) < 1e-3 * moved, (mode, stage, name)
                assert ((change != 0) == (chunked[name] != 0)).all(), (mode, stage, name)
