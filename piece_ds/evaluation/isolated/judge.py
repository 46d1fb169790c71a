"""Hold a problem's tests and call a program's function from them: exit code 0 if they pass, 1 if not.

sandbox.py starts this file as a script. The tests are the benchmark's and are trusted. The function that they call is a
stand-in, which asks the program's process. The answer is built only from builtin types. So no object of the program
takes part in a comparison.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# All that the program gets of the environment. A path would tell where other things lie.
_KEPT = ("LD_LIBRARY_PATH", "OPENBLAS_NUM_THREADS")
START_SECONDS = 60.0  # two interpreters and their modules, on a machine with other work


class Failed(BaseException):
    """The program answered no value. It is not an Exception, so no test catches it."""


def main() -> None:
    """Judge one program. The job comes on standard input; the argument is the parent's process id."""
    sys.path.insert(0, str(Path(__file__).parent))
    wire, program = importlib.import_module("wire"), importlib.import_module("program")
    program.die_with(int(sys.argv[1]))
    job = wire.Receiver(0).receive()
    # Values are bounded, but a program can make comparing them slow or large.
    program.set_limits(max(2 << 30, job["memory_bytes"]), int(job["timeout_seconds"]) + 30)
    try:
        is_right = _judge(wire, job)
    except BaseException:  # an assertion of the tests, too deep or too large a value, no answer in time
        is_right = False
    os._exit(0 if is_right else 1)


def _judge(wire: Any, job: dict[str, Any]) -> bool:
    """Return whether the tests pass."""
    command = [sys.executable, "-I", "-B", str(Path(__file__).with_name("program.py")), str(os.getpid())]
    limits = [str(job["memory_bytes"]), str(int(job["timeout_seconds"]) + 2)]

    # Start the program's process, with limits of its own.
    process = subprocess.Popen(
        [*command, *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name in _KEPT},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    questions, receiver = process.stdin.fileno(), wire.Receiver(process.stdout.fileno())
    try:
        wire.send(questions, [job["program"], job["function"]])
        if receiver.receive(time.monotonic() + START_SECONDS) != "ready":
            return False

        # From here on the program's own time counts. It must load before it is called.
        deadline = time.monotonic() + job["timeout_seconds"]
        if receiver.receive(deadline) != [True, "loaded"]:
            return False

        def candidate(*arguments: Any, **keywords: Any) -> Any:
            try:
                wire.send(questions, [wire.encode(arguments), wire.encode(keywords)])
                is_value, value = receiver.receive(deadline)
                if is_value is True:
                    return wire.decode(value)
            except Exception as error:
                raise Failed(str(error)) from None
            raise Failed("the program raised an exception")

        # The tests use helpers from the problem's own source. The function in that source is a stub.
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["setup"], "<problem>", "exec"), names)
        names[job["function"]] = candidate
        exec(compile(job["test"], "<tests>", "exec"), names)
        names["check"](candidate)
        return time.monotonic() <= deadline
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
