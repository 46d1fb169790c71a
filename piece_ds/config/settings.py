"""Turn flags and YAML into checked settings. TrainingArguments is built afresh for every task.

transformers resolves the "auto" values of a DeepSpeed configuration in place, once, inside TrainingArguments. A second
task must not inherit the first one's. So the list of flags is kept, not the object.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import TrainingArguments

from piece_ds.config.arguments import DataArguments, ModelArguments
from piece_ds.config.deepspeed_configs import with_config_paths
from piece_ds.config.defaults import machine_defaults
from piece_ds.config.foreign_keys import hint, unknown_keys
from piece_ds.config.method_arguments import BaselineArguments, MethodArguments
from piece_ds.config.output_arguments import EvaluationArguments, OutputArguments
from piece_ds.config.parser import make_parser, training_arguments_of
from piece_ds.config.ranges import require_countable
from piece_ds.config.recommended import HELP, settings_of
from piece_ds.config.source import Source, flag_name, source_of
from piece_ds.config.yaml_file import flags_of
from piece_ds.runtime.errors import UserError

OURS = (ModelArguments, DataArguments, MethodArguments, OutputArguments, EvaluationArguments, BaselineArguments)
# What makes a method, with the text that stands for general ability and the rate that it was tuned at.
OF_METHOD = frozenset(f.name for cls in (MethodArguments, BaselineArguments) for f in fields(cls)) | {
    "general_text",
    "learning_rate",
}


@dataclass(frozen=True)
class Settings:
    """Everything a run was asked to do.

    Attributes:
        model, data, method, output, evaluation, baseline: this project's settings.
        flags: the flags for transformers' TrainingArguments.
        given: names of the flags and YAML keys that the user has set, without dashes.
        source: command line, YAML and defaults that they were made of.
    """

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    output: OutputArguments
    evaluation: EvaluationArguments
    baseline: BaselineArguments
    flags: tuple[str, ...]
    given: frozenset[str]
    source: Source

    def training_arguments(self, **overrides: Any) -> TrainingArguments:
        """Return a fresh TrainingArguments with overrides in place of the flags' values.

        Raises:
            UserError: transformers refuses a value.
        """
        # Overrides come last, and the parser lets the last of a repeated flag win.
        extra = [item for name, value in overrides.items() for item in (f"--{name}", str(value))]
        return training_arguments_of([*self.flags, *extra])

    def flag(self, name: str) -> str | None:
        """Return the text of one of TrainingArguments' flags as given, without building TrainingArguments."""
        # A parser for this one flag: everything else is unknown to it and left alone.
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        parser.add_argument(f"--{name}", dest="value", nargs="?")
        value: str | None = parser.parse_known_args(list(self.flags))[0].value
        return value

    @property
    def recipe_rate(self) -> float | None:
        """The learning rate that a recipe sets; None without one, or if the user sets the rate."""
        rate: float | None = settings_of(self.source.recipe).get("learning_rate")
        return None if "learning_rate" in self.source.names else rate

    def with_flags(self, **flags: Any) -> "Settings":
        """Return these settings with more flags of TrainingArguments."""
        extra = tuple(item for name, value in flags.items() for item in (f"--{name}", str(value)))
        return replace(self, flags=self.flags + extra)

    def rebuilt(self, defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> "Settings":
        """Return the settings of the same command line and YAML file with other values around them.

        Args:
            defaults: values of what neither gives.
            overrides: values that win over both.
        """
        source = self.source
        above = tuple(item for name, value in (overrides or {}).items() for item in flags_of(name, value))

        # New defaults win over old ones, and overrides over the command line.
        filled = replace(source, command=source.command + above, defaults={**source.defaults, **defaults})
        return _build(filled, self.given | set(overrides or {}))

    def without_method(self) -> "Settings":
        """Return the settings of the same command line and YAML file without what they say of the method.

        Whoever compares a user's method with another one gives that one its own.
        """
        source = self.source.without(OF_METHOD)
        return _build(source, self.given - OF_METHOD)

    def resolved(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, for run.json."""
        return {cls.__name__: asdict(value) for cls, value in zip(OURS, self._ours(), strict=True)}

    def shown(self) -> dict[str, Any]:
        """Return what the user set, with the values in force, as a report shows it. Tokens are left out."""
        arguments = self.training_arguments()
        found = {}

        # A flag belongs to one of our groups or to transformers.
        for name in sorted(self.given):
            holder = next((part for part in (*self._ours(), arguments) if hasattr(part, name)), None)
            if holder is not None and not name.endswith("_token"):
                value = getattr(holder, name)
                found[name] = value if isinstance(value, int | float | str | bool | None) else str(value)
        return found

    def _ours(self) -> tuple[Any, ...]:
        return self.model, self.data, self.method, self.output, self.evaluation, self.baseline


def load_settings(argv: list[str]) -> Settings:
    """Read the command line and the YAML file that it names, once, with the defaults of this machine.

    Args:
        argv: without the program's name.
    Raises:
        UserError: see parse().
    """
    source = source_of(argv)
    return _build(replace(source, defaults=machine_defaults(source.names)), source.names)


def parse(argv: list[str], defaults: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a command line and of its --config FILE (YAML). Flags win over YAML, YAML over defaults.

    Args:
        argv: without the program's name.
        defaults: values of flags that neither the command line nor the YAML file gives.
    Raises:
        UserError: a flag or key is unknown (the nearest is named), or a value has the wrong type or range.
    """
    # Without this machine's defaults: the caller gives them.
    source = source_of(argv)
    return _build(replace(source, defaults=defaults or {}), source.names)


def _build(source: Source, given: frozenset[str]) -> Settings:
    # Check names first: a misspelt key would be taken for a flag's missing value.
    known = _known_flags()
    unknown = [name for name in source.config if name not in known]
    if unknown:
        raise UserError(unknown_keys(unknown, known))
    _refuse_lists(source.config)

    # The parser lets the last of a repeated flag win: defaults, then the recipe, then YAML, then the command line.
    recipe = settings_of(source.recipe)
    given = given | set(recipe)
    filled = {**source.defaults, **recipe, **source.config}
    flags = [item for name, value in filled.items() for item in flags_of(name, value)] + list(source.command)
    flags = with_config_paths(flags)
    _refuse_no_text(flags)

    # Ours first. What is left must be transformers' own.
    ours = make_parser(*OURS)
    *parsed, rest = ours.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    for item in rest:
        if item.startswith("--") and flag_name(item) not in known:
            raise UserError(f"unknown flag {item.split('=')[0]}.{hint(flag_name(item), known)}")
    for part in parsed[: len(OURS)]:
        require_countable(part)
    model, data, method, output, evaluation, baseline = parsed[: len(OURS)]
    return Settings(
        model=model,
        data=data,
        method=method,
        output=output,
        evaluation=evaluation,
        baseline=baseline,
        flags=tuple(rest),
        given=given,
        source=source,
    )


def print_help(meanings: Mapping[str, str]) -> None:
    """Print every flag with its meaning on stdout, once.

    Args:
        meanings: name of a flag -> help to show in place of its own.
    """
    # A launcher starts several processes; one of them speaks.
    if os.environ.get("RANK", "0") != "0":
        return
    parser = every_flag()
    parser.epilog = HELP
    for action in parser._actions:
        if action.dest in meanings:
            action.help = meanings[action.dest].replace("%", "%%")
    parser.print_help(sys.stdout)


def every_flag() -> argparse.ArgumentParser:
    """Return a parser of every flag, ours first, for those who show them. Values are parsed by parse()."""
    parser = make_parser(*OURS, TrainingArguments)
    # Where both have a flag, the parser shows transformers' own help.
    ours = {field.name: field.metadata["help"] for field in shared_fields()}
    for action in parser._actions:
        if action.dest in ours:
            action.help = ours[action.dest].replace("%", "%%")
    return parser


def shared_fields() -> list[Any]:
    """Return our fields that bear the name of one of TrainingArguments' and take its place."""
    theirs = {field.name for field in fields(TrainingArguments)}
    return [field for cls in OURS for field in fields(cls) if field.name in theirs]


def _known_flags() -> list[str]:
    return [field.name for cls in (*OURS, TrainingArguments) for field in fields(cls) if field.init]


def _refuse_lists(config: Mapping[str, Any]) -> None:
    """Raise UserError for a list where a flag takes one value."""
    one_value = {
        action.dest for action in make_parser(*OURS, TrainingArguments)._actions if action.nargs in (None, "?")
    }
    for name, value in config.items():
        if isinstance(value, list) and name in one_value and len(flags_of(name, value)) != 2:
            raise UserError(f"key {name!r} in the YAML file takes one value, got a list of {len(value)}")


def _refuse_no_text(flags: list[str]) -> None:
    """Raise UserError for a value that no file can hold: a file's name in another encoding, or half a character."""
    name = "a value"
    for item in flags:
        name = item.split("=")[0] if item.startswith("--") else name
        try:
            item.encode()
        except UnicodeEncodeError:
            shown = ascii(item)[:80]
            raise UserError(f"{ascii(name)[1:-1][:80]}: {shown} is no UTF-8 text, as run.json is: rename it") from None
