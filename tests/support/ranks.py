"""Ranks of one gloo group as forks of the test's own process: what needs two owners, without a launcher's start-up."""

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 240.0  # on a machine that has run nothing yet, DeepSpeed compiles first


def on_ranks(num_ranks: int, work: Callable[[], Any]) -> list[Any]:
    """Return what work() returns on each of num_ranks ranks, in rank order.

    Args:
        num_ranks: processes, each forked from this one; what it imported is there.
        work: called without arguments once the default group exists; its result is pickled.
    Raises:
        AssertionError: a rank failed, with its traceback, or did not end within TIMEOUT_SECONDS.
    Cost: about a tenth of a second a rank.
    """
    # A group of one that an earlier test has left; a fork would inherit it without its threads.
    if dist.is_initialized():
        _leave_group()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, num_ranks, work, Path(folder)) for rank in range(num_ranks)]
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for child in children:
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    for other in children:
                        os.kill(other, signal.SIGKILL)
                    raise AssertionError(f"ranks did not end within {TIMEOUT_SECONDS:g} s")
                time.sleep(0.005)
        results = [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(num_ranks)]
    failed = [text for text, _ in results if text]
    assert not failed, failed[0]
    return [value for _, value in results]


def _leave_group() -> None:
    """Leave the default group. DeepSpeed's own way drops the groups that it keeps, which a later engine would use."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def _fork(rank: int, num_ranks: int, work: Callable[[], Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    problem, value = "", None
    try:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(num_ranks)}  # as launchers do, for DeepSpeed
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        store = dist.FileStore(str(folder / "store"), num_ranks)
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        value = work()
    except BaseException:
        problem = traceback.format_exc()
    (folder / f"{rank}").write_bytes(pickle.dumps((problem, value)))
    os._exit(0)
