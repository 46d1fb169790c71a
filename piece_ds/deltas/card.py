"""The model card of published deltas: what they go on, how to apply them, and what the run measured.

Names of tasks and runs come from outside. Everything but the commands is escaped for Markdown, the front matter is
written by a YAML library, and no path of the machine is named.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from piece_ds.deltas.delta import Delta
from piece_ds.deltas.published import Published
from piece_ds.evaluation.matrix import Measure, difference
from piece_ds.models.pretrained import PRETRAINED
from piece_ds.report.grids import Grid, has_scores, nats, percent, points, result_grids, signed_nats, summary_grid
from piece_ds.report.html import ReportFigure
from piece_ds.report.results import RunResults
from piece_ds.runtime.text import printable

LIBRARY = "piece_ds"
TAGS = ("piece_ds", "continual-learning", "sparse-fine-tuning", "task-delta")
FIGURES_FOLDER = "figures"
# Parentheses stay: without brackets before them they are no link.
_MARKUP = re.compile(r"([\\`*_{}\[\]#|~!$])")
_DATASET = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells besides the deltas themselves.

    Attributes:
        repo_id: user/name of the repository.
        revision: branch that is pushed to; None for the main one.
        run: what the run measured; None for a lone delta, or a run without results.
        figure: of the results, in FIGURES_FOLDER.
        datasets: Hub ids of the data; empty means the tasks' names.
    """

    repo_id: str
    revision: str | None = None
    run: RunResults | None = None
    figure: ReportFigure | None = None
    datasets: Sequence[str] = ()


def card_text(published: Published, facts: CardFacts) -> str:
    """Return README.md: front matter, what the deltas are, how to apply them, and what was measured."""
    parts = [_front_matter(published, facts), f"# {facts.repo_id.partition('/')[2]}", _lead(published)]
    parts += ["## How to apply", _commands(published, facts), "## Deltas", "\n".join(_deltas_table(published))]
    if facts.run is not None:
        parts += ["## Results", *_results(facts.run, facts.figure)]
    return "\n\n".join(parts) + "\n"


def card_figure(run: RunResults) -> ReportFigure | None:
    """Return the figure of a card: the result matrix; None if nothing was measured yet."""
    # matplotlib takes a second to import: most commands need no figures.
    from piece_ds.report.run_figures import run_figures

    return next(iter(run_figures(run, "results")), None)


def escaped(text: object) -> str:
    """Return text from outside as visible text on one line of Markdown, whatever markup or HTML it holds."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", plain)


def _code(text: object) -> str:
    """Return text from outside in the letters of code, which no markup in it can leave."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _front_matter(published: Published, facts: CardFacts) -> str:
    """Return the YAML block that the Hub reads. A base that is not on the Hub is not linked."""
    base, first = published.base, next(iter(published.deltas.values()))
    on_hub = base.name is not None and base.name not in PRETRAINED
    names = [_DATASET.fullmatch(name) and name for name in facts.datasets or _task_names(published)]
    fields = {
        "library_name": LIBRARY,
        "base_model": base.name if on_hub else None,
        "base_model_relation": "adapter" if on_hub else None,
        "base_model_revision": base.revision,
        "base_model_fingerprint": base.fingerprint,
        "license": base.licence,
        "datasets": list(dict.fromkeys(filter(None, names))),
        "tags": [*TAGS, *([printable(first.metadata["method"])] if "method" in first.metadata else [])],
    }
    known = {key: value for key, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=10_000)}---"


def _task_names(published: Published) -> list[str]:
    """Return the tasks' names, as far as folders tell them."""
    folders = [Path(name).parent.name for name in published.deltas]
    return [folder.partition("-")[2] for folder in folders if folder]


def _lead(published: Published) -> str:
    base, count = published.base, len(published.deltas)
    which = "a model that is not on the Hub" if base.name is None else _code(base.name)
    at = f" at {_code(base.revision)}" if base.revision else ""
    weights = f" Fingerprint of all its weights: {_code(base.fingerprint)}." if base.fingerprint else ""
    licence = escaped(base.licence) if base.licence else "not known"
    reverts = all(delta.reversible for delta in published.deltas.values())
    values = (
        "values before and after. They go on the base and off again" if reverts else "new values. They go on the base"
    )
    return (
        f"{count} task delta{'s' * (count > 1)} of [piece_ds](https://arxiv.org/abs/2511.15375) for {which}{at}: the "
        f"few weights that training changed, with their positions and their {values} bit for bit; any other base is "
        f"refused.{weights} Licence of the base: {licence}."
    )


