"""A step whose gradient is NaN or infinite changes no bit, at every stage, precision and offload, and is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.jobs import Results, result_of
from support.nonfinite_cases import CASES, FAST
from support.update_cases import selection

SLOW = tuple(name for name in CASES if name not in FAST)


def cases(overflows: bool) -> list[Any]:
    names = [name for name, case in CASES.items() if case.overflows == overflows]
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


SOUND, OVERFLOWS = cases(overflows=False), cases(overflows=True)


@pytest.fixture
def result(job: Callable[..., Results], name: str) -> dict[str, Any]:
    return result_of(job("nonfinite_job", 2, *(FAST if name in FAST else SLOW)), name)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key].reshape(-1).view(torch.uint8), second[key].reshape(-1).view(torch.uint8))
        for key in first
    )


@pytest.mark.parametrize("name", SOUND)
def test_weights_masters_and_moments_keep_their_bits(result: dict[str, Any], name: str) -> None:
    _, before, after, end = result["states"]
    assert same(before, after)
    assert not same(after, end), "the next step is sound and must be taken"
    assert all(bool(value.isfinite().all()) for value in end.values())


@pytest.mark.parametrize("name", SOUND)
def test_the_step_is_known_on_every_rank_and_the_others_are_not(result: dict[str, Any], name: str) -> None:
    first, second, third = result["faults"]
    assert first == third == [None, None]
    assert all(fault is not None for fault in second)


@pytest.mark.parametrize("name", SOUND)
def test_the_first_parameter_and_the_rank_are_named(result: dict[str, Any], name: str) -> None:
    """Each rank sees its share of the reduced gradient; one of them has the first selected weight of the model."""
    case, faults = CASES[name], result["faults"][1]
    firsts = [fault["first"] for fault in faults if fault["first"] is not None]
    if case.mode == "plain":
        assert firsts
        return
    expected = min(selection(), key=lambda key: list(selection()).index(key))
    assert (expected, int(selection()[expected][0])) in [tuple(first) for first in firsts]
    if case.mode == "compact":
        assert [fault["local_finite"] for fault in faults] == [True, False]


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_fp16_overflow_leaves_all_bits_and_is_no_fault_of_the_numbers(result: dict[str, Any], name: str) -> None:
    assert same(result["states"][0], result["states"][1])
    assert all(fault["may_recover"] for fault in result["faults"][0])


def test_statistics_name_parameter_and_micro_batch(job: Callable[..., Results]) -> None:
    for stage, found in result_of(job("nonfinite_job", 2, *FAST), "statistics").items():
        assert found["count"] == 2, stage
        assert found["first"] == (3, "model.layers.0.self_attn.k_proj.weight"), stage
