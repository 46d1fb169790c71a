"""A process that has imported what every job of several ranks needs, and forks one rank of each.

Imports take a job's rank six seconds, most of what many jobs take at all. Every rank number has a server of its own, so
that the ranks of a job differ as those of a launcher do: in what Python hashes text to, for one.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.garbage import freeze_imports

# What ZeRO-3, the scores and the figures of a run import when they are first used: three seconds a rank.
_LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "rouge_score.rouge_scorer", "piece_ds.report.style")

# A server answers for the first time when it has imported; a busy machine takes long over that.
_IMPORT_SECONDS = 600


class RankServer:
    """The client's side: starts the server, and asks it for one rank at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start the server; it imports while the caller goes on.

        Args:
            environment: of the server, and of its ranks beside what start() gives.
        """
        reads, writes = os.pipe()
        command = [sys.executable, "-c", f"from support.rank_server import serve; serve({writes})"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=(writes,))
        os.close(writes)
        self._answers = os.fdopen(reads, "rb", buffering=0)
        self._rank = 0

    def start(self, module: str, arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        """Fork a rank that runs module with arguments in folder; its output goes to log."""
        task = {
            "module": module,
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder),
            "log": str(log),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(task).encode() + b"\n")
        self._server.stdin.flush()
        self._rank = int(self._line(_IMPORT_SECONDS))

    def wait(self, seconds: float) -> int:
        """Return the exit code of the rank, as subprocess has it. Raise TimeoutError after some seconds."""
        code = int(self._line(seconds))
        self._rank = 0
        return code

    def kill(self) -> None:
        """End the rank, if one runs."""
        if self._rank:
            os.kill(self._rank, 9)
            self.wait(60)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _line(self, seconds: float) -> bytes:
        if not select.select([self._answers], [], [], seconds)[0]:
            raise TimeoutError(f"the rank did not answer within {seconds:g} s")
        line = b""
        while not line.endswith(b"\n"):
            part = self._answers.read(1)
            assert part, "the rank server has ended"
            line += part
        return line


def serve(writes: int) -> None:
    """Fork a rank for each line of stdin; write its process number, then its exit code. End with stdin."""
    gc.disable()
    import accelerate
    import datasets
    import deepspeed
    import peft
    import transformers

    import piece_ds.cli.train

    for name in _LATE:
        with suppress(ImportError):
            importlib.import_module(name)
    del accelerate, datasets, deepspeed, peft, transformers, piece_ds
    freeze_imports()
    gc.enable()
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            os.close(writes)
            _become(json.loads(line))
            return
        os.write(writes, f"{child}\n".encode())
        status = os.waitpid(child, 0)[1]
        os.write(writes, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(task: dict[str, Any]) -> None:
    """Be the rank: its streams, environment, folder and command line; then run the module and end as Python ends."""
    # Streams.
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)

    # What `python -m module` would see.
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    sys.argv = [task["module"], *task["arguments"]]
    runpy.run_module(task["module"], run_name="__main__", alter_sys=True)
