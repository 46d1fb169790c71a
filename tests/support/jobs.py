"""Jobs of several ranks: one process group runs many cases, because starting one costs seconds."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from piece_ds.runtime.process import start_distributed
from support.rank_server import RankServer

TESTS = Path(__file__).parents[1]
TIMEOUT_SECONDS = 1800

Results = dict[str, dict[str, Any]]
Job = Callable[..., Results]


def run_job(module: str, num_ranks: int, folder: Path, *arguments: str) -> Results:
    """Run `python -m module folder arguments...` on num_ranks ranks and return what rank 0 saved.

    A job that fails or hangs fails every test that reads it, with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = _servers(num_ranks)
    try:
        for rank, server in enumerate(ranks):
            # accelerate wants the address and port set; nobody connects.
            own = {"WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            own["LOCAL_SIZE"] = str(num_ranks)  # as the launcher does; else DeepSpeed asks numactl at every step
            server.start(module, [str(folder), *arguments], own, folder, folder / f"rank{rank}.log")
        codes = [server.wait(TIMEOUT_SECONDS) for server in ranks]
    finally:
        for server in ranks:
            server.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(num_ranks))
    assert not any(codes), f"{module} exited with {codes}:\n{logs}"
    return torch.load(folder / "results.pt", weights_only=False)


def run_alone(module: str, folder: Path, *arguments: str, seconds: float = TIMEOUT_SECONDS) -> None:
    """Run `python -m module folder arguments...` in folder, without a group; it may fork ranks of its own.

    Raise AssertionError, with the end of its output, unless it succeeds within some seconds.
    """
    (server,) = _servers(1)
    try:
        server.start(module, [str(folder), *arguments], {}, folder, folder / "job.log")
        code = server.wait(seconds)
    finally:
        server.kill()
    assert code == 0, (folder / "job.log").read_text(errors="replace")[-5000:]


_SERVERS: list[RankServer] = []


def _servers(num_ranks: int) -> list[RankServer]:
    """Return a server for each rank; those that an earlier job has started serve again."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "DS_ACCELERATOR": "cpu"}
    # The ninja that the launch scripts use: another one builds DeepSpeed's extension again.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    while len(_SERVERS) < num_ranks:
        _SERVERS.append(RankServer(environment))
        atexit.register(_SERVERS[-1].close)
    return _SERVERS[:num_ranks]


def start() -> Path:
    """In a job's process: join the group (through a file: no port to collide on); returns the job's folder."""
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # DeepSpeed refuses fp16 on a CPU for its speed; its arithmetic is there, and fp16 logic can be tested with it.
    get_accelerator().is_fp16_supported = lambda: True
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", store, timedelta(seconds=180), rank=rank, world_size=size)
    start_distributed()
    return folder


def finish(results: Results) -> None:
    """In a job's process: rank 0 saves its results; leave the group."""
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads abort a process that exits without it


def collect_case(results: Results, name: str, case: Callable[[], dict[str, Any]]) -> None:
    """Run one case; an exception becomes its result, so that one broken case fails one test."""
    try:
        results[name] = case()
    except Exception:
        results[name] = {"error": traceback.format_exc()}
        print(name, results[name]["error"], flush=True)


def result_of(results: Results, name: str) -> dict[str, Any]:
    """A case's result, in a test; fails with the case's own traceback."""
    result = results[name]
    assert "error" not in result, result["error"]
    return result
