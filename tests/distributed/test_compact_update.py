"""Compact training is masked training with less state: the same weights, and no bit of anything else moves."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.compact_cases import (
    EVERYWHERE,
    FAST,
    FAST_FULL,
    FAST_RESUMED,
    FAST_SAMPLED,
    FAST_WHOLE,
    FULL,
    RESUMED,
    WHOLE,
)
from support.errors_of_weights import largest_error, mean_error
from support.jobs import result_of
from support.update_cases import BF16_EXACT, CASES, NUM_SELECTED, NUM_STEPS, OVERFLOW, selection
from support.update_tiers import update_results
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def tiers(names: Iterable[str], fast: set[str]) -> list[Any]:
    """Names as parameters, those that are not in fast marked slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


EVERY_CASE = tiers(CASES, FAST)


def result(job: Any, name: str, ranks: int = 2) -> dict[str, Any]:
    """Of the fast job or, where it has no such case, of the slow one."""
    fast = job("compact_job", ranks, "fast")
    return result_of(fast if name in fast else job("compact_job", ranks, "slow"), name)


def masked(job: Any, name: str) -> dict[str, Any]:
    return result_of(update_results(job, name), name)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter -> flat positions whose bits differ."""
    assert first.keys() == second.keys()
    bits = {name: BITS[values.dtype] for name, values in first.items()}
    where = {n: (values.view(bits[n]) != second[n].view(bits[n])).nonzero().view(-1) for n, values in first.items()}
    return {name: positions for name, positions in where.items() if positions.numel()}


def assert_only_selected_moved(before: dict[str, Tensor], after: dict[str, Tensor], index: dict[str, Tensor]) -> None:
    moved = differing(before, after)
    for name, positions in moved.items():
        assert torch.isin(positions, index.get(name, torch.zeros(0).long())).all(), name
    assert sum(p.numel() for p in moved.values()) > 0.9 * sum(i.numel() for i in index.values())


@pytest.mark.parametrize("name", EVERY_CASE)
def test_no_unselected_weight_moves(job: Any, name: str) -> None:
    got = result(job, name)
    assert_only_selected_moved(got["initial"], got["final"], selection())


@pytest.mark.parametrize("name", EVERY_CASE)
def test_deepspeed_optimises_k_values_and_nothing_else(job: Any, name: str) -> None:
    """Their masters begin as the weights; at this size, state for a single weight more would be seen."""
    got = result(job, name)
    assert {n: m.numel() for n, m in got["initial_masters"].items()} == {"piece_values.values": NUM_SELECTED}
    want = torch.cat([got["initial"][n][selection()[n]] for n in got["initial"] if n in selection()]).float()
    assert torch.equal(got["initial_masters"]["piece_values.values"], want)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_the_weights_are_the_values(job: Any, name: str) -> None:
    got = result(job, name)
    weights = torch.cat([got["final"][n][selection()[n]] for n in got["final"] if n in selection()])
    assert torch.equal(got["final_masters"]["piece_values.values"].to(weights.dtype), weights)


@pytest.mark.parametrize("name", tiers(BF16_EXACT, FAST))
def test_bf16_equals_masked_mode_bit_for_bit_where_deepspeed_accumulates_in_fp32(job: Any, name: str) -> None:
    assert differing(result(job, name)["final"], masked(job, name)["final"]) == {}


@pytest.mark.parametrize("name", tiers([name for name in CASES if name not in BF16_EXACT], FAST))
def test_weights_equal_those_of_masked_mode(job: Any, name: str) -> None:
    got, want = result(job, name), masked(job, name)
    if CASES[name].setup.dtype == "fp32":
        assert largest_error(got["final"], want["final"], got["initial"]) < 1e-4  # sums in another order
    else:
        assert mean_error(got["final"], want["final"], got["initial"]) < 0.02  # reduced in 16 bits


@pytest.mark.parametrize("name", EVERY_CASE)
def test_reported_norms_equal_those_of_masked_mode(job: Any, name: str) -> None:
    exact = CASES[name].setup.dtype == "fp32" or name in BF16_EXACT
    assert result(job, name)["norms"] == pytest.approx(masked(job, name)["norms"], rel=1e-6 if exact else 0.01)


@pytest.mark.parametrize("name", tiers(OVERFLOW, FAST))
def test_an_overflow_skips_the_step_and_moves_nothing(job: Any, name: str) -> None:
    got = result(job, name)
    assert got["skipped_steps"] == masked(job, name)["skipped_steps"]
    assert 1 <= got["skipped_steps"] < NUM_STEPS
    assert differing(got["initial"], got["after_first"]) == {}


WHOLE_EVERYWHERE = [
    pytest.param(name, ranks, marks=() if ranks == 2 and name in FAST_WHOLE else pytest.mark.slow)
    for name in WHOLE
    for ranks in ((1, 2, 3) if name in EVERYWHERE else (2,))
]


@pytest.mark.parametrize(("name", "ranks"), WHOLE_EVERYWHERE)
def test_one_engine_scores_and_trains_as_two_engines_in_masked_mode(job: Any, name: str, ranks: int) -> None:
    """The statistics pass selects the same weights although they are frozen for DeepSpeed; training equals training."""
    both = result(job, f"whole-{name}", ranks)
    got, want = both["compact"], both["masked"]
    assert got["index"].keys() == want["index"].keys()
    assert all(torch.equal(index, want["index"][parameter]) for parameter, index in got["index"].items())
    assert_only_selected_moved(got["initial"], got["final"], got["index"])
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)  # of one weight it is a single rounded gradient
    if name.startswith("bf16"):
        assert differing(got["final"], want["final"]) == {}
    else:
        assert largest_error(got["final"], want["final"], got["initial"]) < 1e-4


SAMPLED_EVERYWHERE = [
    pytest.param(name, ranks, marks=() if ranks == 2 and name in FAST_SAMPLED else pytest.mark.slow)
    for name in WHOLE
    for ranks in ((1, 2, 3) if name in EVERYWHERE else (2,))
]


@pytest.mark.parametrize(("name", "ranks"), SAMPLED_EVERYWHERE)
def test_sampled_gradients_train_what_dense_gradients_train(job: Any, name: str, ranks: int) -> None:
    """In every linear layer; in bf16 they are more exact than dense ones, which autograd rounds to bf16."""
    both = result(job, f"sampled-{name}", ranks)
    got, want = both["compact"], both["masked"]
    assert all(torch.equal(index, want["index"][parameter]) for parameter, index in got["index"].items())
    assert_only_selected_moved(got["initial"], got["final"], got["index"])
    assert name.startswith("one-weight") or any(
        "proj" in parameter or "dense" in parameter or "c_fc" in parameter for parameter in got["by_formula"]
    )
    in_bf16 = name.startswith("bf16")
    assert got["norms"] == pytest.approx(want["norms"], rel=0.01 if in_bf16 else 1e-5)
    if in_bf16:
        assert mean_error(got["final"], want["final"], got["initial"]) < 0.02
    else:
        assert largest_error(got["final"], want["final"], got["initial"]) < 1e-4
    assert got["leftover"] in ([], ["piece_values.values"])
    assert got["requires_grad"]


@pytest.mark.parametrize(("name", "ranks"), WHOLE_EVERYWHERE)
def test_no_gradient_is_left_and_the_model_is_as_before(job: Any, name: str, ranks: int) -> None:
    got = result(job, f"whole-{name}", ranks)["compact"]
    assert got["leftover"] in ([], ["piece_values.values"])
    assert got["requires_grad"]
    assert got["initial"].keys() == got["final"].keys()


@pytest.mark.parametrize("name", tiers(RESUMED, FAST_RESUMED))
@pytest.mark.parametrize("order", ["loaded again", "attached, then loaded", "loaded, then attached"])
def test_a_resumed_engine_goes_on_with_the_same_bits(job: Any, name: str, order: str) -> None:
    got = result(job, f"resumed-{name}")
    assert_same(got[order], got["uninterrupted"])


@pytest.mark.parametrize("name", tiers(FULL, FAST_FULL))
def test_a_whole_checkpoint_needs_nothing_of_the_model_it_is_loaded_into(job: Any, name: str) -> None:
    got = result(job, f"full-{name}")
    assert_same(got["into another model"], got["uninterrupted"])


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for which in ("weights", "masters"):
        assert differing(got[which], want[which]) == {}
    assert got["norms"] == want["norms"]


@pytest.mark.parametrize("name", tiers(RESUMED, FAST_RESUMED))
def test_a_checkpoint_holds_nothing_larger_than_the_values(job: Any, name: str) -> None:
    """The model has tensors of 3 395 elements, and 771 weights are selected."""
    assert 0 < result(job, f"resumed-{name}")["largest"] <= NUM_SELECTED + 16


REASONS = {
    "attached": "take them before attach()",
    "base": "other weights are not those that the training began with",
    "base-stage0": "other weights are not those that the training began with",
    "mask": "of another mask",
    "optimizer": "--update_mode masked",
    "number": "prepared for another number",
    "frozen": "'lm_head.weight', which is frozen",
    "dtype": "--update_mode masked",
    "twice": "prepared for compact mode already",
}


@pytest.mark.parametrize(("name", "reason"), REASONS.items())
def test_what_does_not_fit_is_refused_with_the_reason(job: Any, name: str, reason: str) -> None:
    got = result(job, f"refusal-{name}")
    assert got["type"] == "UserError", got["message"]
    assert reason in got["message"]
    assert "\n" not in got["message"]
