"""A collective that fails says why: which ranks did not come, and where they were last seen."""

import re
import time

import pytest
import torch.distributed as dist
from support.ranks import on_ranks

from piece_ds.runtime import rank_status


def test_errors_of_a_group_are_told_apart_from_all_others() -> None:
    """gloo's errors name one of its source files; other errors may say the same words."""
    place = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "
    for text, late, gone in (
        ("Timed out waiting 1800000ms for recv operation to complete", True, False),
        ("Watchdog caught collective operation timeout", True, False),
        ("Connection closed by peer [127.0.0.1]:4242", False, True),
        ("Read error [127.0.0.1]: Connection reset by peer", False, True),
        ("connect: Connection refused", False, True),
        ("writev: Broken pipe", False, True),
        ("Socket closed", False, True),
        ("NCCL: remote process exited or there was a network error", False, True),
        ("Invalid argument", False, False),
    ):
        for error in (RuntimeError(place + text), dist.DistBackendError(text), dist.DistNetworkError(text)):
            assert (rank_status.is_late(error), rank_status.is_gone(error)) == (late, gone), text
        for error in (RuntimeError(text), ValueError(place + text), OSError(text)):
            assert not rank_status.is_late(error)
            assert not rank_status.is_gone(error)


def test_ranks_that_wait_name_the_one_that_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_status, "GRACE_SECONDS", 0.5)

    def absent() -> str:
        """Rank 1 has reported a place; rank 2 nothing; rank 0 waits for both."""
        if dist.get_rank() == 1:
            rank_status.report_status("step 3")
        dist.barrier()
        rank_status.report_status("step 4") if dist.get_rank() == 0 else None
        said = rank_status.missing_ranks() if dist.get_rank() == 0 else ""
        dist.barrier()
        return said

    assert re.fullmatch(
        r"rank 0 has waited in vain at step 4: rank 1 was last seen at step 3, \d+ s ago; "
        r"rank 2 was last seen at its start",
        on_ranks(3, absent)[0],
    )

    def apart() -> str:
        """All wait, at different places: the one furthest behind is named."""
        for step in range(1 + (dist.get_rank() != 1)):
            rank_status.report_status(f"step {step}")
        dist.barrier()
        return rank_status.missing_ranks()

    for rank, said in enumerate(on_ranks(3, apart)):
        own = 0 if rank == 1 else 1
        shown = rf"rank {rank} has waited in vain at step {own}: rank 1 was last seen at step 0, \d+ s ago"
        assert re.fullmatch(shown, said)


def test_the_first_rank_that_claims_something_is_told_apart() -> None:
    def claims() -> list[int]:
        return [rank_status.claim("a"), rank_status.claim("b")]

    both = on_ranks(2, claims)
    assert sorted(a for a, _ in both) == sorted(b for _, b in both) == [1, 2]
    assert [rank_status.claim("a"), rank_status.claim("a")] == [1, 1]  # a process alone
    begun = time.monotonic()
    rank_status.report_status("anywhere")
    assert time.monotonic() - begun < 1
