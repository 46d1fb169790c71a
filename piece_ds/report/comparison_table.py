"""The table of a comparison: one row per group of runs, with intervals if there are several seeds."""

from collections.abc import Callable, Sequence
from math import isfinite
from statistics import fmean

from piece_ds.report.grids import ABSENT, Grid, has_scores, nats, percent, points, quantity
from piece_ds.report.groups import MAX_SETTINGS, Group, shown
from piece_ds.report.intervals import Interval, over_repetitions
from piece_ds.report.results import RunResults

Figure = Callable[[RunResults], float | None]
Columns = Sequence[tuple[str, Sequence[str]]]
WRITTEN = ("mask_bytes", "delta_bytes", "model_bytes", "other_bytes")
PEAKS = {"peak_bytes": "peak memory", "host_peak_bytes": "peak host memory"}


def comparison_grids(groups: Sequence[Group]) -> list[Grid]:
    """Return tables with groups in rows, and in columns their differing settings and their results.

    Empty columns are left out. If more than MAX_SETTINGS settings differ, they get a table of their own, so that the
    results stay on the page. A number links the two tables. A value over several seeds is their mean ± half of the 95 %
    interval; peak memory is the highest of all.
    """
    settings, results = _setting_columns(groups), [*_result_columns(groups), *_cost_columns(groups)]
    if len(groups[0].settings) <= MAX_SETTINGS:
        return [_grid("Methods", [group.name for group in groups], [*settings, *results], len(settings))]
    numbered = [group.label for group in groups]
    return [
        _grid("Methods", numbered, results, 0),
        _settings_grid([label for label, _ in settings], [cells for _, cells in settings], numbered),
    ]


def _grid(title: str, names: Sequence[str], columns: Columns, num_settings: int) -> Grid:
    # A column that no group has a value for would only take room.
    kept = [(label, cells) for label, cells in columns if any(cell != ABSENT for cell in cells)]
    rows = [(name, *(cells[index] for _, cells in kept)) for index, name in enumerate(names)]
    num_text = 1 + sum(any(cell != ABSENT for cell in cells) for _, cells in columns[:num_settings])
    return Grid(title, ("run", *(label for label, _ in kept)), tuple(rows), num_text)


def _settings_grid(labels: Sequence[str], cells: Sequence[Sequence[str]], names: Sequence[str]) -> Grid:
    """Return every setting that differs. With few runs each setting has a row.

    With many runs each run has a row, which lists all its settings in one cell.
    """
    title = "What the runs differ in"
    if len(names) <= MAX_SETTINGS:
        rows = [(label, *values) for label, values in zip(labels, cells, strict=True)]
        return Grid(title, ("setting", *names), tuple(rows), 1 + len(names))
    texts = [
        "; ".join(f"{label} {values[index]}" for label, values in zip(labels, cells, strict=True))
        for index in range(len(names))
    ]
    return Grid(title, ("run", "settings"), tuple(zip(names, texts, strict=True)), 2)


def measured_by_score(groups: Sequence[Group]) -> bool:
    """Return whether scores tell what was learned; otherwise losses do."""
    return all(has_scores(run.matrix.score) for group in groups for run in group.runs)


def figures_of(groups: Sequence[Group]) -> dict[str, tuple[Figure, Callable[[float | None], str]]]:
    """Return column -> (value of a run, function that formats it)."""
    score = measured_by_score(groups)
    value, difference = (percent, points) if score else (nats, _signed)
    prefix, named = ("score", "") if score else ("loss", "loss ")

    def derived(figure: str) -> Figure:
        return lambda run: run.matrix.summary()[f"{prefix}_{figure}"]

    return {
        f"{named}learned": (derived("learning"), value),
        f"{named}OP": (derived("overall"), value),
        f"{named}BWT": (derived("backward_transfer"), difference),
        "forgetting": (derived("forgetting"), difference),
        "general loss before": (lambda run: run.matrix.general_loss_before, nats),
        "general loss after": (lambda run: run.matrix.general_loss[-1] if run.matrix.general_loss else None, nats),
    }


def _setting_columns(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    columns = [(name, [shown(group.settings[name]) for group in groups]) for name in groups[0].settings]
    if len({group.first.ratio for group in groups}) > 1:
        columns.insert(0, ("trained", [f"{100 * group.first.ratio:g} %" for group in groups]))
    if any(len(group.runs) > 1 for group in groups):
        columns.append(("seeds", [str(len(group.runs)) for group in groups]))
    num_tasks = len(groups[0].first.tasks)
    if any(group.num_finished < num_tasks for group in groups):
        columns.append(("tasks done", [f"{group.num_finished} of {num_tasks}" for group in groups]))
    return columns


def _result_columns(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    return [
        (label, [_with_interval([figure(run) for run in group.runs], form) for group in groups])
        for label, (figure, form) in figures_of(groups).items()
    ]


def _cost_columns(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    seconds = ("time", [_mean_total(group, lambda key: key.endswith("_seconds"), "_seconds") for group in groups])
    peaks = [(label, [_highest(group, key) for group in groups]) for key, label in PEAKS.items()]
    written = ("written", [_mean_total(group, lambda key: key in WRITTEN, "_bytes") for group in groups])
    return [seconds, *peaks, written]


def _with_interval(values: Sequence[float | None], form: Callable[[float | None], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    # A diverged run has no interval, but its group must show that it diverged.
    found = over_repetitions(known) if all(map(isfinite, known)) else Interval(fmean(known), None)
    if not found.half_width:  # one run, or runs with equal values
        return form(found.mean)
    return f"{form(found.mean).removesuffix(' %')} ± {form(found.half_width).removeprefix('+')}"


def _mean_total(group: Group, counts: Callable[[str], bool], unit: str) -> str:
    """Return the mean over runs of the sum over tasks of the costs for which counts() is true."""
    totals = []
    for run in group.runs:
        costs = [
            value for cost in run.cost.values() for key, value in cost.items() if counts(key) and value is not None
        ]
        totals += [sum(costs)] if costs else []
    return quantity(unit, sum(totals) / len(totals)) if totals else ABSENT


def _highest(group: Group, key: str) -> str:
    known = [value for run in group.runs for cost in run.cost.values() if (value := cost.get(key)) is not None]
    return quantity(key, max(known)) if known else ABSENT


def _signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.3f}"
