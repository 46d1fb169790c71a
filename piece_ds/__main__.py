"""`piece_ds`, `python -m piece_ds`, `deepspeed --module piece_ds`: every command, imported when it runs."""

import sys
from collections.abc import Sequence
from importlib import import_module

from piece_ds.cli.commands import launched_command, run_launched
from piece_ds.cli.main import _parser
from piece_ds.runtime.errors import MachineError, UserError, bad_name
from piece_ds.runtime.text import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A UserError becomes one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    launched = launched_command(words)
    if launched is not None:
        run_launched(launched, words)
    try:
        arguments = _parser().parse_args(argv)
        module, function = arguments.run.split(":")
        getattr(import_module(module), function)(arguments)
    except UserError as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(2)
    except MachineError as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        line = bad_name(error)
        if line is None:
            raise
        print(printable(f"error: {line}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
