"""The HTML page of a report: one file that holds its style and images, readable in light and dark mode.

templates/page.html escapes every value itself. The page's Content-Security-Policy lets it load and run nothing: it
allows only the page's own style, by hash, and images inside the page.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from piece_ds.report.grids import Grid
from piece_ds.runtime.text import printable

DPI = 160  # of the figures' files
MANY_COLUMNS = 8  # with more, headers break into lines, so that the table needs no scrolling
POINTS_PER_INCH = 105  # on the page: all figures have text of one size, a little smaller than the page's

POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"

DEFINITIONS = {
    "R[i][j]": "result on task j after training on task i; the row “before” is the model before any task. "
    "A score is in [0, 1]: accuracy where an answer is a letter, a number or a word, (BLEU-4 + ROUGE-L) / 2 where it "
    "is free text, edit similarity where it is a line of code. Loss is the mean over all answer tokens, in nats.",
    "OP": "overall performance: mean of R[T][j] over the tasks j trained so far, T the last of them.",
    "learned": "mean of R[i][i], each task right after it was trained.",
    "±": "half of the 95 % confidence interval over seeds (Student's t); it says nothing of the choice of test rows.",
    "95 % interval": "of the last row's scores over the choice of test rows: Wilson's for a share of n rows, an upper "
    "bound for means of other scores in [0, 1]; of the mean of tasks, from theirs (MOVER). It says nothing of seeds.",
    "selected values that changed": "in 16 bits a value changes only if it is moved by half of its last place; weights "
    "near 1, as of norms, need the largest moves. A low share asks for a larger learning rate.",
    "tokens/s": "training: tokens of the task's micro-batches a second of optimizer steps, over all ranks; generated: "
    "new tokens a second of evaluation.",
    "BWT": "backward transfer: mean over i < T of R[T][i] - R[i][i]. Negative (for a loss, positive) is forgetting.",
    "BWT (authors)": "as the method's authors compute it: the last task is left out, mean over i ≤ T-1 of "
    "R[T-1][i] - R[i][i], the zero term i = T-1 included.",
    "forgetting": "mean over i < T of the best R[l][i] with i ≤ l < T, minus R[T][i]; positive where ability was lost.",
    "FWT": "forward transfer: mean over i ≥ 2 of R[i-1][i] - R[before][i]; only where tasks to come were evaluated.",
    "general loss": "loss on text that no task trains; its rise says how much general ability was lost.",
    "KL": "how far what the model says has moved from what the base model said, on held-out answers and on general "
    "text. Unlike a loss it does not fall if something new is learned.",
    "overlap": "Jaccard index of two tasks' masks: weights in both / weights in either.",
}

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportFigure:
    """One figure of a report.

    Attributes:
        file_name: under figures/, unique within the report.
        caption: what it shows, in a sentence.
        png: content of the image file.
    """

    file_name: str
    caption: str
    png: bytes

    @property
    def page_width(self) -> int:
        """Width on the page, in CSS pixels."""
        return int.from_bytes(self.png[16:20], "big") * POINTS_PER_INCH // DPI  # PNG's header has its width there

    @property
    def data_url(self) -> str:
        """The image as a URL that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def render_page(
    title: str,
    lead: str,
    grids: Sequence[Grid],
    figures: Sequence[ReportFigure],
    settings: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
    details: Mapping[str, Sequence[Grid]] | None = None,
) -> str:
    """Return the whole page.

    Args:
        title: heading of the page.
        lead: one line under it.
        grids: tables, in order.
        figures: images, embedded in the page.
        settings: run -> flag -> value.
        notes: sentences that a reader must know, shown first.
        details: run -> tables that are collapsed until they are opened.
    """
    style = Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    # The policy allows this style and no other.
    style_hash = base64.b64encode(sha256(style.encode()).digest()).decode("ascii")
    return _template().render(
        title=title,
        lead=lead,
        grids=grids,
        figures=figures,
        settings=settings,
        notes=notes,
        details=details or {},
        meanings=DEFINITIONS,
        many_columns=MANY_COLUMNS,
        style=style,
        policy=f"{POLICY}; style-src 'sha256-{style_hash}'",
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_fit
    )
    return environment.get_template("page.html")


def _fit(value: Any) -> Any:
    """Return a value for the template. Unprintable characters are escaped, except in the template's own markup."""
    return value if isinstance(value, Markup) else printable(value, keep="\n")
