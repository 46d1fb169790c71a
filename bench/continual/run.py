"""The experiment: every method over learning rates, ratios and seeds, on a small model and TRACE's tasks.

python bench/continual/run.py [--trace ../shared/trace] [--base FOLDER] [--methods M,M] [--seeds 1,2,3] [--hours H]

Makes the base model first, where it is not there. A finished run is a row of results/runs.csv and not made again, so
the command goes on where it was stopped. Runs are made one after another in a process that is renewed now and then.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.continual.grid import SEEDS, SWEEPS, Setting, settings_in_order
from bench.continual.recipe import BaseRecipe, StreamRecipe, digest
from bench.continual.runs_file import add_run, not_done, read_runs
from piece_ds.methods.registry import find_method
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import run_command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
RUNS_OF_A_PROCESS = 16
# The figures' last bits depend on the number of threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SMOKE = StreamRecipe(train_rows=16, test_rows=4, general_rows=4, steps=2)


def main(argv: list[str]) -> None:
    """Make the runs that are not there yet."""
    options = _options(argv)
    if options.in_this_process:
        _make_runs(options, options.in_this_process)
        return
    deadline = time.monotonic() + 3600 * options.hours
    failed = options.cache / "failed.txt"
    failed.unlink(missing_ok=True)
    more = True
    while more and time.monotonic() < deadline:
        before = len(read_runs(options.runs_file)), _lines(failed)
        worker = [sys.executable, __file__, *argv, "--in_this_process", str(RUNS_OF_A_PROCESS)]
        code = subprocess.run([*worker, "--deadline", str(deadline)], env={**os.environ, **ENVIRONMENT}).returncode
        if code:
            sys.exit(code)
        more = before != (len(read_runs(options.runs_file)), _lines(failed))
    for line in _lines(failed):
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(1 if _lines(failed) else 0)


def _make_runs(options: argparse.Namespace, most: int) -> None:
    """Make the next runs, at most so many, until one fails: what it leaves in the process is not known."""
    import torch

    from bench.continual.base import make_base
    from bench.continual.one_run import run
    from bench.continual.tasks import write_stream

    torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    gc.freeze()  # every engine that is released is a full collection: a sixth of a run with all modules in it
    recipe = SMOKE if options.smoke else StreamRecipe()
    base = options.base or make_base(options.cache, BaseRecipe())
    files = write_stream(options.cache, base, options.trace, recipe)
    recipe_hash = digest(recipe, files.digest)
    for setting in _next(options, recipe_hash)[:most]:
        if time.monotonic() > options.deadline:
            return
        begin = time.monotonic()
        try:
            record = run(setting, files, recipe, recipe_hash, options.cache / "scratch")
            add_run(options.runs_file, record)
        except Exception as error:
            traceback.print_exc()
            with open(options.cache / "failed.txt", "a", encoding="utf-8") as file:
                file.write(f"{' '.join(setting.key)}: {' '.join(str(error).split())}\n")
            return
        print(f"{' '.join(setting.key)}: {time.monotonic() - begin:.0f} s", flush=True)


def _next(options: argparse.Namespace, recipe_hash: str) -> list[Setting]:
    """Runs to make, without those of methods that are not there and those that failed."""
    wanted = [
        setting
        for setting in settings_in_order(options.seeds)
        if options.methods is None or setting.method in options.methods
    ]
    absent = {method for method in {setting.method for setting in wanted} if not _is_there(method)}
    if absent:
        print(f"not there yet, left out: {', '.join(sorted(absent))}", flush=True)
    failed = {line.split(":")[0] for line in _lines(options.cache / "failed.txt")}
    todo = not_done(wanted, read_runs(options.runs_file), recipe_hash)
    todo = [setting for setting in todo if setting.method not in absent and " ".join(setting.key) not in failed]
    print(f"{len(todo)} of {len(wanted)} runs to make", flush=True)
    return todo


def _is_there(method: str) -> bool:
    try:
        find_method(method)
    except UserError:
        return False
    return True


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared" / "trace", help="folder of TRACE's tasks")
    parser.add_argument("--base", type=Path, help="a base model that this command made; without it one is made")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=SEEDS)
    parser.add_argument("--hours", type=float, default=1e6, help="begin no run after so many hours")
    parser.add_argument("--runs_file", type=Path, default=RESULTS / "runs.csv")
    parser.add_argument("--smoke", action="store_true", help="two steps a task: does it work? The figures say nothing")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "continual", help="base model and scratch files")
    parser.add_argument("--in_this_process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.trace.is_dir():
        raise UserError(
            f"--trace {options.trace}: no such folder; expected TRACE's tasks, TASK/{{train,test}}.json each"
        )
    unknown = set(options.methods or ()) - {sweep.method for sweep in SWEEPS}
    if unknown:
        raise UserError(f"--methods {', '.join(sorted(unknown))}: not in the table of bench/continual/grid.py")
    return options


if __name__ == "__main__":
    run_command(main)
