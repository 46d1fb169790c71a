"""What a run found, as tables on the console, as Markdown, and as a page with figures."""

from piece_ds.report.comparison_page import write_comparison
from piece_ds.report.comparison_table import comparison_grids
from piece_ds.report.groups import Group, group_runs
from piece_ds.report.results import RunResults, read_results
from piece_ds.report.run_page import write_report
from piece_ds.report.table import print_results

__all__ = [
    "Group",
    "RunResults",
    "comparison_grids",
    "group_runs",
    "print_results",
    "read_results",
    "write_comparison",
    "write_report",
]
