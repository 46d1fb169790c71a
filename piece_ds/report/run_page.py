"""report.html and the figures beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from piece_ds.report.grids import cost_grid, page_grids, summary_grid
from piece_ds.report.html import ReportFigure, render_page
from piece_ds.report.results import RunResults
from piece_ds.report.validation import validation_grid
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text, write_whole

REPORT_NAME = "report.html"
FIGURES_FOLDER = "figures"


def write_report(output_dir: Path | str, runs: Sequence[RunResults], title: str = "Continual fine-tuning") -> Path:
    """Write report.html, which needs no other file, and its figures as PNG files under figures/; call it on one rank.

    Args:
        output_dir: made if missing. An earlier report in it is replaced.
        runs: one, or several to compare. Figures along the stream show only runs with the first run's tasks.
        title: heading of the page.
    Returns:
        The path of report.html.
    Raises:
        UserError: no run, or two of the same name.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise UserError(f"a report needs at least one run, each with its own name; got {names}")
    # matplotlib takes a second to import: most commands need no figures.
    from piece_ds.report.run_figures import make_figures

    figures = make_figures(runs)
    write_figures(Path(output_dir) / FIGURES_FOLDER, figures)

    # Tables: what was found, then what it cost.
    costs = cost_grid(runs)
    grids = [
        summary_grid(runs),
        *(grid for run in runs for grid in page_grids(run)),
        *(validation_grid(run) for run in runs if run.validation),
        *([costs] if costs.rows else []),
    ]

    # The page holds the figures too, so it can be sent by itself.
    page = render_page(
        title,
        lead=f"{', '.join(names)}: {' → '.join(runs[0].tasks)}",
        grids=grids,
        figures=figures,
        settings={run.name: {"method": run.method, "mask_ratio": run.ratio, **run.settings} for run in runs},
        notes=list(dict.fromkeys(note for run in runs for note in run.notes)),
    )
    path = Path(output_dir) / REPORT_NAME
    write_text(path, page)
    return path


def write_figures(folder: Path, figures: Sequence[ReportFigure]) -> None:
    """Write each figure as a PNG file in folder."""
    for figure in figures:
        write_whole(folder / figure.file_name, _writer(figure.png))


def _writer(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write
