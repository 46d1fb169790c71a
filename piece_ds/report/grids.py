"""Results as rows of short texts, for both the console and HTML."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from piece_ds.evaluation.matrix import Measure
from piece_ds.report.intervals import over_rows, over_rows_of_mean
from piece_ds.report.results import GENERAL_TEXT, Counts, RunResults

ABSENT = "-"
MAX_MASKS = 8  # columns of a table; more do not fit side by side


@dataclass(frozen=True)
class Grid:
    """A table of texts.

    Attributes:
        title: what it shows.
        header: names of the columns; the first names the rows.
        rows: each as long as the header.
        num_text_columns: columns at the start that hold words and are aligned left. The others hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1


def result_grids(run: RunResults) -> list[Grid]:
    """Return the result matrix of a run: one grid of scores, if any task has them, and one of losses.

    Each row is a moment of the stream (before it, or after a task), each column a task. The last columns are the
    overall performance at that moment and the loss on general text.
    """
    grids = []
    if has_scores(run.matrix.score):
        scores = _matrix_grid(f"{run.name}: {run.matrix.score_name}", run, run.matrix.score, percent)
        grids.append(replace(scores, rows=(*scores.rows, *_certainty(run))))
    grids.append(_matrix_grid(f"{run.name}: loss (nats per answer token)", run, run.matrix.loss, nats, general=True))
    return grids


def summary_grid(runs: Sequence[RunResults]) -> Grid:
    """Return runs in rows and the derived figures in columns. Figures that no run has are left out."""
    columns: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("OP", "score_overall", percent),
        ("learned", "score_learning", percent),
        ("BWT", "score_backward_transfer", points),
        ("BWT (authors)", "score_backward_transfer_authors", points),
        ("forgetting", "score_forgetting", points),
        ("FWT", "score_forward_transfer", points),
        ("loss OP", "loss_overall", nats),
        ("loss BWT", "loss_backward_transfer", signed_nats),
        ("general loss change", "general_loss_change", signed_nats),
        ("general KL", "general_divergence", nats),
    ]
    summaries = [{**run.matrix.summary(), "general_divergence": run.general_divergence} for run in runs]
    kept = [column for column in columns if any(summary[column[1]] is not None for summary in summaries)]
    rows = [
        (run.name, *(form(summary[key]) for _, key, form in kept)) for run, summary in zip(runs, summaries, strict=True)
    ]
    return Grid("Derived figures", ("run", *(label for label, _, _ in kept)), tuple(rows))


def run_grids(run: RunResults) -> list[Grid]:
    """Return what one run found: its matrices, and the measures besides the scores."""
    grids = (divergence_grid(run), measures_grid(run))
    return [*result_grids(run), *(grid for grid in grids if grid.rows)]


def divergence_grid(run: RunResults) -> Grid:
    """Return the divergence from the base model: a row for each trained task, a column for each text.

    Zero means that the model says of the text what it said before any task.
    """
    names = [*run.tasks, GENERAL_TEXT]
    kept = [name for name in names if any(name in found for found in run.divergence.values())]
    rows = [(moment, *(nats(found.get(name)) for name in kept)) for moment, found in run.divergence.items()]
    return Grid(f"{run.name}: KL(base model || model) (nats per token)", ("", *kept), tuple(rows))


def page_grids(run: RunResults) -> list[Grid]:
    """Return all grids of one run except its costs."""
    kinds = kinds_grid(f"{run.name}: selected, of all weights of a kind", run.masks)
    changes = changes_grid(f"{run.name}: selected values that changed", run)
    return [*run_grids(run), *(grid for grid in (kinds, changes) if grid.rows)]


def measures_grid(run: RunResults) -> Grid:
    """Return the measures besides the scores: parts of a score, SARI, general ability; one row per moment and task.

    They are plain numbers: the harness also has measures that are not shares, such as a perplexity.
    """
    moments: list[tuple[str, str, Mapping[str, float]]] = []
    for moment, of_task in run.measures.items():
        moments += [(moment, task, values) for task, values in of_task.items() if values]
    moments += [(moment, "general ability", values) for moment, values in run.ability.items() if values]
    names = list(dict.fromkeys(name for _, _, values in moments for name in values))
    rows = [(moment, task, *(nats(values.get(name)) for name in names)) for moment, task, values in moments]
    return Grid(f"{run.name}: beside the scores", ("", "task", *names), tuple(rows), num_text_columns=2)


