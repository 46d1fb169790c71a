"""The comparison of the embedded default on a tiny model, tiny recipe: python -m support.office_job MODEL FLAGS."""

import sys
from pathlib import Path

from piece_ds.cli.office_demo import print_comparison, run_office
from piece_ds.cli.train import show
from piece_ds.config.settings import load_settings
from piece_ds.demo.office.recipe import OfficeRecipe
from piece_ds.runtime.process import run_command, start_distributed
from piece_ds.training.run_folder import RunFolder

TINY = OfficeRecipe(
    num_train_rows=8,
    num_test_rows=3,
    num_general_rows=3,
    general_tokens=64,
    task_steps=2,
    task_batch_size=4,
    importance_rows=8,
    max_new_tokens=6,
)


def main(argv: list[str]) -> None:
    settings = load_settings(argv)
    start_distributed()
    folder = RunFolder(Path(settings.training_arguments().output_dir))
    comparison = run_office(settings, MODEL, folder, TINY)
    show(comparison.runs, folder)
    print_comparison(comparison)


if __name__ == "__main__":
    MODEL = sys.argv.pop(1)
    run_command(main)
