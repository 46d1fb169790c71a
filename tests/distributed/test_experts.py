"""Mixtures of experts: masks and steps on ranks are those of plain torch in one process, at every stage."""

from typing import Any

import pytest
import torch
from support.jobs import result_of
from support.moe_cases import CASES, FAST, LEARNING_RATE, LONG, NUM_STEPS, SLOW, plain_training, scores_of
from support.oracle import top_k
from support.selection_cases import as_set

EVERYWHERE = [
    *(pytest.param(name, ranks, "fast", id=f"{name}-{ranks}") for name, ranks in sorted(FAST)),
    *(
        pytest.param(name, ranks, CASES[name].family, id=f"{name}-{ranks}", marks=pytest.mark.slow)
        for name, ranks in sorted(SLOW)
    ),
]


def assert_only_selected_moved(got: dict[str, Any], index: dict[str, torch.Tensor]) -> None:
    for parameter, final in got["final"].items():
        moved = (final != got["initial"][parameter]).nonzero().view(-1)
        assert set(moved.tolist()) <= set(index.get(parameter, torch.zeros(0)).long().tolist()), parameter
        assert final.isfinite().all()


@pytest.mark.parametrize(("name", "ranks", "tier"), EVERYWHERE)
def test_masks_are_those_of_one_process(job: Any, name: str, ranks: int, tier: str) -> None:
    """Exactly k; at most 1 % of k may differ where scores at the threshold are equal up to rounding."""
    got = result_of(job("moe_job", ranks, tier), name)
    scores, k = scores_of(CASES[name])
    for method, mask in got["masks"].items():
        found = as_set(mask)
        assert len(found) == k
        assert len(found - top_k(scores[method], k)) <= 0.01 * k, method
    assert got["leftover"] == []


@pytest.mark.parametrize(("name", "ranks", "tier"), EVERYWHERE)
def test_steps_move_the_selected_weights_as_one_process_does_and_no_others(
    job: Any, name: str, ranks: int, tier: str
) -> None:
    got = result_of(job("moe_job", ranks, tier), name)
    index = {parameter: torch.as_tensor(positions) for parameter, positions in got["masks"]["piece-s"].items()}
    expected = plain_training(CASES[name], index, ranks)
    assert expected.keys() == got["final"].keys()
    assert_only_selected_moved(got, index)
    for parameter, final in got["final"].items():
        selected = index.get(parameter, torch.zeros(0, dtype=torch.int64)).long()
        # Adam's first steps have the size of the learning rate, whatever rounding the gradient has.
        error = (final[selected] - expected[parameter][selected]).abs()
        assert error.numel() == 0 or error.max() <= 1e-3 * NUM_STEPS * LEARNING_RATE, (parameter, error.max())


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_two_hundred_steps_with_one_expert_each_end(job: Any, name: str) -> None:
    """Every micro-batch sends all its rows to one expert, and two ranks mostly to different ones."""
    got = result_of(job("moe_job", 2, name), name)
    index = {parameter: torch.as_tensor(positions) for parameter, positions in got["masks"]["piece-s"].items()}
    assert_only_selected_moved(got, index)
    assert sum(int((got["final"][name] != got["initial"][name]).sum()) for name in index) > 0