def kinds_grid(title: str, masks: Mapping[str, Counts]) -> Grid:
    """Return which share of the weights of each kind of module each mask selects.

    The kind with most selected weights is first.

    Args:
        title: of the table.
        masks: column title, such as a task -> layer -> kind -> {"selected", "total"}. For more than MAX_MASKS, the
            lowest, mean and highest share replace the single ones.
    """

    # Sum over layers: elements per kind, and selected ones per kind and mask.
    totals: dict[str, int] = {}
    selected: dict[str, list[int]] = {}
    for place, counts in enumerate(masks.values()):
        of_mask: dict[str, int] = {}
        for kinds in counts.values():
            for kind, cell in kinds.items():
                of_mask[kind] = of_mask.get(kind, 0) + cell["total"]
                selected.setdefault(kind, [0] * len(masks))[place] += cell["selected"]
        totals |= of_mask

    # One row per kind.
    header = ("kind", "weights", *(masks if len(masks) <= MAX_MASKS else ("lowest", "mean", "highest")))
    rows = []
    for kind in sorted(selected, key=lambda kind: -sum(selected[kind])):
        shares = [count / max(totals[kind], 1) for count in selected[kind]]
        if len(shares) > MAX_MASKS:
            shares = [min(shares), fmean(shares), max(shares)]
        rows.append((kind, f"{totals[kind]:,}", *map(share, shares)))
    return Grid(title, header, tuple(rows))


def has_scores(measure: Measure) -> bool:
    """Return whether any task was scored at any moment."""
    rows = [*measure.after, *([measure.before] if measure.before else [])]
    return any(value is not None for row in rows for value in row)


def changes_grid(title: str, run: RunResults) -> Grid:
    """Return which share of the selected values of each kind changed in each task.

    For more than MAX_MASKS tasks, the lowest, mean and highest share replace the single ones.
    """
    kinds = list(dict.fromkeys(kind for counts in run.changes.values() for kind in counts))
    rows = []
    for kind in kinds:
        cells = [counts.get(kind) for counts in run.changes.values()]
        shares = [cell["changed"] / max(cell["values"], 1) if cell else None for cell in cells]
        if len(shares) > MAX_MASKS:
            known = [value for value in shares if value is not None]
            shares = [min(known), fmean(known), max(known)]
        rows.append((kind, *map(percent, shares)))
    tasks = tuple(run.changes) if len(run.changes) <= MAX_MASKS else ("lowest", "mean", "highest")
    return Grid(title, ("kind", *tasks), tuple(rows))


COST_LABELS = {
    "peak_bytes": "peak memory",
    "host_peak_bytes": "peak host memory",
    "trained_tokens_per_second": "training tokens/s",
    "generated_tokens_per_second": "generated tokens/s",
    "other_bytes": "other files",
}
_COST_ORDER = (
    "select_seconds",
    "train_seconds",
    "num_steps",
    "trained_tokens_per_second",
    "evaluate_seconds",
    "generated_tokens_per_second",
    "save_seconds",
    "peak_bytes",
    "host_peak_bytes",
    "mask_bytes",
    "delta_bytes",
    "model_bytes",
)
_SHOWN_WHERE_MET = {"nonfinite_steps", "overflow_steps"}  # a column of zeros would say nothing


def cost_grid(runs: Sequence[RunResults]) -> Grid:
    """Return what each task of each run cost, with its mask's size. Columns without any measurement are left out."""
    costs = [cost for run in runs for cost in run.cost.values()]
    known = dict.fromkeys(key for cost in costs for key, value in cost.items() if value is not None)
    # Known costs come first, in the order of the work; others follow as a run wrote them.
    keys = [*(key for key in _COST_ORDER if key in known), *(key for key in known if key not in _COST_ORDER)]
    # Steps that were skipped are worth a column only if there were any.
    keys = [key for key in keys if key not in _SHOWN_WHERE_MET or any(cost.get(key) for cost in costs)]
    named, has_masks = len(runs) > 1, any(run.masks for run in runs)
    rows = []
    for run in runs:
        counts = run.selected_counts
        for task, cost in run.cost.items():
            # Methods without a mask, such as plain fine-tuning, select nothing.
            selected, total = counts.get(task, (None, None))
            mask = f"{selected:,} of {total:,}" if total else ABSENT
            values = (quantity(key, cost.get(key)) for key in keys)
            rows.append((*([run.name] if named else []), task, *([mask] if has_masks else []), *values))
    first = ("run", "task") if named else ("task",)
    header = (*first, *(["selected weights"] if has_masks else []), *map(_cost_label, keys))
    return Grid("Cost of each task, on rank 0", header, tuple(rows), num_text_columns=len(first))


