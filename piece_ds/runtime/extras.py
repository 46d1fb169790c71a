"""Parts of an installation that few runs need: what they bring, and the one line that names a missing one.

The libraries are imported inside the functions that use them. So a command starts faster, and works without them.
"""

from importlib.util import find_spec

from piece_ds.runtime.errors import UserError

# Extra of the package, as in pyproject.toml -> the modules that it brings.
EXTRAS = {"peft": ("peft",), "statistics": ("scipy",)}


def require_extra(extra: str, what: str) -> None:
    """Raise UserError unless an extra is installed.

    Args:
        extra: one of EXTRAS.
        what: what needs it, as the message's subject.
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}, which is not installed: pip install 'piece_ds[{extra}]'")
