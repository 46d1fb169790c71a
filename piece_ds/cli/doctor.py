"""The work of `piece_ds doctor`: check everything that a run needs on this machine, on one screen."""

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from piece_ds.doctor.findings import BAD, GOOD, Finding
from piece_ds.doctor.machine import examine
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.text import printable

_COLOURS = {GOOD: "green", BAD: "bold red"}


def doctor(arguments: argparse.Namespace) -> None:
    """Print the findings. Exit with code 1 if one of them would make a run fail.

    Raises:
        UserError: --ranks is no number of processes.
    """
    if arguments.ranks < 1:
        raise UserError(f"--ranks must be at least 1, got {arguments.ranks}")
    findings = list(examine(arguments.folder, arguments.ranks))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=140)
        console.print(_table(findings))
    if any(finding.status == BAD for finding in findings):
        sys.exit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "found", title="piece_ds doctor", title_justify="left")
    for finding in findings:
        colour = _COLOURS.get(finding.status, "yellow")
        table.add_row(Text(finding.status, colour), Text(printable(finding.what)), Text(printable(finding.found)))
    return table
