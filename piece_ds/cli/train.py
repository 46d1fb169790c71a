"""launch/train.py: train a task or a stream of tasks on a model, or run the embedded default."""

import logging

from piece_ds.cli.demo import EMBEDDED, run_embedded
from piece_ds.cli.office_demo import print_comparison
from piece_ds.cli.run import train
from piece_ds.config.recommended import NOTE
from piece_ds.config.settings import load_settings, print_help
from piece_ds.methods.registry import methods_help
from piece_ds.report.results import RunResults
from piece_ds.report.run_page import write_report
from piece_ds.report.table import print_results
from piece_ds.runtime.distributed import is_main
from piece_ds.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run launch/train.py."""
    if "-h" in argv or "--help" in argv:
        print_help({"method": methods_help()})
        return
    settings = load_settings(argv)
    if settings.model.model_name_or_path in (None, EMBEDDED):
        runs, folder, comparison = run_embedded(settings)
        show(runs, folder)
        if comparison is not None:
            print_comparison(comparison)
        return
    if "method" not in settings.given and settings.method.mask_file is None and is_main():
        logger.warning(NOTE)
    results, folder = train(settings)
    show([results], folder)


def show(runs: list[RunResults], folder: RunFolder) -> None:
    """Print the result tables, and write report.html with its figures. Only rank 0 does anything."""
    if is_main():
        print_results(runs)
        print(f"report: {write_report(folder.root, runs)}")
