"""Runs of the study's grid in several processes on one machine, for a number of seconds; resumable.

python bench/continual/real/side_by_side.py --runs_file CSV --workers 14 --seconds 120 [--made_elsewhere CSV] [...]

One run keeps neither a GPU nor 16 cores busy. Each worker imports once and makes many runs, through the product's own
path and in a scratch folder of its own. Statistics that several runs share are taken by the first that needs them;
those that wait for them leave their workers to other runs. At the end of the time no run begins, and what still runs
is ended a little later. A run that fails is named, with its traceback in failures.txt beside the rows, and does not
stop the others; a worker that an error has left without its GPU is replaced. Rows of each device belong in a file of
their own, results/runs-DEVICE.csv: summary.py says how they count beside others.
"""

import argparse
import gc
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from bench.continual.real.agenda import Agenda, claims_first
from bench.continual.real.grid import Setting
from bench.continual.real.recipe import SMOKE, Recipe
from bench.continual.real.run import flags_of, for_model, judged_before, model_folder, one_run, options_of, write_task
from bench.continual.real.runs import COLUMNS, Record, read_runs
from bench.continual.real.team import READY, Failed, Team, Worker
from bench.continual.real.texts import write_real_text
from piece_ds.checkpoint.statistics_file import has_statistics
from piece_ds.runtime.process import run_command

SELF_TEXT = "the text that the model writes itself"
_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "--workers": {"type": int, "default": 2, "help": "processes side by side"},
    "--seconds": {"type": float, "default": 1e9, "help": "begin no run after so many seconds"},
    "--grace": {"type": float, "default": 15.0, "help": "end what still runs so many seconds later"},
    "--scratch": {"type": Path, "help": "folder for the files of runs; default: that of --cache"},
    "--made_elsewhere": {"type": Path, "help": "rows of another device, which only checks and whole curves repeat"},
}


def main(argv: list[str]) -> None:
    """Make the runs that are not there yet, side by side, until the time is over."""
    # Imports are part of the time.
    begin = time.monotonic() - (time.time() - psutil.Process().create_time())
    options = options_of(argv, __doc__, _OWN_OPTIONS)
    options.scratch = options.scratch or options.cache
    recipe = SMOKE if options.smoke else Recipe()

    # Whatever all workers read is written before the first of them starts.
    options.cache.mkdir(parents=True, exist_ok=True)
    model = model_folder(options.model, options.cache)
    write_real_text(options.trace.parent / "general" / "lima.json", options.cache / "real.jsonl", recipe)
    for task in options.tasks:
        write_task(task, options, recipe)

    # What is left to do.
    wanted = wanted_of(options)
    agenda = Agenda(wanted, partial(shared_by, recipe=recipe, options=options), has_statistics)
    print(f"{len(wanted)} runs to make, after {time.monotonic() - begin:.0f} s", flush=True)
    team = Team(agenda, partial(start_worker, options, recipe, model), options.runs_file, begin)
    try:
        team.run(options.workers, options.seconds, options.grace)
    finally:
        for number in range(team.num_started):
            shutil.rmtree(_scratch(options, number), ignore_errors=True)
    team.report()
    if team.failed:
        sys.exit("failed: " + "; ".join(team.failed))


def wanted_of(options: argparse.Namespace) -> list[Setting]:
    """Return the runs to make, in their order.

    A row of --made_elsewhere stands for a run, unless the run is a check or one of a whole curve.
    """
    made = read_runs(options.made_elsewhere) if options.made_elsewhere else []
    elsewhere = {tuple(run[name] for name in COLUMNS) for run in made}
    done = {tuple(run[name] for name in COLUMNS) for run in read_runs(options.runs_file)}
    settings = for_model(claims_first(options.tasks, options.seeds, tuple(elsewhere)), options.model)
    return [s for s in settings if s.key not in done and (options.names is None or s.sweep.name in options.names)]


def shared_by(setting: Setting, recipe: Recipe, options: argparse.Namespace) -> set[str]:
    """Return what a run reads, and writes if it is not there: folders of statistics, and SELF_TEXT."""
    flags = flags_of(setting, recipe, options, Path(), Path(), Path())
    value = dict(zip(flags[::2], flags[1::2], strict=True))
    shared = {SELF_TEXT} if value.get("--general_text") == "self" else set()
    if folder := value.get("--general_statistics"):
        shared.add(folder)
    if folder := value.get("--statistics_file"):
        shared.add(str(Path(folder) / setting.task))
    return shared


def start_worker(options: argparse.Namespace, recipe: Recipe, model: Path, number: int) -> Worker:
    """Return a new worker. Its own output goes to a file in the cache."""
    context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
    ours, theirs = context.Pipe()
    arguments = (theirs, options, recipe, model, number)
    process = context.Process(target=work, args=arguments, name=f"worker {number}", daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def work(pipe: Connection, options: argparse.Namespace, recipe: Recipe, model: Path, number: int) -> None:
    """Make the runs that come through pipe, as a process of its own. See Worker."""
    log = os.open(options.cache / f"worker-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)

    # A process group of one; torch takes a free port.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run_command(partial(_make_runs, pipe, options, recipe, model, number), [])


def _make_runs(
    pipe: Connection, options: argparse.Namespace, recipe: Recipe, model: Path, number: int, _: list[str]
) -> None:
    try:
        judge, before = judged_before(model, options.trace, options.cache, recipe)
    except Exception:
        pipe.send(Failed(traceback.format_exc()))
        return
    gc.freeze()  # what imports have made stays: collecting it again takes a third of a second, four times a run
    pipe.send(READY)
    while True:
        setting = pipe.recv()
        said: Record | Failed
        try:
            said = one_run(setting, recipe, options, model, judge, before, scratch=_scratch(options, number))
        except Exception:
            said = Failed(traceback.format_exc(), _device_works())
        gc.collect()
        pipe.send(said)


def _device_works() -> bool:
    """Return whether this process can still compute on its device: some errors on a GPU end that."""
    try:
        return bool(torch.ones(1, device=get_accelerator().current_device_name()).item() == 1)
    except RuntimeError:
        return False


def _scratch(options: argparse.Namespace, number: int) -> Path:
    return Path(options.scratch / f"scratch-{number}")


if __name__ == "__main__":
    run_command(main)
