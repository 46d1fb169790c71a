"""A stream about images goes on after a kill as a stream of texts does."""

from pathlib import Path

import pytest
from faults.conftest import run_faults


@pytest.mark.slow
def test_a_killed_stream_about_images_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    """Qwen3-VL, compact mode, ZeRO-3, 2 ranks: weights, masks, deltas, scores and texts to the bit."""
    found = run_faults("vision_kill_job", tmp_path)
    assert found["codes"]["whole"] == found["codes"]["resumed"] == [0, 0], found["log"]
    assert -9 in found["codes"]["killed"]
    assert found["different"] == []
