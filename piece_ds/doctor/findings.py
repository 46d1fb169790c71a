"""One thing that was checked, and what it means for a run."""

from dataclasses import dataclass

# GOOD: a run works. NOTE: a run works without it, or slower. BAD: a run would fail.
GOOD, NOTE, BAD = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: was checked.
        status: GOOD, NOTE or BAD.
        found: in words.
    """

    what: str
    status: str
    found: str
