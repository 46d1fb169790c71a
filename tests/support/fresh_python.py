"""Python processes that have imported torch and DeepSpeed and nothing of piece_ds, without the seconds that it takes.

A server imports once; each process is a fork of it.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

# What the first build of a compiled provider imports.
_IMPORTS = ("torch.utils.cpp_extension", "deepspeed.ops.op_builder.cpu.builder")


class FreshPython:
    """One process, with what is needed of subprocess.Popen."""

    def __init__(self, server: "Server", pid: int, folder: Path) -> None:
        self.pid, self._server, self._folder = pid, server, folder

    def is_running(self) -> bool:
        return self._server.ask(poll=self.pid) is None

    def wait(self) -> tuple[int, str, str]:
        """Return (exit code, stdout, stderr) at its end."""
        code = self._server.ask(wait=self.pid)
        return code, *((self._folder / name).read_text(encoding="utf-8") for name in ("out", "err"))


class Server:
    """The client's side. close() ends the server."""

    def __init__(self, folder: Path) -> None:
        """Start it; folder is empty, and for the output of its processes."""
        self._folder, self._number = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from support.fresh_python import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def start(self, code: str, environment: dict[str, str], without: tuple[str, ...] = ()) -> FreshPython:
        """Return a process that runs code.

        Args:
            code: of Python.
            environment: all of it.
            without: packages that the process has not imported yet.
        """
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        pid = self.ask(code=code, environment=environment, without=without, folder=str(folder))
        return FreshPython(self, pid, folder)

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Answer the client's questions, a line each; end with stdin."""
    import importlib

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports say is no answer
    for name in _IMPORTS:
        importlib.import_module(name)
    codes: dict[int, int] = {}

    def ended(pid: int, options: int) -> int | None:
        if pid not in codes:
            found, status = os.waitpid(pid, options)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        return codes.get(pid)

    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            print(json.dumps(ended(question["poll"], os.WNOHANG)), file=answers)
        elif "wait" in question:
            print(json.dumps(ended(question["wait"], 0)), file=answers)
        elif child := os.fork():
            print(child, file=answers)
        else:
            answers.close()
            _become(question)


def _become(question: dict[str, Any]) -> None:
    """Be a new process that runs the code; never return."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{question['folder']}/{name}", os.O_WRONLY | os.O_CREAT, 0o644), stream)
    os.environ.clear()
    os.environ.update(question["environment"])
    for name in [name for name in sys.modules if name.partition(".")[0] in question["without"]]:
        del sys.modules[name]

    # As Python ends: what the code raises goes to stderr.
    code = 0
    try:
        exec(question["code"], {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
