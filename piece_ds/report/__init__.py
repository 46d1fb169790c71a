"""What a run found, as tables on the console, as Markdown, and as a page with figures."""

from piece_ds.report.html import write_report
from piece_ds.report.results import RunResults, read_results
from piece_ds.report.table import markdown_results, print_results

__all__ = ["RunResults", "markdown_results", "print_results", "read_results", "write_report"]
