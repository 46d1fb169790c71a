"""The study on several devices and in several processes: what is made first, what waits, which row counts."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from bench.continual.real import summary
from bench.continual.real.agenda import CHECKS, CURVES, Agenda, claims_first
from bench.continual.real.grid import SWEEPS, TASKS, Setting, settings_in_order
from bench.continual.real.runs import Record, add_run, each_once, files_of_devices, made_twice, read_runs
from bench.continual.real.team import FAILURES, READY, Failed, Team, Worker

A, B, C = settings_in_order(("FOMC",), (1,), ("full",))


def row(setting: Setting, device: str) -> Record:
    head = dict(zip(("name", "task", "rate", "seed"), setting.key, strict=True))
    numbers = {"learned_before": "7", "learned": "1", "rise": "0.1", "kl": "0.1", "delta_bytes": "0", "seconds": "1"}
    return {**head, **numbers, "device": device}


def test_checks_come_first_then_whole_curves_of_what_the_claims_are_about_then_the_rest_once() -> None:
    by_name = {sweep.name: sweep for sweep in SWEEPS}
    elsewhere = [s.key for s in settings_in_order(seeds=(1,), names=("full",))]
    found = claims_first(elsewhere=elsewhere)
    keys = [setting.key for setting in found]
    assert len(set(keys)) == len(keys)

    # A check is made although another device has made it; the other runs of that sweep and seed are not.
    assert [(s.sweep.name, s.task, s.rate, s.seed) for s in found[: len(CHECKS)]] == sorted(
        ((*check, 1) for check in CHECKS), key=lambda s: (TASKS.index(s[1]), list(by_name).index(s[0]))
    )
    of_full = sum(check[0] == "full" for check in CHECKS)
    assert len(keys) == len(settings_in_order()) - len(elsewhere) + of_full

    # Each sweep's curves are whole before the next begins.
    expected = [name for name in CURVES for _ in range(2 * len(TASKS) * len(by_name[name].rates))]
    curves = found[len(CHECKS) : len(CHECKS) + len(expected)]
    assert [s.sweep.name for s in curves] == expected
    assert {s.seed for s in curves} == {2, 3}


def test_a_run_waits_for_what_another_one_is_writing_and_later_ones_overtake_it() -> None:
    needs = {A: {"text", "a"}, B: {"text"}, C: set()}
    agenda = Agenda([A, B, C], needs.__getitem__, lambda name: False)
    assert [agenda.begin(), agenda.begin(), agenda.begin()] == [A, C, None]
    assert agenda.left == [B]
    agenda.end(A, is_made=True)
    assert agenda.begin() == B


def test_what_a_failed_run_should_have_written_is_written_by_one_other_run() -> None:
    agenda = Agenda([A, B, C], lambda setting: {"text"}, lambda name: False)
    assert [agenda.begin(), agenda.begin()] == [A, None]
    agenda.end(A, is_made=False)
    assert [agenda.begin(), agenda.begin()] == [B, None]
    agenda.end(B, is_made=True)
    assert agenda.begin() == C


def test_runs_begin_as_soon_as_what_they_need_is_there() -> None:
    there: set[str] = set()
    agenda = Agenda([A, B], lambda setting: {"text"}, there.__contains__)
    assert [agenda.begin(), agenda.begin()] == [A, None]
    there.add("text")
    assert agenda.begin() == B


def test_a_setting_made_on_two_devices_counts_once_from_the_device_with_more_of_the_curve() -> None:
    cpu, gpu = [row(s, "cpu") for s in (A, B)], [row(s, "gpu") for s in (A, B, C)]
    assert [run["device"] for run in each_once([cpu, gpu])] == ["gpu"] * 3
    assert [run["device"] for run in each_once([cpu, gpu[:2]])] == ["cpu"] * 2  # as many: the first
    assert [run["device"] for run in each_once([cpu, gpu[1:2]])] == ["cpu"] * 2
    assert [run["device"] for run in each_once([cpu[:1], gpu[1:]])] == ["cpu", "gpu", "gpu"]
    assert made_twice([cpu, gpu[1:]]) == [[cpu[1], gpu[1]]]


def test_the_page_shows_settings_of_two_devices_side_by_side_and_each_once_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, row(A, "cpu"))
    for setting in (A, B):
        add_run(tmp_path / "runs-gpu.csv", row(setting, "gpu"))
    devices = [read_runs(file) for file in files_of_devices(path)]
    page = summary.summary_page(each_once(devices), repeated=made_twice(devices))
    assert page.startswith("# Learned against lost")
    assert "\n2 of the " in page
    twice = page.split("## The same setting on several devices")[1].split("##")[0]
    assert twice.count("| full | FOMC | 3e-05 | 1 | cpu |") == twice.count("| full | FOMC | 3e-05 | 1 | gpu |") == 1
    assert twice.count("| full |") == 2
    assert "## The same setting" not in summary.summary_page(each_once(devices[:1]))


def test_runs_in_fp32_are_held_against_runs_in_fp32_alone() -> None:
    adapter = settings_in_order(("FOMC",), (1,), ("LoRA",))[0]
    in_bf16, in_fp32 = [row(A, "cpu")], [row(adapter, "cpu-fp32")]
    page = summary.summary_page(in_bf16, in_fp32=in_fp32)
    beside, own = page.split("## Each run beside")[1].split("## Every run")[0].split("## In fp32")
    assert "| LoRA |" not in beside.replace("| full | LoRA | full + KL |", "")
    assert "| FOMC | 1 | LoRA |" in own
    assert "and 1 in fp32" in page


class FakeProcess:
    """A thread in a process's place: it says what a list has for each setting that it is sent."""

    exitcode = 9

    def __init__(self, pipe: Connection, answer: Callable[[Setting], Any]) -> None:
        self._pipe, self._answer = pipe, answer
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        self._pipe.send(READY)
        with suppress(EOFError):  # the team is done
            while (said := self._answer(self._pipe.recv())) is not None:
                self._pipe.send(said)
        self._pipe.close()  # as a process that dies

    def kill(self) -> None:
        pass

    def join(self) -> None:
        pass


