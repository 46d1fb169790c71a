"""What a run found, as tables on the console, as Markdown, and as a page with figures."""

from piece_ds.report.comparison_page import write_comparison
from piece_ds.report.comparison_table import comparison_grid
from piece_ds.report.groups import Group, Interval, group_runs, over_seeds
from piece_ds.report.results import RunResults, read_results
from piece_ds.report.run_page import write_report
from piece_ds.report.table import markdown_results, print_results

__all__ = [
    "Group",
    "Interval",
    "RunResults",
    "comparison_grid",
    "group_runs",
    "markdown_results",
    "over_seeds",
    "print_results",
    "read_results",
    "write_comparison",
    "write_report",
]
