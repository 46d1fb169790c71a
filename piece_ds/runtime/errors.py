"""Two exceptions whose message says everything: input that cannot be used, and a machine that fails.

Launch scripts print the message as one line on stderr and exit with code 2 or 1. Every other exception keeps its
traceback, because it is a defect of this package.
"""

import errno
from collections.abc import Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """Input that cannot be used. The message says what was expected, what came, which object, and what to do."""


class MachineError(RuntimeError):
    """A fault of the machine, not of the input, that needs no traceback: a full disk, a lost rank.

    Launch scripts print the message as one line on stderr and exit with code 1.
    """


def bad_name(error: OSError) -> str | None:
    """Return what is wrong with a path that the system cannot even look up, in one line; None for other errors.

    Paths are looked at in many places before anything is opened, and a name that no file can have fails in all of them.
    """
    reasons = {errno.ENAMETOOLONG: "is longer than a file's name can be", errno.ELOOP: "is a link that leads to itself"}
    if error.errno not in reasons:
        return None
    name = str(error.filename)
    shown = name if len(name) <= 80 else f"{name[:38]} ... {name[-38:]}"
    return f"{shown}: {reasons[error.errno]}; give the path of a file or folder"


def nearest(word: str, choices: list[str]) -> str:
    """Return ' Did you mean X?' for the most similar of choices; an empty string if none is similar."""
    matches = get_close_matches(str(word), choices, n=1, cutoff=0.5)  # a caller in Python may give anything
    return f" Did you mean {matches[0]!r}?" if matches else ""


def closest(word: str, choices: Sequence[str]) -> str | None:
    """Return the one of choices that word is a misspelling of, or None: stricter than nearest()."""
    matches = get_close_matches(word, list(choices), n=1, cutoff=0.75)
    return matches[0] if matches else None
