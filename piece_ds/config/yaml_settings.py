"""Print every setting as YAML that --config reads back: what `--print_config` prints."""

from dataclasses import fields
from enum import Enum
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from piece_ds.config.settings import Settings, shared_fields


def settings_yaml(settings: Settings) -> str:
    """Return all settings with the values in force and what they mean: ours first, then TrainingArguments'."""
    # Ours, each with its help as a comment.
    lines = []
    for part in (
        settings.model,
        settings.data,
        settings.method,
        settings.output,
        settings.evaluation,
        settings.baseline,
    ):
        lines += ["", f"# {type(part).__name__}: {_first_line(type(part).__doc__)}"]
        lines += [_entry(field.name, getattr(part, field.name), field.metadata.get("help")) for field in fields(part)]

    # transformers' own, from the flags: TrainingArguments itself would start what it configures.
    given = HfArgumentParser((TrainingArguments,), allow_abbrev=False).parse_args(list(settings.flags))
    ours = {field.name for field in shared_fields()}
    lines += ["", "# TrainingArguments: transformers' own; see its page for what they mean"]
    lines += [
        _entry(field.name, getattr(given, field.name))
        for field in fields(TrainingArguments)
        if hasattr(given, field.name) and field.name not in ours
    ]
    return "\n".join(lines).lstrip() + "\n"


def _entry(name: str, value: Any, meaning: str | None = None) -> str:
    if meaning:
        meaning = meaning.replace("%%", "%")  # as argparse shows it
    line = yaml.safe_dump({name: _plain(value)}, default_flow_style=False, width=10_000, allow_unicode=True).strip()
    return f"{line}  # {meaning}" if meaning and "\n" not in line else line


def _plain(value: Any) -> Any:
    """Return value as YAML has it. Empty containers count as not given."""
    if isinstance(value, Enum):
        return value.value
    if value in ([], {}, ()):
        return None
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
