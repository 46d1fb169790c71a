"""`piece_ds train | select | evaluate`: the launch scripts as commands of the installed package, from any folder."""

import sys
from contextlib import redirect_stdout
from importlib import import_module
from typing import NoReturn

PRINT_CONFIG = "--print_config"

# command -> (module of its main(argv), what it does)
LAUNCHED = {
    "train": ("piece_ds.cli.train", "train a task or a stream of tasks (launch/train.py)"),
    "select": ("piece_ds.cli.select", "importance and selection alone (launch/select_mask.py)"),
    "evaluate": ("piece_ds.cli.evaluate", "loss and scores of a model on tasks (launch/eval_tasks.py)"),
}


def launched_command(words: list[str]) -> str | None:
    """Return the command of LAUNCHED that the command line asks for; None for any other command.

    Args:
        words: the command line without the program's name. deepspeed's launcher puts --local_rank=N before the command.
    """
    # The launcher's own flag may come first.
    first = next((word for word in words if not word.startswith(("--local_rank", "--local-rank"))), None)
    return first if first in LAUNCHED else None


def run_launched(command: str, words: list[str]) -> NoReturn:
    """Run a command of LAUNCHED as a program, with the rest of its command line, and exit."""
    # Imports torch, which the help of all other commands does without.
    from piece_ds.runtime.process import run_command

    rest = list(words)
    # Only the first occurrence is the command; a value of a flag may be the same word.
    rest.remove(command)

    def main(argv: list[str]) -> None:
        if PRINT_CONFIG in argv:
            print_config([item for item in argv if item != PRINT_CONFIG])
            return
        import_module(LAUNCHED[command][0]).main(argv)

    run_command(main, rest)


def print_config(argv: list[str]) -> None:
    """Print every setting as YAML that --config reads back: the defaults, changed by argv."""
    with redirect_stdout(sys.stderr):  # some libraries print on import; stdout is only for the YAML
        from piece_ds.config.settings import load_settings
        from piece_ds.config.yaml_settings import settings_yaml
        from piece_ds.runtime.distributed import is_main

        text = settings_yaml(load_settings(argv))
    if is_main():
        print(text, end="")
