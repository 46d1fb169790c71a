"""Whether a program runs to its end, tried in a process of its own without network, files to write or much else.

The limits are those of guard.py, which the kernel holds; this side starts it, waits, and kills what runs too long.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from math import ceil
from pathlib import Path

from piece_ds.runtime.errors import UserError

TIMEOUT_SECONDS = 5.0  # what the method's authors allow a HumanEval problem
MEMORY_BYTES = 1 << 30
_GUARD = Path(__file__).with_name("guard.py")


def runs_to_its_end(program: str, timeout_seconds: float = TIMEOUT_SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether program ends without an exception, an exit, a crash or a broken limit. What it prints is thrown away.

    Args:
        program: Python source.
        timeout_seconds: wall time, the start of an interpreter included.
        memory_bytes: address space.
    Cost: one interpreter and one temporary file.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "program", "w+b") as source:
        source.write(f"{token}\n{program}".encode(errors="replace"))
        source.seek(0)
        command = [sys.executable, "-I", "-B", str(_GUARD), str(memory_bytes), str(ceil(timeout_seconds) + 1)]
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as answer:
            try:
                process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return False
            return process.returncode == 0 and answer.read(len(token)).decode(errors="replace") == token


def check_sandbox() -> None:
    """Raise UserError unless this machine runs a harmless program and stops harmful ones."""
    if not runs_to_its_end("import math, re, hashlib\nassert math.sqrt(4) == 2"):
        raise UserError(
            "--humaneval: generated code cannot be run shut off on this machine (it takes Linux with "
            "seccomp on x86_64 or aarch64); leave the flag out"
        )
    for harmful in _HARMFUL:
        if runs_to_its_end(harmful):
            raise UserError(f"--humaneval: this machine's kernel did not stop {harmful!r}; leave the flag out")


_HARMFUL = (
    "import socket\nsocket.socket()",
    "open('file', 'w')",
    "import os\nos.fork()",
    "import os\nos.kill(os.getppid(), 0)",
    "import sys\nsys.exit(0)",
)
