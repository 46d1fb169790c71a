"""Check content from outside this process against a schema before anything trusts it.

pydantic does the checking. What does not fit becomes a UserError of one line. It names the file, the place in it, what
was expected there and what came.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from piece_ds.runtime.errors import UserError

T = TypeVar("T")

# Whole numbers of a file: sizes, counts and positions. Tensors can be indexed with 64 bits.
Count = Annotated[int, Field(ge=0, lt=2**63)]

_SHOWN = 60  # characters of a wrong value that a message repeats


def read_file(path: Path | str, what: str, remedy: str) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: of the file.
        what: kind of file, for the message, such as "results".
        remedy: what to do if it cannot be used.
    Raises:
        UserError: there is no such file, it is a folder, a pipe or a device, or it cannot be read.
    """
    require_file(path, what, remedy)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): {remedy}") from None


def require_file(path: Path | str, what: str, remedy: str) -> None:
    """Raise UserError unless path is a regular file. Reading a pipe might never end."""
    try:
        is_file = Path(path).is_file()
        exists = is_file or Path(path).exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise UserError(f"{what} {str(path)[:200]!r}: no such file ({error.__class__.__name__}): {remedy}") from None
    if not is_file:
        found = "expected a file, found a folder, pipe or device" if exists else "no such file"
        raise UserError(f"{what} {path}: {found}: {remedy}")


def read_json(path: Path | str, kind: type[T], what: str, remedy: str) -> T:
    """Return the content of a JSON file as kind: a dataclass, TypedDict or pydantic model.

    Numbers, texts and lists are taken as they are, never converted.

    Args:
        path: of the file.
        kind: what the content must be.
        what: kind of file, for the message.
        remedy: what to do if it cannot be used.
    Raises:
        UserError: the file cannot be read, is not JSON, or does not fit kind.
    """
    content = read_file(path, what, remedy)
    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{what} {path}: {_first(error)}: {remedy}") from None


def checked(content: Any, kind: type[T], what: str, remedy: str, *, strict: bool = False) -> T:
    """Return content as kind.

    Args:
        content: to check.
        kind: what it must be.
        what: name of the object, for the message.
        remedy: what to do if it cannot be used.
        strict: accept no text in place of a number. Metadata of safetensors files are texts, so they are converted.
    Raises:
        UserError: content does not fit kind.
    """
    try:
        return TypeAdapter(kind).validate_python(content, strict=strict)
    except ValidationError as error:
        raise UserError(f"{what}: {_first(error)}: {remedy}") from None


def _first(error: ValidationError) -> str:
    """Return the first problem in a few words."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:_SHOWN] for part in found["loc"])
    # The input of a missing entry is the whole object, which says nothing.
    shown = "" if found["type"] == "missing" else f", got {_shorten(found['input'])}"
    problem = f"not JSON ({found['ctx']['error']})" if found["type"] == "json_invalid" else found["msg"][:200] + shown
    return " ".join(f"{place + ': ' if place else ''}{problem}".split())


def _shorten(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the longest
        return f"a whole number of {value.bit_length()} bits"
    text = f"{len(value)} entries" if isinstance(value, dict) and len(value) > 4 else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
