"""G and F are what plain PyTorch gives, and have the same bits for every number of ranks; the pass leaves no trace."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import vision
from support.models import make_model
from support.oracle import score, top_k
from support.selection_cases import as_set
from support.statistics_cases import (
    METHODS,
    NONDETERMINISTIC,
    PLAIN,
    RATIOS,
    SPECIAL,
    THREE_RANKS,
    VISION,
    WORLD_SIZES,
    Case,
    fp64_sums_of,
    oracle_of,
)
from support.statistics_results import statistics_result as result

# |difference| / largest entry of the tensor. The sums themselves are added in fp32 here and in fp64 by the oracle.
TOLERANCE = 1e-6
TOLERANCE_OF_OTHER_PADDING = 1e-5  # the oracle of models that read images pads on the other side


def tiers(cases: Iterable[tuple[str, int]]) -> list[Any]:
    """Cases as parameters, those on three ranks of most models marked slow."""
    slow = {(name, 3) for name in PLAIN if name not in THREE_RANKS}
    return [pytest.param(*case, marks=pytest.mark.slow if case in slow else ()) for case in cases]


EVERYWHERE = [*product(PLAIN, WORLD_SIZES), *((name, 2) for name in SPECIAL), *product(VISION, (1, 2))]
CASES = PLAIN | SPECIAL | VISION


def relative_error(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    assert got.keys() == want.keys()
    scale = {name: np.abs(want[name]).max() or 1.0 for name in want}
    return max(float(np.abs(got[name] - want[name]).max() / scale[name]) for name in want)


def own_error(case: Case, which: int) -> float:
    """How far plain PyTorch is from products in fp64: the room that another order of products may take.

    ZeRO-3 multiplies in another order than nn.Linear, and how much that changes depends on the processor. Of 16-bit
    gradients this would be a thousand times the tolerance and hide everything: none is given.
    """
    if case.setup.dtype != "fp32" or case.poison:
        return 0.0
    return relative_error(oracle_of(case)[which], fp64_sums_of(case)[which])


@pytest.mark.parametrize(("name", "ranks"), tiers(EVERYWHERE))
def test_sums_equal_plain_pytorch(job: Any, name: str, ranks: int) -> None:
    got = result(job, name, ranks)
    case = CASES[name]
    sums, squares, _ = oracle_of(case)
    tolerance = TOLERANCE_OF_OTHER_PADDING if case.family in vision.FAMILIES else TOLERANCE
    assert relative_error(got["sums"], sums) <= tolerance + own_error(case, 0)
    assert relative_error(got["squares"], squares) <= tolerance + own_error(case, 1)
    assert all(array.dtype == np.float32 for array in (*got["sums"].values(), *got["squares"].values()))


@pytest.mark.parametrize(("name", "ranks"), tiers(EVERYWHERE))
def test_masks_equal_plain_pytorch(job: Any, name: str, ranks: int) -> None:
    """Exactly k; at most 1 % of k may differ where scores at the threshold are equal up to rounding."""
    got = result(job, name, ranks)
    sums, squares, total = oracle_of(CASES[name])
    for method, ratio in product(METHODS, RATIOS):
        k = max(1, int(ratio * total))
        mask = as_set(got["masks"][method, ratio])
        assert len(mask) == got["num_selected"][method, ratio] == k, (method, ratio)
        assert len(mask - top_k(score(method, sums, squares), k)) <= 0.01 * k, (method, ratio)


@pytest.mark.parametrize(("name", "ranks"), tiers(EVERYWHERE))
def test_candidates_of_the_last_pass_give_the_same_mask(job: Any, name: str, ranks: int) -> None:
    """Seven micro-batches move the scores so little that the bound, sampled before the last round, holds."""
    got = result(job, name, ranks)
    assert got["proven"] or CASES[name].num_batches <= ranks
    assert as_set(got["mask_of_last_pass"]) == as_set(got["masks"]["piece-s", RATIOS[0]])


@pytest.mark.parametrize(("name", "ranks"), tiers([*product(PLAIN, (2, 3)), *product(VISION, (2,))]))
def test_sums_have_the_same_bits_for_any_number_of_ranks(job: Any, name: str, ranks: int) -> None:
    alone, together = result(job, name, 1), result(job, name, ranks)
    for which in ("sums", "squares"):
        for parameter in alone[which]:
            np.testing.assert_array_equal(
                alone[which][parameter].view(np.int32), together[which][parameter].view(np.int32), parameter
            )


@pytest.mark.parametrize("name", [name for name in PLAIN | VISION if not name.endswith("stage0")])
def test_masks_are_the_same_at_every_stage(job: Any, name: str) -> None:
    family = name.rsplit("-", 1)[0]
    first, other = result(job, f"{family}-stage0", 2)["masks"], result(job, name, 2)["masks"]
    for key in first:
        differing = as_set(first[key]) - as_set(other[key])
        assert len(differing) <= 0.01 * len(as_set(first[key]))


@pytest.mark.parametrize(("name", "ranks"), tiers(EVERYWHERE))
def test_modes_rates_random_states_and_hooks_are_as_before(job: Any, name: str, ranks: int) -> None:
    assert result(job, name, ranks)["changed"] == []
    assert result(job, name, ranks)["leftover_gradients"] == []


@pytest.mark.parametrize(("name", "ranks"), tiers(EVERYWHERE))
def test_every_micro_batch_counts_once(job: Any, name: str, ranks: int) -> None:
    assert result(job, name, ranks)["num_micro_batches"] == CASES[name].num_batches


def count_nonfinite(case: Any) -> int:
    """By plain PyTorch."""
    model, count = make_model(case.family), 0
    for batch in case.batches():
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        count += sum(int((~p.grad.isfinite()).sum()) for p in model.parameters() if p.grad is not None)
    assert 0 < count < len(case.batches()) * sum(p.numel() for p in model.parameters())
    return count


@pytest.mark.parametrize("name", ["poison-stage0", "poison-stage3"])
def test_nonfinite_entries_are_counted_and_are_zero(job: Any, name: str) -> None:
    got = result(job, name, 2)
    assert got["num_nonfinite"] == count_nonfinite(CASES[name])
    assert all(np.isfinite(array).all() for array in (*got["sums"].values(), *got["squares"].values()))


@pytest.mark.parametrize(("name", "ranks"), tiers(case for case in EVERYWHERE if "poison" not in case[0]))
def test_finite_gradients_count_no_nonfinite_entry(job: Any, name: str, ranks: int) -> None:
    assert result(job, name, ranks)["num_nonfinite"] == 0


@pytest.mark.parametrize(
    ("with_dropout", "without"), [("dropout-stage0", "neox-stage0"), ("dropout-stage3", "llama-stage3")]
)
def test_dropout_has_no_effect(job: Any, with_dropout: str, without: str) -> None:
    first, second = result(job, with_dropout, 2), result(job, without, 2)
    for parameter, values in first["sums"].items():
        np.testing.assert_array_equal(values, second["sums"][parameter])


@pytest.mark.parametrize(
    ("with_it", "without"),
    [
        ("reentrant-checkpointing-stage3", "llama-stage3"),
        ("non-reentrant-checkpointing-stage3", "llama-stage3"),
        ("stage3-offload-all", "llama-stage3"),
        ("small-buckets-stage0", "neox-stage0"),
        ("small-buckets-stage2", "qwen3-stage2"),
        ("small-buckets-stage3", "llama-stage3"),
        ("small-buckets-branches-stage3", "branches-stage3"),
        ("stage2-offload", "llama-stage2"),
        *((name, f"llama-stage{case.setup.stage}") for name, case in NONDETERMINISTIC.items()),
    ],
)
def test_checkpointing_offload_buckets_and_a_second_try_have_no_effect(job: Any, with_it: str, without: str) -> None:
    first, second = result(job, with_it, 2), result(job, without, 2)
    for parameter, values in first["sums"].items():
        np.testing.assert_array_equal(values, second["sums"][parameter])


def test_the_oracle_models_are_not_degenerate() -> None:
    """Else the masks above would be trivial: gradients of every parameter are alive and their scores differ."""
    for family in ("llama", "qwen3", "gemma2", "neox"):
        sums, squares, _ = oracle_of(PLAIN[f"{family}-stage0"])
        assert all(array.any() for array in squares.values())
        alive = np.concatenate([array[array > 0] for array in score("piece-s", sums, squares).values()])
        assert np.unique(alive).size > 0.9 * alive.size
        assert alive.size > 0.5 * sum(array.size for array in sums.values())
