"""Hold what settings are made of: a command line, the YAML file that it names, and defaults."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from piece_ds.config.parser import OneLineParser
from piece_ds.config.recommended import refuse_method_beside
from piece_ds.config.yaml_file import read_yaml
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class Source:
    """The command line without --config, the content of that file, and values for what neither gives."""

    command: tuple[str, ...]
    config: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Names of the flags on the command line and of the keys in the file."""
        return frozenset({flag_name(a) for a in self.command if a.startswith("--")} | set(self.config))

    def without(self, names: Collection[str]) -> "Source":
        """Return the command line, file and defaults without some flags and their values."""
        command, is_kept = [], True
        for item in self.command:
            if item.startswith("--"):  # what follows, up to the next flag, is its value
                is_kept = flag_name(item) not in names
            if is_kept:
                command.append(item)
        config, defaults = (
            {name: value for name, value in values.items() if name not in names}
            for values in (self.config, self.defaults)
        )
        return Source(tuple(command), config, defaults)

    @property
    def recipe(self) -> str | None:
        """The recipe that is asked for: the last on the command line, else the YAML file's."""
        parser = OneLineParser([], allow_abbrev=False, add_help=False)
        parser.add_argument("--recipe", default=self.config.get("recipe"))
        recipe = parser.parse_known_args(list(self.command))[0].recipe
        return None if recipe is None else str(recipe)


def source_of(argv: list[str]) -> Source:
    """Return a command line and the YAML file that it names.

    Raises:
        UserError: the file cannot be read, or a method is given beside a recipe.
    """
    command, config = _take_config(argv)
    source = Source(tuple(command), config)
    refuse_method_beside(source.recipe, source.names)
    return source


def flag_name(item: str) -> str:
    """Return the name of a flag as a field has it: `--mask-ratio=0.1` is mask_ratio."""
    return item.split("=")[0].removeprefix("--").replace("-", "_")


def _take_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return argv without --config FILE, and the content of FILE.

    Raises:
        UserError: FILE is missing, or no YAML mapping.
    """
    # Take the flag out.
    rest, path = [], None
    items = iter(argv)
    for item in items:
        if item == "--config":
            path = next(items, None)
            if path is None:
                raise UserError("--config expects a YAML file")
        elif item.startswith("--config="):
            path = item.split("=", 1)[1]
        else:
            rest.append(item)

    # Read the file.
    return rest, {} if path is None else read_yaml(path)