def _cost_label(key: str) -> str:
    plain = key.removeprefix("num_").removesuffix("_seconds").removesuffix("_bytes").replace("_", " ")
    return COST_LABELS.get(key, plain)


def percent(value: float | None) -> str:
    """Return a share as a percentage: 62.5 %."""
    return ABSENT if value is None else f"{100 * value:.1f} %"


def share(value: float) -> str:
    """Return a share that may be very small, as a percentage of three digits: 60 %, 0.1 %, 0.00123 %."""
    return f"{100 * value:.3g} %"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return ABSENT if value is None else f"{100 * value:+.1f}"


def nats(value: float | None) -> str:
    """Return a loss, or another plain number, with three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def signed_nats(value: float | None) -> str:
    """Return a difference of losses, with its sign."""
    return ABSENT if value is None else f"{value:+.3f}"


def quantity(name: str, value: object) -> str:
    """Return a measured value in the unit that its name implies: 12.3 s, 5.0 min, 1.50 GiB, 4,007."""
    if not isinstance(value, int | float):
        return ABSENT if value is None else str(value)
    if name.endswith("_seconds"):
        return _in_unit(float(value), ((3600, "h"), (60, "min"), (1, "s")), from_count=2)
    if name.endswith("_bytes"):
        return _in_unit(float(value), ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,.0f}"


def _in_unit(value: float, units: Sequence[tuple[int, str]], from_count: int = 1) -> str:
    """Return value in the largest unit of which it has at least from_count, or else in the smallest.

    units must be sorted, the largest first.
    """
    size, unit = next((pair for pair in units if abs(value) >= from_count * pair[0]), units[-1])
    # Whole bytes; two decimals for parts of a second.
    num_decimals = 0 if unit == "B" else 2 if unit == "s" and value < 1 else 1
    return f"{value / size:,.{num_decimals}f} {unit}"


def _certainty(run: RunResults) -> list[tuple[str, ...]]:
    """Return two rows to go under a matrix of scores, or none if the numbers of test rows are not known.

    They are the interval of the last row over the choice of test rows, and the number of test rows.
    """
    if not run.rows or not run.matrix.score.after:
        return []
    last = dict(zip(run.tasks, run.matrix.score.after[-1], strict=True))
    known = {task: (value, run.rows[task]) for task, value in last.items() if value is not None and run.rows.get(task)}
    ends = [_ends(*over_rows(*known[task])) if task in known else ABSENT for task in run.tasks]
    seen = [known[task] for task in run.tasks[: len(run.matrix.score.after)] if task in known]
    counts = [f"{run.rows[task]:,}" if task in run.rows else ABSENT for task in run.tasks]
    return [
        ("95 % interval", *ends, _ends(*over_rows_of_mean(seen)) if seen else ABSENT),
        ("test rows", *counts, f"{sum(num_rows for _, num_rows in seen):,}"),
    ]


def _ends(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _matrix_grid(
    title: str, run: RunResults, measure: Measure, form: Callable[[float | None], str], general: bool = False
) -> Grid:
    with_general = general and any(value is not None for value in run.matrix.general_loss)
    header = ("", *run.tasks, "mean of seen", *(["general text"] if with_general else []))
    rows = []
    if measure.before is not None:
        extra = (nats(run.matrix.general_loss_before),) if with_general else ()
        rows.append(("before", *map(form, measure.before), ABSENT, *extra))
    for stage, row in enumerate(measure.after):
        extra = (nats(run.matrix.general_loss[stage]),) if with_general else ()
        rows.append((f"after {run.tasks[stage]}", *map(form, row), form(measure.overall(stage)), *extra))
    return Grid(title, header, tuple(rows))
