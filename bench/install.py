"""What an installation costs in an empty environment: seconds, megabytes and packages; beside peft's and trl's.

    python bench/install.py                     # builds the wheel of this checkout; writes bench/results/install.csv
    python bench/install.py --only piece_ds     # one of them

Every package goes into a new virtual environment with the pip and the constraints of this project, without pip's cache.
`seconds` includes the download, from whatever index is set up; `cpu_seconds` is pip's own work; `megabytes` are what
the environment holds on disk beyond an empty one. The environment is removed before the next is made.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from record import write_rows

ROOT = Path(__file__).parents[1]
# torch alone says how much of it all is torch, which every one of them needs.
PACKAGES = ("torch", "piece_ds", "piece_ds[all]", "peft", "trl")
HEAVIEST = 6


def main() -> None:
    """Install each package, and write one row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PACKAGES, action="append", help="repeatable; default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "install.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measured(name, Path(scratch)) for name in arguments.only or PACKAGES]
    write_rows(arguments.output, rows)


def measured(name: str, scratch: Path) -> dict[str, Any]:
    """Install one package into a new environment, and return its row."""
    folder = scratch / "environment"
    venv.create(folder, with_pip=True, clear=True)
    before = megabytes(folder)
    is_own = name.startswith("piece_ds")
    what = f"{built_wheel(scratch)}{name.removeprefix('piece_ds')}" if is_own else name
    command = [folder / "bin" / "pip", "install", "--quiet", "--no-cache-dir", "--constraint", ROOT / "constraints.txt"]
    begin, cpu_begin = time.perf_counter(), cpu_seconds()
    subprocess.run([*map(str, command), what], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, busy = time.perf_counter() - begin, cpu_seconds() - cpu_begin
    sizes = folder_sizes(folder)
    row = {
        "package": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "megabytes": round(megabytes(folder) - before),
        "packages": num_packages(folder),
        "heaviest": "; ".join(f"{part} {size}" for part, size in sizes[:HEAVIEST]),
    }
    print(row, flush=True)  # before the environment is removed, which takes a while
    return row


def cpu_seconds() -> float:
    """Return the processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def built_wheel(scratch: Path) -> Path:
    """Return the pure wheel of this checkout."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        scratch,
        ROOT,
    ]
    subprocess.run(list(map(str, command)), check=True)
    return next(scratch.glob("piece_ds-*.whl"))


def num_packages(folder: Path) -> int:
    """Return how many distributions an environment holds besides pip and setuptools."""
    found = {path.name.split("-")[0].lower() for path in folder.glob("lib/python*/site-packages/*.dist-info")}
    return len(found - {"pip", "setuptools", "wheel"})


def folder_sizes(folder: Path) -> list[tuple[str, int]]:
    """Return (top-level package, megabytes), the largest first."""
    (site,) = folder.glob("lib/python*/site-packages")
    sizes = [(path.name, round(megabytes(path))) for path in site.iterdir() if path.is_dir()]
    return sorted(sizes, key=lambda pair: -pair[1])


def megabytes(folder: Path) -> float:
    """Return what the files below a folder hold, in 10**6 bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
