"""Which engines of masked training the fast tests run: every stage, wrapper, offload and precision once or twice."""

from collections.abc import Iterable
from typing import Any

import pytest

from support.compact_cases import FAST
from support.undisturbed_cases import UNDISTURBED
from support.update_cases import CASES

# Compact cases are held against masked ones of the same name.
GATE = FAST | {
    "stage1",
    "stage2-offload",
    "stage2-overlap",
    "stage3-nothing-persistent",
    "stage3-offload-two-groups",
    "bf16-stage1-bf16-optimizer",
    "bf16-stage2",
    "bf16-stage3",
    "fp16-stage1",
}
GATE_UNDISTURBED = {
    "stage0",
    "stage1",
    "stage2",
    "stage3",
    "stage3-hpz",
    "bf16-stage1-bf16-optimizer",
    "bf16-stage3-fp32-accumulation",
    "bf16-stage3-offload-all",
    "fp16-stage2",
}
SLOW = {name for name in CASES if name not in GATE}
SLOW |= {f"undisturbed-{name}" for name in UNDISTURBED if name not in GATE_UNDISTURBED}


def tiers(names: Iterable[str], prefix: str = "") -> list[Any]:
    """Return names as parameters of a test; those of SLOW are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow if prefix + name in SLOW else ()) for name in names]


def update_results(job: Any, name: str) -> Any:
    """Return the results of the job that has a case: the fast one, or the slow one."""
    return job("update_job", 2, "slow") if name in SLOW else job("update_job", 2)
