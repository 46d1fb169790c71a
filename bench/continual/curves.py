"""The rows of runs.csv as curves: one for each method, ratio and seed."""

from dataclasses import dataclass, field
from math import isfinite, nan

from bench.continual.frontier import Point
from bench.continual.runs_file import Record

# What is compared at equal learning: column of runs.csv -> what a reader calls it. All are nats per token.
LOST = {
    "general_loss_change": "rise of the loss on general text",
    "loss_backward_transfer": "rise of the earlier tasks' loss (backward transfer)",
    "instructions_loss_change": "rise of the loss on instructions",
}


@dataclass
class Method:
    """All runs of a method at one ratio.

    Attributes:
        method, ratio: as in runs.csv; ratio 1.0 where a method has none.
        runs: seed -> its rows, by learning rate.
    """

    method: str
    ratio: float
    runs: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method if self.ratio == 1.0 else f"{self.method} {100 * self.ratio:g} %"

    def curves(self, lost: str) -> list[list[Point]]:
        """One curve a seed."""
        return [
            [Point(float(run["rate"]), number(run, "loss_learned"), number(run, lost)) for run in rows]
            for rows in self.runs.values()
        ]

    def of_rate(self) -> dict[str, list[Record]]:
        """Rate -> its rows over seeds, smallest rate first."""
        found: dict[str, list[Record]] = {}
        for rows in self.runs.values():
            for run in rows:
                found.setdefault(run["rate"], []).append(run)
        return dict(sorted(found.items(), key=lambda item: float(item[0])))


def methods_of(runs: list[Record]) -> list[Method]:
    """Runs put together, in the order in which methods first occur."""
    found: dict[tuple[str, str], Method] = {}
    for run in sorted(runs, key=lambda run: (int(run["seed"]), float(run["rate"]))):
        method = found.setdefault((run["method"], run["ratio"]), Method(run["method"], float(run["ratio"])))
        method.runs.setdefault(run["seed"], []).append(run)
    return list(found.values())


def number(run: Record, column: str) -> float:
    """A figure of a run; nan where it is not there."""
    if column == "instructions_loss_change":
        return number(run, "instructions_loss") - number(run, "instructions_loss_before")
    return float(run.get(column) or nan)


def start_and_best(methods: list[Method]) -> tuple[float, float]:
    """Mean loss of the tasks before any, and the lowest that a method learned at one rate, as a mean over seeds."""
    every = [rows for method in methods for rows in method.of_rate().values()]
    learned = [sum(number(run, "loss_learned") for run in rows) / len(rows) for rows in every]
    return number(every[0][0], "loss_before"), min(value for value in learned if isfinite(value))