def _commands(published: Published, facts: CardFacts) -> str:
    """Return three lines for a shell. The base is a folder, or a name that piece_ds fetches."""
    base = published.base
    if base.name is None:
        first, folder = "pip install piece_ds            # BASE is a folder with the base model", "BASE"
    elif base.name in PRETRAINED:
        first, folder = "pip install piece_ds", base.name
    else:
        revision = f" --revision {shlex.quote(printable(base.revision))}" if base.revision else ""
        first, folder = f"hf download {base.name}{revision} --local-dir base", "base"
    at = f" --revision {shlex.quote(printable(facts.revision))}" if facts.revision else ""
    pull = f"piece_ds delta pull hf://{facts.repo_id}{at} --output deltas"
    return f"```\n{first}\n{pull}\npiece_ds delta apply {folder} deltas --output model\n```"


def _deltas_table(published: Published) -> Iterator[str]:
    header = ("", "method", "ratio", "weights", "bytes", "reverts", "weights after")
    rows = [(name, *_delta_cells(delta)) for name, delta in published.deltas.items()]
    yield from _table(Grid("", header, tuple(rows), num_text_columns=2))


def _delta_cells(delta: Delta) -> tuple[str, ...]:
    metadata = delta.metadata
    return (
        metadata.get("method", "unknown"),
        metadata.get("ratio", "unknown"),
        f"{delta.num_selected:,}",
        f"{delta.path.stat().st_size:,}",
        "yes" if delta.reversible else "no",
        delta.result_fingerprint or "unknown",
    )


def _results(run: RunResults, figure: ReportFigure | None) -> Iterator[str]:
    """Yield the result matrices, what was forgotten, the derived figures, the figure, and the run's notes."""
    if run.notes:
        yield "\n".join(f"- {escaped(note)}" for note in run.notes)
    for grid in (*result_grids(run), *forgetting_grids(run), summary_grid([run])):
        if grid.rows:
            yield f"### {escaped(grid.title)}"
            yield "\n".join(_table(grid))
    if figure is not None:
        yield f"![{escaped(figure.caption)}]({FIGURES_FOLDER}/{figure.file_name})"


def forgetting_grids(run: RunResults) -> list[Grid]:
    """Return what each task had right after it was learned, has at the end, and lost; and the loss on general text."""
    grids = []
    if has_scores(run.matrix.score):
        grids.append(_forgetting(f"Forgetting: {run.matrix.score_name}", run, run.matrix.score, in_percent=True))
    grids.append(_forgetting("Forgetting: loss (nats per answer token)", run, run.matrix.loss, in_percent=False))
    return [grid for grid in grids if grid.rows]


def _forgetting(title: str, run: RunResults, measure: Measure, *, in_percent: bool) -> Grid:
    """Return one row a trained task; what was lost has the measure's own sign, as in backward transfer."""
    form, change = (percent, points) if in_percent else (nats, signed_nats)
    rows = []
    for index, (task, row) in enumerate(zip(run.tasks, measure.after, strict=False)):
        learned, kept = row[index], measure.after[-1][index]
        rows.append((task, form(learned), form(kept), change(difference(kept, learned))))
    before, general = run.matrix.general_loss_before, run.matrix.general_loss
    if not in_percent and before is not None and general:
        rows.append(
            (
                "general text, from before the first task",
                form(before),
                form(general[-1]),
                change(difference(general[-1], before)),
            )
        )
    return Grid(title, ("task", "when learned", "at the end", "change"), tuple(rows))


def _table(grid: Grid) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    num_numbers = len(grid.header) - grid.num_text_columns
    for cells in (grid.header, *grid.rows):
        yield f"| {' | '.join(escaped(cell) for cell in cells)} |"
        if cells is grid.header:
            yield f"|{'---|' * grid.num_text_columns}{'---:|' * num_numbers}"
