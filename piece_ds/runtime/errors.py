"""The exceptions whose message says all: input that cannot be used, and a machine that fails.

Launch scripts print it as a single line on stderr and exit with code 2 or 1; everything else keeps its traceback,
because everything else is a defect of this package.
"""

from difflib import get_close_matches


class UserError(ValueError):
    """Input that cannot be used. The message says what was expected, what came, which object, and what to do."""


class MachineError(RuntimeError):
    """The machine, not the input, is at fault, in a way that needs no traceback: a full disk, a lost rank.

    Launch scripts print the message as a single line on stderr and exit with code 1.
    """


def nearest(word: str, choices: list[str]) -> str:
    """' Did you mean X?' for the most similar of choices, or an empty string when none is similar."""
    matches = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
