"""The HTML page of a report: one file with its style and images inside, readable in light and in dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from piece_ds.report.grids import Grid

DPI = 160  # of the figures' files
MANY_COLUMNS = 8  # headers of more break into lines, so that the table needs no scrolling
POINTS_PER_INCH = 105  # on the page: all figures have text of one size, a little smaller than the page's

DEFINITIONS = {
    "R[i][j]": "result on task j after training on task i; the row “before” is the model before any task. "
    "A score is in [0, 1]: accuracy where an answer is a letter, a number or a word, (BLEU-4 + ROUGE-L) / 2 where it "
    "is free text, edit similarity where it is a line of code. Loss is the mean over all answer tokens, in nats.",
    "OP": "overall performance: mean of R[T][j] over the tasks j trained so far, T the last of them.",
    "learned": "mean of R[i][i], each task right after it was trained.",
    "±": "half of the 95 % confidence interval over seeds (Student's t); it says nothing of the choice of test rows.",
    "BWT": "backward transfer: mean over i < T of R[T][i] - R[i][i]. Negative (for a loss, positive) is forgetting.",
    "BWT (authors)": "as the method's authors compute it: the last task is left out, mean over i ≤ T-1 of "
    "R[T-1][i] - R[i][i], the zero term i = T-1 included.",
    "forgetting": "mean over i < T of the best R[l][i] with i ≤ l < T, minus R[T][i]; positive where ability was lost.",
    "FWT": "forward transfer: mean over i ≥ 2 of R[i-1][i] - R[before][i]; only where tasks to come were evaluated.",
    "general loss": "loss on text that no task trains; its rise says how much general ability was lost.",
    "overlap": "Jaccard index of two tasks' masks: weights in both / weights in either.",
}

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --line: #dfe2e6; --back: #fff; --card: #f7f8fa;
        --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a0a6ae; --line: #33383f; --back: #15181c;
        --card: #1d2126; --accent: #56b4e9; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1200px;
       margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p.lead { color: var(--soft); margin: 0; }
.scroll { overflow-x: auto; margin: 0 0 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.wide thead th { white-space: normal; }
figure { margin: 0 0 1.6rem; padding: .8rem; background: var(--card); border: 1px solid var(--line);
         border-radius: 8px; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; border-radius: 4px; background: #fff; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 0 0 .6rem; } summary { cursor: pointer; color: var(--accent); }
ul.notes { border-left: 3px solid var(--accent); padding: .4rem 0 .4rem 1.6rem; background: var(--card); }
"""


@dataclass(frozen=True)
class ReportFigure:
    """One figure of a report.

    Attributes:
        file_name: under figures/, unique within the report.
        caption: what it shows, in a sentence.
        png: the image file.
    """

    file_name: str
    caption: str
    png: bytes


def render_page(
    title: str,
    lead: str,
    grids: Sequence[Grid],
    figures: Sequence[ReportFigure],
    settings: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
    details: Mapping[str, Sequence[Grid]] | None = None,
) -> str:
    """The whole page.

    Args:
        title: its heading.
        lead: one line under it.
        grids: tables, in order.
        figures: images, put into the page itself.
        settings: run -> flag -> value.
        notes: sentences a reader must know, shown first.
        details: run -> tables that are folded away until they are asked for.
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    parts += ["<h2>Results</h2>", *map(_table, grids)]
    if figures:
        parts += ["<h2>Figures</h2>", *map(_figure, figures)]
    if details:
        parts.append("<h2>Each run</h2>")
        parts += [_folded(run, "".join(map(_table, of_run))) for run, of_run in details.items()]
    parts += ["<h2>What the figures mean</h2>", _definitions(DEFINITIONS)]
    if any(settings.values()):
        parts.append("<h2>Settings</h2>")
        parts += [_folded(run, _definitions(of)) for run, of in settings.items()]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid.header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    caption = f"<caption>{escape(grid.title)}</caption>"
    wide = ' class="wide"' if len(grid.header) > MANY_COLUMNS else ""
    return (
        f'<div class="scroll"><table{wide}>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _figure(figure: ReportFigure) -> str:
    image = base64.b64encode(figure.png).decode("ascii")
    caption = escape(figure.caption)
    width = int.from_bytes(figure.png[16:20], "big") * POINTS_PER_INCH // DPI  # PNG's header has its width there
    return (
        f'<figure><img alt="{caption}" width="{width}" src="data:image/png;base64,{image}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _definitions(values: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>' for k, v in values.items())}</dl>"
