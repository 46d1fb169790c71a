"""The picture and the tables of the experiment, from results/runs.csv.

python bench/continual/summary.py [--runs_file CSV] [--output FOLDER]

Writes frontier.png, and summary.md with the table at matched learning and the table of all settings.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.continual.curves import methods_of
from bench.continual.figure import frontier_figure
from bench.continual.run import RESULTS
from bench.continual.runs_file import read_runs
from bench.continual.tables import summary_page
from piece_ds.runtime.files import write_text, write_whole


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs_file", type=Path, default=RESULTS / "runs.csv")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = read_runs(options.runs_file)
    if not runs:
        sys.exit(f"{options.runs_file} has no runs: make bench-continual makes them")
    last = runs[-1]["recipe"]
    runs = [run for run in runs if run["recipe"] == last]  # runs of an earlier recipe are not comparable
    methods = methods_of(runs)
    picture = frontier_figure(methods)
    write_whole(options.output / "frontier.png", lambda path: path.write_bytes(picture))
    write_text(options.output / "summary.md", summary_page(methods, runs))
    print(f"written to {options.output}: frontier.png, summary.md ({len(runs)} runs)")


if __name__ == "__main__":
    main()
