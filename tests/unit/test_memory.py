"""Peak memory of a stretch of work: above what was held before, and forgotten when a new stretch begins."""

import pytest
import torch

from piece_ds.runtime.profiling import host_peak_bytes, reset_peaks


def test_host_peak_is_that_of_the_work_since_the_reset() -> None:
    if not reset_peaks():
        pytest.skip("this system does not let a process reset its peak memory")
    start = host_peak_bytes()
    assert start is not None
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    during = host_peak_bytes()
    assert during is not None
    assert during - start > 60 * 2**20
    del block
    assert reset_peaks()
    after = host_peak_bytes()
    assert after is not None
    assert after < during - 30 * 2**20
