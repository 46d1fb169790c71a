"""Check single flags."""

from piece_ds.runtime.errors import UserError, nearest


def require_choice(name: str, value: str, choices: list[str]) -> None:
    """Raise UserError, with the nearest choice, if value is not one of choices."""
    if value not in choices:
        raise UserError(f"--{name} {value!r} is unknown; known: {', '.join(choices)}.{nearest(value, choices)}")


def require_positive(name: str, value: int | float) -> None:
    """Raise UserError unless value > 0."""
    if not value > 0:
        raise UserError(f"--{name} must be positive, got {value}")
