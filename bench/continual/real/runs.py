"""results/runs.csv, and runs-DEVICE.csv beside it: one row for each finished run, written whole after each."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.continual.frontier import Point
from piece_ds.runtime.files import write_text

COLUMNS = ("name", "task", "rate", "seed")
Record = dict[str, str]


def read_runs(path: Path) -> list[Record]:
    """Return all rows; none if the file is not there."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_run(path: Path, record: Record) -> None:
    """Add a row; it replaces one of the same setting."""
    key = [record[name] for name in COLUMNS]
    runs = [run for run in read_runs(path) if [run[name] for name in COLUMNS] != key] + [record]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for run in runs for column in run)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def files_of_devices(path: Path) -> list[Path]:
    """Return runs.csv, then the files of other devices beside it (runs-DEVICE.csv)."""
    return [path, *sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))]


def each_once(devices: Sequence[Sequence[Record]]) -> list[Record]:
    """Return one row for each setting that any device has made.

    Of two, that of the device that has made more of the curve (the rates of a sweep, task and seed) counts; at equal
    numbers, that of the device named first.
    """
    lengths = [Counter(_curve(run) for run in runs) for runs in devices]
    found: dict[tuple[str, ...], tuple[int, Record]] = {}
    for length, runs in zip(lengths, devices, strict=True):
        for run in runs:
            key, made = tuple(run[name] for name in COLUMNS), length[_curve(run)]
            if key not in found or made > found[key][0]:
                found[key] = (made, run)
    return [run for _, run in found.values()]


def made_twice(devices: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """Return the rows of each setting that several devices have made, in the order of the devices."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for run in (run for runs in devices for run in runs):
        found.setdefault(tuple(run[name] for name in COLUMNS), []).append(run)
    return [runs for runs in found.values() if len(runs) > 1]


def _curve(run: Record) -> tuple[str, str, str]:
    return run["name"], run["task"], run["seed"]


def tasks_of(runs: list[Record]) -> list[str]:
    """Return the tasks of runs, each once, in the order of the runs."""
    return list(dict.fromkeys(run["task"] for run in runs))


def curves_of(runs: list[Record], name: str, lost: str) -> list[list[Point]]:
    """Return one curve a seed of the sweep called name."""
    seeds = dict.fromkeys(run["seed"] for run in runs if run["name"] == name)
    return [
        [
            Point(float(run["rate"]), float(run["learned"]), float(run[lost]))
            for run in runs
            if run["name"] == name and run["seed"] == seed
        ]
        for seed in seeds
    ]
