"""Signals that ask a run to end. All ranks act on them at the same point of the run.

SIGTERM, SIGUSR1 or SIGINT on any rank is only noted when it comes. At points that every rank passes (the end of an
optimizer step, a round of statistics, a batch of an evaluation), the ranks agree whether one of them has noted a
signal.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from piece_ds.runtime.distributed import all_reduce_max_, collective_device, world_size
from piece_ds.runtime.rank_status import report_status

# EX_TEMPFAIL of sysexits.h: no failure, try again later. No shell, launcher or kernel uses it for anything else.
STOP_CODE = 75

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(Exception):
    """The run ended because a signal asked for it, at a point from which it can resume. The message says where."""


class _Notice:
    """What this process has noted.

    Attributes:
        heeding: signals are noted instead of ending the process, on all ranks.
        signum: first signal noted here; 0 if there is none.
        agreed: all ranks know of a signal.
        deferred: exit_if_signalled() leaves it to a later point.
    """

    heeding = False
    signum = 0
    agreed = False
    deferred = False


@contextmanager
def signal_handling() -> Iterator[None]:
    """Note SIGNALS inside instead of ending the process; call it on every rank, in the main thread.

    A second SIGINT ends its process.
    """
    _Notice.heeding, _Notice.signum, _Notice.agreed = True, 0, False  # first: a signal may follow its handler at once
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        _Notice.heeding = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exits_deferred() -> Iterator[None]:
    """Let exit_if_signalled() pass inside: an evaluation in the middle of training ends at a step with a checkpoint."""
    before, _Notice.deferred = _Notice.deferred, True
    try:
        yield
    finally:
        _Notice.deferred = before


def _note(signum: int, frame: Any) -> None:
    _Notice.signum = _Notice.signum or signum
    # A second Ctrl-C must work even if the run never reaches a point where ranks agree.
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_asked() -> bool:
    """Return whether any rank has noted a signal. All ranks get the same answer. A collective of one number.

    Outside signal_handling() it is False, without communication.
    """
    if _Notice.heeding and not _Notice.agreed:
        number = _largest_of_ranks(_Notice.signum)
        # If there is none, a signal that came while this rank waited for the others stays noted for the next time.
        if number:
            _Notice.signum, _Notice.agreed = number, True
    return _Notice.heeding and _Notice.agreed


def _largest_of_ranks(number: int) -> int:
    """Return the largest of all ranks' numbers. A single rank asks nobody, and does not wait for its device."""
    if world_size() == 1:
        return number
    return int(all_reduce_max_(torch.tensor([number], device=collective_device())))


def exit_if_signalled(where: str) -> None:
    """Raise Preempted, on all ranks, if stop_asked(). A collective, except inside exits_deferred(), where it passes.

    Args:
        where: what the run was doing, for the message.
    """
    report_status(where)
    if not _Notice.deferred and stop_asked():
        raise Preempted(f"stopped by {signal.Signals(_Notice.signum).name} {where}")
