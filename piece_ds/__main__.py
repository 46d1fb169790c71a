"""`piece_ds`, `python -m piece_ds`, `deepspeed --module piece_ds`: every command, imported when it runs.

Nothing here imports torch before the command has a folder to run in: torch's libraries cannot be loaded without one.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from piece_ds.runtime.blamed_variable import why_environment
from piece_ds.runtime.errors import MachineError, UserError, bad_name
from piece_ds.runtime.garbage import no_collections
from piece_ds.runtime.launch_environment import require_working_folder
from piece_ds.runtime.streams import keep_streams, lost_output
from piece_ds.runtime.text import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A UserError becomes one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        require_working_folder()
    except UserError as error:
        _say(error)
        sys.exit(2)
    if argv is None:
        keep_streams()

    # The launch scripts' commands run by themselves.
    with no_collections():
        try:
            from piece_ds.cli.commands import launched_command, run_launched
            from piece_ds.cli.main import FlagError, _parser
        except Exception as error:
            _leave_if_environment(error)
            raise

        launched = launched_command(words)
        if launched is not None:
            run_launched(launched, words)
    try:
        arguments = _parser().parse_args(argv)
        module, function = arguments.run.split(":")
        with no_collections():
            command = getattr(import_module(module), function)
        command(arguments)
    except SystemExit as left:  # after --help and --version
        if not left.code and lost_output():
            sys.exit(1)
        raise
    except FlagError as error:
        _say(error)
        sys.exit(2)
    except UserError as error:
        # None of these commands has that flag of the launch scripts; a model is named by its place here.
        _say(str(error).replace("--model_name_or_path ", "model "))
        sys.exit(2)
    except MachineError as error:
        _say(error)
        sys.exit(1)
    except OSError as error:
        line = bad_name(error)
        if line is None:
            _leave_if_environment(error)
            raise
        _say(line)
        sys.exit(2)
    except Exception as error:
        _leave_if_environment(error)
        raise
    if lost_output():
        sys.exit(1)


def _leave_if_environment(error: Exception) -> None:
    """Exit with one line if an environment variable made a library fail."""
    reason = why_environment(error)
    if reason is not None:
        _say(reason)
        sys.exit(2)


def _say(reason: object) -> None:
    print(printable(f"error: {' '.join(str(reason).split())}"), file=sys.stderr)


if __name__ == "__main__":
    main()
