"""The self-test: local processes join a group as a launcher's would, try collectives, and train a tiny model."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from piece_ds.doctor.findings import BAD, GOOD, Finding

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TIMEOUT_SECONDS = 300.0  # a new machine compiles
GRACE_SECONDS = 5.0  # for the others to end by themselves once one has failed
_WHAT = "collectives", "statistics, mask, step"


def run_self_test(num_ranks: int) -> Iterator[Finding]:
    """Yield a finding for the collectives, one for the tiny run, and one for the time taken.

    Cost: about ten seconds, mostly imports. A new machine also compiles what DeepSpeed needs.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="piece-doctor-") as folder:
        # Hosted here from now on. A port that rank 0 opens after its imports can be another process's by then.
        meeting = _meeting_place(num_ranks)
        processes = [_start(rank, num_ranks, meeting.port, Path(folder)) for rank in range(num_ranks)]
        codes = _wait(processes, begin + TIMEOUT_SECONDS)
        result, said = Path(folder) / "result.json", _last_words(Path(folder), codes)
        found = json.loads(result.read_text()) if result.exists() else {}
    for what in _WHAT:
        if what in found:
            yield Finding(what, found[what]["status"], found[what]["found"])
        else:
            yield Finding(what, BAD, f"{num_ranks} processes ended with {codes}: {said}")
    yield Finding("self-test", GOOD if not any(codes) else BAD, f"{time.monotonic() - begin:.0f} s")


def _start(rank: int, num_ranks: int, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    package = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank joins at that port, and none opens it
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    # Local processes must not fight for the cores.
    environment.setdefault("OMP_NUM_THREADS", "1")
    with open(folder / f"rank{rank}.log", "wb") as log:
        command = [sys.executable, "-m", "piece_ds.doctor.probe", str(folder / "result.json")]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _meeting_place(num_ranks: int) -> "TCPStore":
    """Return the store that the processes meet at, on a free port, for as long as it is referred to."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)


def _wait(processes: "list[subprocess.Popen[bytes]]", deadline: float) -> list[int]:
    """Return exit codes. Kill processes that take too long, or that wait for one that failed."""
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        # A non-zero code; the others may wait for that process forever.
        if any(process.poll() for process in processes):
            failed_at = failed_at or now
        if now > deadline or (failed_at is not None and now > failed_at + GRACE_SECONDS):
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return [process.wait() for process in processes]


def _last_words(folder: Path, codes: list[int]) -> str:
    """Return the last line of the first process that failed by itself, or else of any process that was killed."""
    # A positive code is the process's own; a negative one is a signal, probably ours.
    failed = [rank for rank, code in enumerate(codes) if code > 0] or [rank for rank, code in enumerate(codes) if code]
    for rank in failed:
        lines = (folder / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
        if lines:
            return f"rank {rank}: {lines[-1].strip()[:300]}"
    return "nothing was said" if failed else ""
