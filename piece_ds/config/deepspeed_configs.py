"""Find the DeepSpeed configurations of the package by name: --deepspeed zero3 is ds_configs/zero3.json."""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"

_LONGEST_NAME = 200  # bytes; a file system takes 255


def config_names() -> list[str]:
    """Return the names, without .json."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def config_path(name: str) -> str:
    """Return the file of a name. A file of the user's, or what is no name, is returned as it is."""
    if len(name) > _LONGEST_NAME:  # the content of a configuration
        return name
    # A file of the user's wins over a name.
    own = FOLDER / f"{name.removesuffix('.json')}.json"
    if Path(name).exists() or Path(name).name != name or not own.is_file():
        return name
    return str(own)


def with_config_paths(flags: Sequence[str]) -> list[str]:
    """Return flags in which --deepspeed is followed by a file instead of a name."""
    found = list(flags)

    # Both spellings: two items, or one with "=".
    for index, flag in enumerate(found):
        if flag == "--deepspeed" and index + 1 < len(found):
            found[index + 1] = config_path(found[index + 1])
        elif flag.startswith("--deepspeed="):
            found[index] = f"--deepspeed={config_path(flag.split('=', 1)[1])}"
    return found


def contradiction(error: ValueError) -> str:
    """Return transformers' list of numbers in the DeepSpeed file that contradict the flags, as one line."""
    found = "; ".join(line.removeprefix("- ds ") for line in str(error).splitlines() if line.startswith("- ds"))
    return f'--deepspeed: numbers in the file contradict the flags ({found}): use "auto" there'
