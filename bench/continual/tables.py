"""summary.md: methods at matched learning, and every setting with its figures and costs."""

from collections.abc import Sequence
from math import isfinite

from bench.continual.curves import LOST, Method, number, start_and_best
from bench.continual.frontier import levels, matched, why_not
from bench.continual.grid import SEEDS, SWEEPS, settings_in_order
from bench.continual.runs_file import Record, not_done
from piece_ds.report.intervals import Interval

SHARES = (0.7, 0.8, 0.9)
_KEEPS_DATA = ("replay", "replay-online", "gem")

_COLUMNS = {
    "loss learned": ("loss_learned", 1.0, 3),
    "loss at the end": ("loss_final", 1.0, 3),
    "backward transfer (loss)": ("loss_backward_transfer", 1.0, 3),
    "accuracy learned / %": ("accuracy_learned", 100.0, 1),
    "accuracy at the end / %": ("accuracy_final", 100.0, 1),
    "general loss after": ("general_loss", 1.0, 3),
    "instructions after": ("instructions_loss", 1.0, 3),
    "select / s": ("select_seconds", 1.0, 0),
    "train / s": ("train_seconds", 1.0, 0),
    "peak RSS / MiB": ("peak_rss_bytes", 2.0**-20, 0),
    "task files / kB": ("task_files_bytes", 1e-3, 0),
}


def summary_page(methods: Sequence[Method], runs: Sequence[Record]) -> str:
    """Both tables as Markdown, with what they were made from."""
    start, best = start_and_best(list(methods))
    at = levels(start, best, SHARES)
    parts = [
        "# The experiment: learning against keeping",
        _made_of(methods, runs),
        f"Before any task the mean loss of the tasks is {start:.3f}; the most that any setting learned (the mean loss "
        f"of the tasks, each right after it was learned) is {best:.3f}. Methods are compared where they have learned "
        f"the same: at {', '.join(f'{100 * share:g} %' for share in SHARES)} of that way. A seed's runs make a curve "
        "over learning rates, neighbouring rates are joined by straight lines, and the value is read where the curve "
        "passes the level (nothing is extrapolated; rates above the one that learned the most are too large, and left "
        "out). ± is a 95 % interval (Student's t) "
        "over the seeds, where at least two pass; it does not cover the choice of base model and rows. 'not reached': "
        "no rate learned that much; 'passed': the smallest rate learned more already. Nats per token; lower is better.",
        *(_matched_table(methods, column, at) for column in LOST),
        "## Every setting",
        "Means over seeds. The general loss before is "
        f"{number(runs[0], 'general_loss_before'):.3f}, that of instructions "
        f"{number(runs[0], 'instructions_loss_before'):.3f}; the mean accuracy before any task "
        f"{100 * number(runs[0], 'accuracy_before'):.1f} %. Accuracies are of 32 rows a task: a difference of a few "
        "per cent says nothing. Seconds were taken while other programs used the same cores, and say little. Task "
        "files: masks and deltas of all tasks, without the models.",
        _settings_table(methods),
    ]
    return "\n\n".join(parts) + "\n"


def _made_of(methods: Sequence[Method], runs: Sequence[Record]) -> str:
    made = {method.method for method in methods}
    missing = [method for method in dict.fromkeys(sweep.method for sweep in SWEEPS) if method not in made]
    planned = settings_in_order(SEEDS)
    missed = len(not_done(planned, list(runs), runs[0]["recipe"]))
    beside = len(runs) - len(planned) + missed
    text = f"{len(planned) - missed} of {len(planned)} planned runs, {beside} beside; recipe {runs[0]['recipe']}; "
    text += f"{runs[0]['device']}, torch {runs[0]['torch']}, {runs[-1]['date']}."
    return text + (f" Not made: {', '.join(missing)}." if missing else "")


def _matched_table(methods: Sequence[Method], column: str, at: Sequence[float]) -> str:
    heads = [f"{100 * share:g} % learned (loss {level:.2f})" for share, level in zip(SHARES, at, strict=True)]
    lines = [f"### At matched learning: {LOST[column]}", "", *_head(["method", "seeds", *heads])]
    for method in methods:
        curves = method.curves(column)
        cells = []
        for level in at:
            found, missing = matched(curves, level)
            note = f" ({len(curves) - missing} of {len(curves)} seeds)" if found and missing else ""
            cells.append(_shown(found) + note if found else why_not(curves, level))
        name = f"{method.name} (keeps old rows)" if method.method in _KEEPS_DATA else method.name
        lines.append(_line([name, str(len(curves)), *cells]))
    return "\n".join(lines)


def _settings_table(methods: Sequence[Method]) -> str:
    lines = _head(["method", "rate", "seeds", "weights trained", *_COLUMNS])
    for method in methods:
        for rate, rows in method.of_rate().items():
            cells = []
            for column, factor, digits in _COLUMNS.values():
                values = [factor * number(run, column) for run in rows]
                known = [value for value in values if isfinite(value)]
                cells.append(f"{sum(known) / len(known):.{digits}f}" if len(known) == len(rows) else "-")
            lines.append(_line([method.name, rate, str(len(rows)), rows[0].get("selected") or "-", *cells]))
    return "\n".join(lines)


def _shown(found: Interval) -> str:
    return f"{found.mean:.3f}" + ("" if found.half_width is None else f" ± {found.half_width:.3f}")


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
