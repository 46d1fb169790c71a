"""A term added to the reduced gradient is what it would be in the loss, at every stage; GEM turns what harms."""

from functools import cache

import pytest
import torch
from support import baseline_cases
from support.baseline_cases import SETUPS, train_with_penalty
from support.errors_of_weights import mean_error
from support.jobs import Job
from support.models import make_model
from torch import Tensor

EXACT = ("stage0", "stage1", "stage2", "stage3")
RANKS = [1, 2]


@cache
def oracle(num_ranks: int, name: str) -> tuple[dict[str, Tensor], list[float]]:
    return train_with_penalty(num_ranks, SETUPS[name])


def flat_weights() -> dict[str, Tensor]:
    return {name: param.detach().reshape(-1) for name, param in make_model("llama").named_parameters()}


def result(job: Job, num_ranks: int, name: str) -> dict:
    found = job("baseline_job", num_ranks)[name]
    assert "error" not in found, found.get("error")
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_penalty_in_fp32_trains_what_the_loss_with_the_penalty_trains(job: Job, num_ranks: int, name: str) -> None:
    found, (weights, norms) = result(job, num_ranks, name), oracle(num_ranks, "stage0")
    for key, want in weights.items():
        torch.testing.assert_close(found["weights"][key], want, rtol=1e-4, atol=2e-5)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(SETUPS) - set(EXACT)))
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_penalty_in_16_bits_trains_what_plain_steps_with_it_train(job: Job, num_ranks: int, name: str) -> None:
    """Norms in which half the penalty would be seen, and masters; stage 0 adds gradients up in 16 bits."""
    found, (weights, norms) = result(job, num_ranks, name), oracle(num_ranks, name)
    assert found["norms"] == pytest.approx(norms, rel=0.01)
    assert mean_error(found["masters"], weights, flat_weights()) < 0.02


def test_half_the_penalty_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_with_penalty(1, SETUPS["stage2-bf16"])[1]
    monkeypatch.setattr(baseline_cases, "WEIGHT", baseline_cases.WEIGHT / 2)
    assert train_with_penalty(1, SETUPS["stage2-bf16"])[1] != pytest.approx(whole, rel=0.02)


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
