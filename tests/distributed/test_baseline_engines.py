"""A term added to the reduced gradient is what it would be in the loss, at every stage; GEM turns what harms."""

from functools import cache

import pytest
import torch
from support.baseline_cases import SETUPS, train_with_penalty
from support.jobs import Job
from torch import Tensor

EXACT = ("stage0", "stage1", "stage2", "stage3")
RANKS = [1, 2]


@cache
def oracle(num_ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    return train_with_penalty(num_ranks)


def result(job: Job, num_ranks: int, name: str) -> dict:
    found = job("baseline_job", num_ranks)[name]
    assert "error" not in found, found.get("error")
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_penalty_in_fp32_trains_what_the_loss_with_the_penalty_trains(job: Job, num_ranks: int, name: str) -> None:
    found, (weights, norms) = result(job, num_ranks, name), oracle(num_ranks)
    for key, want in weights.items():
        torch.testing.assert_close(found["weights"][key], want, rtol=1e-4, atol=2e-5)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(SETUPS) - set(EXACT)))
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_penalty_in_16_bits_is_near_the_one_in_fp32(job: Job, num_ranks: int, name: str) -> None:
    """The masters' path from start to end, where bf16's forward pass rounds; the term itself is fp32."""
    found, (weights, norms) = result(job, num_ranks, name), oracle(num_ranks)
    assert found["norms"] == pytest.approx(norms, rel=0.05)
    for key, want in weights.items():
        torch.testing.assert_close(found["masters"][key], want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["stage0", "stage1-bf16", "stage2", "stage3"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_gem_leaves_no_negative_product_with_any_memory(job: Job, num_ranks: int, name: str) -> None:
    found = result(job, num_ranks, f"gem-{name}")
    assert max(found["before"]) < -0.1
    assert min(found["after"]) >= -5e-3  # relative to the memory's own square
    assert not found["num_hooks_left"]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_optimizer_offload_is_refused(job: Job, num_ranks: int) -> None:
    assert "without zero_optimization.offload_optimizer" in result(job, num_ranks, "offload")["message"]
