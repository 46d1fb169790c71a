"""Check single flags."""

from dataclasses import fields
from math import inf
from typing import Any

from piece_ds.runtime.errors import UserError, nearest

# Rows of general text per row of the task: beyond it, the task is the smaller part.
MAX_SHARE = 4.0


def has_good_share(share: float | None) -> bool:
    """Return whether --general_share is in its range, or left out."""
    return share is None or 0 < share <= MAX_SHARE


def require_choice(name: str, value: str, choices: list[str]) -> None:
    """Raise UserError, with the nearest choice, if value is not one of choices."""
    if value not in choices:
        raise UserError(f"--{name} {value!r} is unknown; known: {', '.join(choices)}.{nearest(value, choices)}")


def require_positive(name: str, value: int | float) -> None:
    """Raise UserError unless value > 0 and finite."""
    if not (value > 0 and value != inf):
        raise UserError(f"--{name} must be positive, got {value}")


def require_not_negative(name: str, value: int | float) -> None:
    """Raise UserError unless value >= 0 and finite."""
    if not 0 <= value < inf:
        raise UserError(f"--{name} must not be negative, got {value}")


def require_countable(settings: Any) -> None:
    """Raise UserError if a whole number among the fields of a dataclass is past what 32 bits count; seeds have 63."""
    for field in fields(settings):
        value, most = getattr(settings, field.name), 2**63 if field.name.endswith("seed") else 2**31
        if isinstance(value, int) and not isinstance(value, bool) and not -most <= value < most:
            raise UserError(f"--{field.name} expects a whole number below {most}, got {str(value)[:40]}")
