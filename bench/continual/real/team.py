"""Processes that make runs of the grid side by side: who gets which run, what a failure and the end of time do."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench.continual.real.agenda import Agenda
from bench.continual.real.grid import Setting
from bench.continual.real.runs import add_run

FAILURES = "failures.txt"
READY = "ready"


@dataclass(frozen=True)
class Failed:
    """What a worker says instead of a row.

    Attributes:
        why: a traceback.
        is_usable: whether the worker can make other runs.
    """

    why: str
    is_usable: bool = False


@dataclass
class Worker:
    """A process that makes one run after another.

    Attributes:
        process: of multiprocessing.
        pipe: our end. The process says READY once, then a row or Failed for every setting that it is sent.
        is_ready: whether it can be sent a setting.
        setting: what it is making.
        begun: when that began, of time.monotonic().
    """

    process: Any
    pipe: Connection
    is_ready: bool = False
    setting: Setting | None = None
    begun: float = 0.0


class Team:
    """Workers, and what they have been given.

    Attributes:
        failed: keys of runs that failed.
        num_started: workers started so far.
    """

    def __init__(self, agenda: Agenda, start: Callable[[int], Worker], runs_file: Path, begin: float) -> None:
        """Plan; nothing starts yet.

        Args:
            agenda: the runs.
            start: number -> a new worker.
            runs_file: gets a row for each run; FAILURES is written beside it.
            begin: when the command began, of time.monotonic(). Times are counted from there.
        """
        self.failed: list[str] = []
        self._agenda, self._start, self._runs_file, self._begin = agenda, start, runs_file, begin
        self._workers: list[Worker] = []
        self._seconds: list[float] = []
        self._cut: list[str] = []
        self.num_started = 0

    def run(self, num_workers: int, seconds: float, grace: float) -> None:
        """Start workers, give them runs until the time is over or no run is left, and end them.

        Args:
            num_workers: processes side by side.
            seconds: after so many no run begins.
            grace: so many seconds later, runs that are not finished are ended.
        """
        last_begin = self._begin + seconds
        last_end = last_begin + grace
        try:
            for _ in range(min(num_workers, len(self._agenda.left))):
                self._add_worker()
            while self._workers and time.monotonic() < last_end:
                may_begin = time.monotonic() < last_begin
                if may_begin:
                    self._hand_out()
                is_busy = any(worker.setting for worker in self._workers)
                if not is_busy and not (may_begin and self._agenda.left):
                    break
                for pipe in wait([worker.pipe for worker in self._workers], timeout=0.5):
                    self._listen(next(worker for worker in self._workers if worker.pipe is pipe))
            self._cut = [_name(worker.setting) for worker in self._workers if worker.setting]
        finally:
            for worker in self._workers:
                _end(worker)

    def report(self) -> None:
        """Print what was made and how long it took."""
        made = sorted(self._seconds)
        print(f"{len(made)} runs made, {len(self.failed)} failed, {len(self._agenda.left)} not begun", flush=True)
        if made:
            middle = statistics.median(made)
            print(f"seconds of a run, side by side: {made[0]:.1f} to {made[-1]:.1f}, median {middle:.1f}", flush=True)
        if self._cut:
            print("cut by time: " + "; ".join(self._cut), flush=True)
        print(f"{time.monotonic() - self._begin:.0f} s in all", flush=True)

    def _add_worker(self) -> None:
        self._workers.append(self._start(self.num_started))
        self.num_started += 1

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.is_ready and worker.setting is None and (setting := self._agenda.begin()):
                worker.setting, worker.begun = setting, time.monotonic()
                worker.pipe.send(setting)

    def _listen(self, worker: Worker) -> None:
        """Take what a worker has sent, or that it has ended."""
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            said = Failed(f"the process ended by itself (exit code {worker.process.exitcode})")
        if said == READY:
            worker.is_ready = True
            self._say("a worker is ready")
            return
        setting, worker.setting = worker.setting, None
        if isinstance(said, Failed):
            self._fail(worker, setting, said)
            return
        assert setting is not None
        add_run(self._runs_file, said)  # only this process writes the file
        self._agenda.end(setting, is_made=True)
        self._seconds.append(time.monotonic() - worker.begun)
        shown = ", ".join(f"{name} {said[name]}" for name in ("learned", "rise", "kl"))
        self._say(f"{_name(setting)}: {shown}; {self._seconds[-1]:.1f} s")

    def _fail(self, worker: Worker, setting: Setting | None, said: Failed) -> None:
        """Write down a failure, and replace a worker that cannot be used, unless it could not even start."""
        of_what = _name(setting) if setting else "a worker without a run"
        path = self._runs_file.with_name(FAILURES)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"== {of_what}\n{said.why}\n")
        self._say(f"failed: {of_what} ({path})")
        self.failed.append(of_what)
        if setting:
            self._agenda.end(setting, is_made=False)
        if not said.is_usable:
            self._workers.remove(worker)
            _end(worker)
            if worker.is_ready and self._agenda.left:
                self._add_worker()

    def _say(self, what: str) -> None:
        print(f"{time.monotonic() - self._begin:.0f} s: {what}", flush=True)


def _end(worker: Worker) -> None:
    worker.process.kill()
    worker.process.join()


def _name(setting: Setting) -> str:
    return " ".join(setting.key)
