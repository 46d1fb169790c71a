"""Statistics of weights that several blocks use, under every way of checkpointing and stage; masked steps of them."""

from pathlib import Path

import pytest
from support.jobs import run_job


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_statistics_count_every_use_and_masked_steps_are_right_or_refused(tmp_path: Path, num_ranks: int) -> None:
    results = run_job("support.second_uses_job", num_ranks, tmp_path)
    assert len(results) == 45
    for name, case in results.items():
        assert case["worst"] < 1e-4, f"{name}: {case['of']} is off by {case['worst']:.2%}"
        in_parts = ", reentrant" in name and not name.endswith("stage 0")
        assert bool(case["refusal"]) == in_parts, f"{name}: {case['refusal']!r}"
        assert not in_parts or "use non-reentrant checkpointing" in case["refusal"]
        if in_parts and "zamba2" not in name:
            assert "'uses.blocks.0." in case["refusal"]
