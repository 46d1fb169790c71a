"""One thing that was looked at, and what it means for a run."""

from dataclasses import dataclass

# A run works; a run works without it, or slower; a run would fail.
GOOD, NOTE, BAD = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What was looked at, GOOD, NOTE or BAD, and what was found, in words."""

    what: str
    status: str
    found: str
