"""launch/train.py: a task or a stream of tasks on a model, or the embedded default."""

from piece_ds.arguments import parse, print_help
from piece_ds.command import with_default_config
from piece_ds.distributed import is_main
from piece_ds.embedded_command import run_embedded
from piece_ds.flags import default_flags
from piece_ds.report import RunResults, print_results, write_report
from piece_ds.run_folder import RunFolder
from piece_ds.train_run import train


def main(argv: list[str]) -> None:
    """The whole job of launch/train.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    settings = parse(with_default_config(argv), default_flags(argv))
    if settings.model.model_name_or_path is None:
        show(*run_embedded(with_default_config(argv), settings, default_flags(argv)))
        return
    results, folder = train(settings)
    show([results], folder)


def show(runs: list[RunResults], folder: RunFolder) -> None:
    """Print the result tables and write report.html with its figures. Rank 0 alone does something."""
    if is_main():
        print_results(runs)
        print(f"report: {write_report(folder.root, runs)}")
