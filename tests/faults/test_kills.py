"""SIGKILL at random moments: nothing that was finished is lost, and the end is that of a run left alone."""

import os
from pathlib import Path

import pytest
from faults.conftest import run_faults

# make test-faults sets them: kills in all, and how long it may take.
NUM_KILLS = os.environ.get("PIECE_DS_KILLS", "6")
SEED = os.environ.get("PIECE_DS_SEED", "0")


@pytest.mark.slow
def test_streams_killed_at_random_end_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    found = run_faults("kill_job", tmp_path, NUM_KILLS, SEED, seconds=float(os.environ.get("PIECE_DS_SECONDS", 7200)))
    print(f"{found['kills']} kills, {found['runs']} streams, {found['seconds']:.0f} s, seed {SEED}")
    assert found["failed"] == []
    assert found["damaged"] == []
    assert found["different"] == []
    assert found["kills"] >= int(NUM_KILLS)
