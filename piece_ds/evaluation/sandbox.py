"""Try whether a program passes its tests, isolated from the tests and from everything else.

The program runs in a process that can only compute and answer calls (isolated/program.py). The tests run in another
process, which holds them (isolated/judge.py). This module starts the judge, waits for its exit code, and kills both if
they take too long. Both die with this process, however it ends. Nothing is written to disk.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from piece_ds.evaluation.isolated.judge import START_SECONDS
from piece_ds.runtime.errors import UserError

TIMEOUT_SECONDS = 5.0  # what the method's authors allow a HumanEval problem
MEMORY_BYTES = 1 << 30
_JUDGE = Path(__file__).parent / "isolated" / "judge.py"
_KEPT = ("LD_LIBRARY_PATH", "PATH")  # all that the judge gets of the environment, which may hold secrets


@dataclass(frozen=True)
class Submission:
    """A program and the tests it has to pass.

    Attributes:
        program: Python source that nobody has read. It defines `function`.
        function: name of the function that is called.
        test: source that defines check(candidate), which raises if candidate is wrong.
        setup: source of helpers that test uses; it runs beside the tests.
    """

    program: str
    function: str
    test: str
    setup: str = ""


def passes(submission: Submission, timeout_seconds: float = TIMEOUT_SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Return whether the program runs without an exception and its function passes the tests.

    Arguments and results must be of builtin types (numbers, texts, bytes, lists, tuples, sets, dicts) or Fractions. Any
    other result fails. What the program prints is discarded.

    Args:
        submission: program and tests.
        timeout_seconds: wall time of the program and its calls, without the start of interpreters.
        memory_bytes: the program's address space.
    Cost: two interpreters, about 0.3 s.
    """
    job = {**asdict(submission), "timeout_seconds": timeout_seconds, "memory_bytes": memory_bytes}

    # A session of its own, so that judge and program can be killed together.
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(_JUDGE), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(job).encode() + b"\n", 2 * START_SECONDS + timeout_seconds)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the program's process is of the same group
            process.wait()
    return process.returncode == 0


def check_sandbox() -> None:
    """Raise UserError unless this machine runs a harmless program and stops harmful ones."""
    check = "def check(candidate):\n    assert candidate() == 'stopped'\n"
    harmless = "import math, re, hashlib\ndef run():\n    return 'stopped' if math.sqrt(4) == 2 else ''\n"
    if not passes(Submission(harmless, "run", check)):
        raise UserError(
            "--humaneval: generated code cannot be run shut off on this machine (it takes Linux with "
            "seccomp on x86_64 or aarch64); leave the flag out"
        )
    # A kernel may accept the filter and not enforce it: try what must fail.
    for harmful in _HARMFUL:
        program = f"def run():\n    try:\n        {harmful}\n    except OSError:\n        return 'stopped'\n"
        if not passes(Submission(program, "run", check)):
            raise UserError(f"--humaneval: this machine's kernel did not stop {harmful!r}; leave the flag out")


_HARMFUL = (
    "import socket; socket.socket()",
    "open('file', 'w')",
    "open('/etc/passwd')",
    "import os; os.stat('/')",
    "import os; os.fork()",
    "import os; os.kill(os.getppid(), 0)",
)
