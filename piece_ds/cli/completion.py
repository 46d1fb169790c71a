"""`piece_ds --completion bash | zsh`: a script that lets a shell complete commands, flags and their values."""

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

SHELLS = ("bash", "zsh")


class CompletionAction(argparse.Action):
    """Print the script and exit, as --version does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Print the script of the shell that is named."""
        print(completion_script(parser, str(values)))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script.

    Args:
        parser: of the `piece_ds` command. Its commands that hand their flags on are given them here.
        shell: one of SHELLS.
    Cost: imports transformers, for its flags; several seconds.
    """
    with redirect_stdout(sys.stderr):  # some libraries print on import; stdout is only for the script
        import shtab

        from piece_ds.cli.commands import LAUNCHED, PRINT_CONFIG
        from piece_ds.config.settings import every_flag

        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for name in LAUNCHED:
            launched = every_flag()
            for flag in ("--config", PRINT_CONFIG):
                launched.add_argument(flag)
            commands.choices[name] = launched
        for command in _all_parsers(parser):
            for action in command._actions:
                if _names_a_file(action):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        script: str = shtab.complete(parser, shell=shell)
    return script


def _all_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for choice in dict.fromkeys(action.choices.values()) for inner in _all_parsers(choice)]
    return found


def _names_a_file(action: argparse.Action) -> bool:
    """Return whether an action takes a path: flags by the end of their name, arguments by what stands for them."""
    ends = ("_file", "_dir", "_path", "config", "output", "general_text")
    is_file = action.dest.endswith(ends) or action.dest in ("model", "deltas", "masks", "runs", "source", "deepspeed")
    return is_file and action.nargs != 0 and not action.choices
