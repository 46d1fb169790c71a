"""The DeepSpeed configurations that travel with the package, by name: --deepspeed zero3 is ds_configs/zero3.json."""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"


def config_names() -> list[str]:
    """Return the names, without .json."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def config_path(name: str) -> str:
    """Return the file of a name; what is no name, or a file of the user's, comes back as it is."""
    own = FOLDER / f"{name.removesuffix('.json')}.json"
    if Path(name).exists() or Path(name).name != name or not own.is_file():
        return name
    return str(own)


def with_config_paths(flags: Sequence[str]) -> list[str]:
    """Return flags with the file in place of a name behind --deepspeed."""
    found = list(flags)
    for index, flag in enumerate(found):
        if flag == "--deepspeed" and index + 1 < len(found):
            found[index + 1] = config_path(found[index + 1])
        elif flag.startswith("--deepspeed="):
            found[index] = f"--deepspeed={config_path(flag.split('=', 1)[1])}"
    return found
