"""A signal ends a run where it can go on; a killed run goes on with other ranks. Both as if nothing had happened."""

from collections.abc import Callable
from typing import Any

import pytest
from support.fault_job import MOMENTS, OTHERS, SIGNALS

from piece_ds.runtime.signals import STOP_CODE

Faults = Callable[..., dict[str, Any]]

FAST = ("SIGUSR1", "compact-3-on-1-rank-at-1")
SLOW = tuple(name for name in (*SIGNALS, *OTHERS) if name not in FAST)


def case(faults: Faults, name: str) -> dict[str, Any]:
    return faults(*(FAST if name in FAST else SLOW))[name]


def tiers(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", tiers(SIGNALS))
def test_a_signal_to_one_rank_ends_all_of_them_with_the_code_to_start_again(faults: Faults, name: str) -> None:
    found = case(faults, name)
    assert found["codes"] == [STOP_CODE, STOP_CODE], found["log"]
    assert f"stopped by {name} " in found["log"]
    assert MOMENTS[SIGNALS[name][1]][1] in found["log"]


@pytest.mark.parametrize("name", tiers(SIGNALS))
def test_a_stopped_run_ends_as_one_that_was_left_alone(faults: Faults, name: str) -> None:
    """Weights, masks, deltas, scores and texts to the bit, and the same files."""
    found = case(faults, name)
    assert not any(found["resumed"]["codes"]), found["resumed"]["log"]
    assert found["different"] == []


@pytest.mark.parametrize("name", tiers(OTHERS))
def test_a_killed_run_goes_on_with_other_ranks_stages_and_placements(faults: Faults, name: str) -> None:
    found = case(faults, name)
    assert not any(found["resumed"]["codes"]), found["resumed"]["log"]
    assert found["moved"] > 0.01
    assert found["error"] <= 1e-5 * found["moved"]
    assert found["untouched"]
    assert found["tree"] == []
