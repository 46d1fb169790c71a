"""Runs of launch/train.py's work on several ranks, forked from one process that has paid for the imports.

Every rank is a process of its own, started by fork, joined through a file, and killed with a real SIGKILL: at a moment
of the clock, or as the rank is about to make its n-th change in the run's folder.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from support.hosts import INTERFACE, Host

NUM_RANKS = 2
LIFE_SECONDS = 300.0

# Audit events of changes to files; safetensors writes in Rust, unseen, but between an "open" and a rename of ours.
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


@dataclass(frozen=True)
class Kill:
    """When a life ends.

    Attributes:
        rank: who dies first; the others follow, as a launcher would have it.
        seconds: after this time; or
        change: as it is about to make this change in the run's folder, counted from 0; or
        when: as soon as this pattern of paths below the run's folder is matched.
        linger: seconds that the others live on.
    """

    rank: int
    seconds: float | None = None
    change: int | None = None
    when: str | None = None
    linger: float = 0.0


@dataclass(frozen=True)
class Life:
    """One start of a run.

    Attributes:
        codes: exit code of every rank, negative for signals.
        seconds: wall time.
        changes: that rank 0 made in the run's folder; 0 where it was killed.
        log: what the ranks printed.
    """

    codes: list[int]
    seconds: float
    changes: int
    log: str

    @property
    def finished(self) -> bool:
        return not any(self.codes)


def live(
    flags: list[str],
    kill: Kill | None = None,
    signum: int | None = None,
    num_ranks: int = NUM_RANKS,
    of_rank: dict[int, list[str]] | None = None,
    port: int | None = None,
    hosts: Sequence[Host] = (),
) -> Life:
    """Start a run and wait for its end.

    Args:
        flags: of launch/train.py; --output_dir is looked for among them.
        kill: when to end it.
        signum: sent instead of SIGKILL, to kill.rank alone, and nobody else is ended then.
        of_rank: more flags for some ranks.
        port: the ranks meet there as a launcher's do, instead of in a file.
        hosts: of the ranks, one each; with a port.
    """
    place = Path(tempfile.mkdtemp(prefix="piece-life-"))
    begin = time.monotonic()
    children = [
        _fork(rank, num_ranks, [*flags, *(of_rank or {}).get(rank, [])], place, kill, port, hosts)
        for rank in range(num_ranks)
    ]
    folder = Path(flags[flags.index("--output_dir") + 1]).resolve()
    codes = _watch(children, begin, folder, kill, signum)
    log = "".join(path.read_text(errors="replace") for path in sorted(place.glob("rank*.log")))
    counted = place / "changes"
    life = Life(codes, time.monotonic() - begin, int(counted.read_text()) if counted.exists() else 0, log)
    shutil.rmtree(place)
    return life


def random_kill(rng: random.Random, num_ranks: int, seconds: float, changes: int) -> Kill:
    """Half of them by the clock, half by the change about to be made; of one rank, or of all at once."""
    rank, linger = rng.randrange(num_ranks), rng.choice([0.0, 0.3])
    if rng.random() < 0.5:
        return Kill(rank, seconds=rng.uniform(0.0, seconds), linger=linger)
    return Kill(
        rank, change=rng.randrange(changes) if rank == 0 else rng.randrange(max(1, changes // 4)), linger=linger
    )


def _watch(children: list[int], begin: float, folder: Path, kill: Kill | None, signum: int | None) -> list[int]:
    """Exit codes, once all have ended; kills as asked, and everyone after the first death that was not a success."""
    codes: dict[int, int] = {}
    end_others: float | None = None
    sent = False
    while len(codes) < len(children):
        now = time.monotonic()
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] and signum is None:
                        end_others = end_others or now + (kill.linger if kill else 5.0)
        if kill and not sent and _is_time(kill, now - begin, folder):
            sent = True
            if children[kill.rank] not in codes:
                os.kill(children[kill.rank], signum or signal.SIGKILL)
        if (end_others is not None and now >= end_others) or now - begin > LIFE_SECONDS:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002 if kill and kill.when is None else 0.01)
    return [codes[child] for child in children]


def _is_time(kill: Kill, seconds: float, folder: Path) -> bool:
    if kill.when is not None:
        return any(folder.glob(kill.when))
    return kill.seconds is not None and seconds >= kill.seconds


def _fork(
    rank: int,
    num_ranks: int,
    flags: list[str],
    place: Path,
    kill: Kill | None,
    port: int | None,
    hosts: Sequence[Host],
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        if hosts:
            hosts[rank].enter()
            os.environ |= {"GLOO_SOCKET_IFNAME": INTERFACE}
        _be_rank(rank, num_ranks, flags, place, kill, hosts[0].address if hosts else "127.0.0.1", port)
    return pid


def _be_rank(
    rank: int, num_ranks: int, flags: list[str], place: Path, kill: Kill | None, first: str, port: int | None
) -> NoReturn:
    """In the child: run to the end, leave with the launch script's exit code."""
    code = 1
    try:
        log = os.open(place / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_SIZE": str(num_ranks),
            "MASTER_ADDR": first,
            "MASTER_PORT": str(port or 29999),
        }
        folder = Path(flags[flags.index("--output_dir") + 1]).resolve()
        count = _count_changes(folder, kill.change if kill and kill.rank == rank else None)
        code = _train(rank, num_ranks, flags, place if port is None else None)
        if rank == 0:
            (place / "changes").write_text(str(count[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(rank: int, num_ranks: int, flags: list[str], place: Path | None) -> int:
    import torch.distributed as dist

    from piece_ds.cli.train import main
    from piece_ds.runtime.process import exit_code, start_distributed

    if place is not None:
        store = f"file://{place / 'rendezvous'}"
        dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=num_ranks)
        start_distributed()
    code = exit_code(main, flags)
    if code == 0:
        dist.barrier()
    return code


def _count_changes(folder: Path, last: int | None) -> list[int]:
    """Counts this process's changes below folder from now on; the one numbered `last` is its end."""
    count = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not _writes(arguments):
            return
        if os.path.abspath(os.fspath(arguments[0])).startswith(str(folder)):
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(watch)
    return count


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )
