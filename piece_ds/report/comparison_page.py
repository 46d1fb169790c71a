"""The page that compares runs: one table of all, shared line plots, matrices side by side, and the frontier."""

from collections.abc import Sequence
from pathlib import Path

from piece_ds.report.comparison_table import comparison_grids
from piece_ds.report.grids import cost_grid, page_grids
from piece_ds.report.groups import Group
from piece_ds.report.html import render_page
from piece_ds.report.results import RunResults
from piece_ds.report.run_page import write_figures
from piece_ds.runtime.files import write_text


def write_comparison(path: Path | str, groups: Sequence[Group], title: str = "Comparison of runs") -> Path:
    """Write a page that needs no other file, and its figures as PNG files in STEM_figures/ beside it.

    Args:
        path: of the page. An existing file is replaced.
        groups: from group_runs().
        title: heading of the page.
    Returns:
        path.
    """
    # matplotlib takes a second to import: most commands need no figures.
    from piece_ds.report.comparison_figures import comparison_figures

    path = Path(path)
    figures = comparison_figures(groups)
    write_figures(path.with_name(f"{path.stem}_figures"), figures)

    # The page holds the figures too, so it can be sent by itself.
    runs = _by_name(groups)
    page = render_page(
        title,
        lead=f"{len(runs)} run{'s' * (len(runs) > 1)}: {' → '.join(groups[0].first.tasks)}",
        grids=comparison_grids(groups),
        figures=figures,
        settings={name: {"method": run.method, "mask_ratio": run.ratio, **run.settings} for name, run in runs.items()},
        notes=list(dict.fromkeys(note for run in runs.values() for note in run.notes)),
        details={name: [*page_grids(run), *([cost_grid([run])] if run.cost else [])] for name, run in runs.items()},
    )
    write_text(path, page)
    return path


def _by_name(groups: Sequence[Group]) -> dict[str, RunResults]:
    """Return runs by their group's label, with the folder if the group has several runs."""
    return {
        group.label if len(group.runs) == 1 else f"{group.label} ({folder})": run
        for group in groups
        for folder, run in zip(group.folders, group.runs, strict=True)
    }
