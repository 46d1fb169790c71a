"""Run a program that nobody has read. It can compute, call what was imported before, and answer; nothing else.

judge.py starts this file as a script. It reads the program and says when it is ready. Then limits and filter are set.
Then the program is executed, and its function is called with whatever arguments arrive.
"""

import ast
import contextlib
import ctypes
import importlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

# No file can be opened later. So the modules that programs use, and those that these load on first use, are loaded now.
_MODULES = (
    "math cmath re string collections collections.abc itertools functools operator heapq bisect random statistics "
    "decimal fractions datetime calendar time copy typing types enum dataclasses abc contextlib hashlib hmac base64 "
    "binascii struct json textwrap unicodedata difflib array queue numbers zlib pprint warnings io sys os os.path ast "
    "inspect traceback keyword html urllib.parse locale _strptime zoneinfo secrets uuid builtins timeit weakref "
    "graphlib encodings.ascii encodings.latin_1 encodings.utf_16 encodings.utf_32 encodings.cp437 encodings.idna "
    "encodings.punycode encodings.hex_codec encodings.rot_13 encodings.unicode_escape encodings.raw_unicode_escape"
)
# Further modules are loaded if the program imports them: these, and the standard library except what acts on import.
_LIBRARIES = frozenset({"numpy", "scipy", "sympy", "regex", "networkx"})
_ACTING = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "ensurepip", "venv"})

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def set_limits(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit memory, processor time and core files, and forbid writing to files."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),  # answers go through a pipe
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    """Serve one program. Arguments: parent's process id, bytes of memory, seconds of processor time."""
    parent, memory_bytes, cpu_seconds = map(int, sys.argv[1:])
    die_with(parent)
    sys.path.insert(0, str(Path(__file__).parent))
    wire, kernel = importlib.import_module("wire"), importlib.import_module("filter")
    del sys.path[0]

    # The program's own descriptors 0 to 2 lead nowhere. Questions and answers use others.
    questions, answers = os.dup(0), os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    os.close(silence)
    receiver = wire.Receiver(questions)
    source, function = receiver.receive()
    _import_before(source)
    wire.send(answers, "ready")

    # From here on the program's code runs.
    set_limits(memory_bytes, cpu_seconds)
    kernel.allow_only_computing()
    _serve(wire, receiver, answers, _execute(source), function)


def _import_before(source: str) -> None:
    """Import the usual modules, and those that the program names."""
    named = set(_MODULES.split())
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(named):
        top = name.partition(".")[0]
        if top in _LIBRARIES or (top in sys.stdlib_module_names and top not in _ACTING):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _execute(source: str) -> dict[str, Any] | None:
    """Return the program's names; None if it does not run to its end."""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(source, "<program>", "exec"), names)
    except BaseException:  # SystemExit among them
        return None
    return names


def _serve(wire: Any, receiver: Any, answers: int, names: dict[str, Any] | None, function: str) -> None:
    """Send the result of each call: [True, value] or [False, reason]."""
    wire.send(answers, [names is not None and callable(names.get(function)), "loaded"])
    while names is not None:
        arguments, keywords = (wire.decode(part) for part in receiver.receive())
        try:
            answer = [True, wire.encode(names[function](*arguments, **keywords))]
        except BaseException as error:
            answer = [False, type(error).__name__]
        wire.send(answers, answer)


if __name__ == "__main__":
    main()
