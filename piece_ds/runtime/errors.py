"""Two exceptions whose message says everything: input that cannot be used, and a machine that fails.

Launch scripts print the message as one line on stderr and exit with code 2 or 1. Every other exception keeps its
traceback, because it is a defect of this package.
"""

from collections.abc import Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """Input that cannot be used. The message says what was expected, what came, which object, and what to do."""


class MachineError(RuntimeError):
    """A fault of the machine, not of the input, that needs no traceback: a full disk, a lost rank.

    Launch scripts print the message as one line on stderr and exit with code 1.
    """


def nearest(word: str, choices: list[str]) -> str:
    """Return ' Did you mean X?' for the most similar of choices; an empty string if none is similar."""
    matches = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def closest(word: str, choices: Sequence[str]) -> str | None:
    """Return the one of choices that word is a misspelling of, or None: stricter than nearest()."""
    matches = get_close_matches(word, list(choices), n=1, cutoff=0.75)
    return matches[0] if matches else None
