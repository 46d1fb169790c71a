"""Forks of the test's own process: what needs another process, without the seconds that its imports would take."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], object], output: Path) -> int:
    """Run work() in a fork, whose stdout and stderr go to output; return its process number, for os.waitpid().

    The fork exits with 0, or with 1 if work raised, whose traceback output then holds.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        # pytest's own streams would be its parent's.
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