def team_of(tmp_path: Path, wanted: list[Setting], answer: Callable[[Setting], Any]) -> Team:
    def start(number: int) -> Worker:
        ours, theirs = Pipe()
        return Worker(FakeProcess(theirs, answer), ours)

    agenda = Agenda(wanted, lambda setting: set(), lambda name: False)
    return Team(agenda, start, tmp_path / "runs.csv", time.monotonic())


def test_a_failure_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    answers = {A: Failed("a traceback", is_usable=True), B: None, C: row(C, "gpu")}  # B's process dies
    team = team_of(tmp_path, [A, B, C], answers.__getitem__)
    team.run(num_workers=1, seconds=60, grace=0)
    assert team.failed == [" ".join(A.key), " ".join(B.key)]
    assert team.num_started == 2  # only the dead one was replaced
    assert read_runs(tmp_path / "runs.csv") == [row(C, "gpu")]
    text = (tmp_path / FAILURES).read_text()
    assert f"== {' '.join(A.key)}\na traceback" in text
    assert f"== {' '.join(B.key)}\nthe process ended by itself (exit code 9)" in text


def test_at_the_end_of_the_time_no_run_begins_and_what_still_runs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Setting] = []

    def never(setting: Setting) -> None:
        begun.append(setting)
        threading.Event().wait()

    team = team_of(tmp_path, [A, B], never)
    team.run(num_workers=1, seconds=0.3, grace=0.1)
    team.report()
    assert begun == [A]
    out = capsys.readouterr().out
    assert "0 runs made, 0 failed, 1 not begun" in out
    assert f"cut by time: {' '.join(A.key)}" in out
