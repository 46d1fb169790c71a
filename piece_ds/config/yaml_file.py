"""Read the YAML file of --config: keys are flags' names, and a value means what it would mean on the command line.

YAML reads `no` as false, `010` as eight and `1:30` as ninety. A flag's value is text, so single values are taken as
they are written. Only what is inside a list or a mapping is read as YAML has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from piece_ds.runtime.errors import UserError

_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
_TRUE_OR_FALSE = {"on": "true", "off": "false"}  # YAML has more words for them than transformers

# Flags of one text with commas in it: a list means the same.
_COMMA_SEPARATED = ("tasks", "eligible", "exclude", "report_to", "debug", "columns", "scorers")


def read_yaml(path: str) -> dict[str, Any]:
    """Return key -> text, list, mapping or None of a YAML file.

    Raises:
        UserError: there is no such file, it is not YAML or no mapping, or a key is given twice.
    """
    if not _is_file(path):
        raise UserError(f"--config {path[:200]}: no such file")

    # Read nodes, not values: a node still has its text.
    loader = None
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
            raise UserError(f"--config {path} must map flag names to values, got {kind}")
        _refuse_doubles(path, node)
        loader.flatten_mapping(node)
        return {_name(key): _value(loader, value) for key, value in node.value}
    except UserError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--config {path} is not YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


def flags_of(name: str, value: Any) -> list[str]:
    """Return a key and its value as flags. None counts as not given.

    Raises:
        UserError: a list or a mapping holds itself.
    """
    if value is None:
        return []
    if isinstance(value, list) and name in _COMMA_SEPARATED:
        return [f"--{name}", ",".join(map(str, value))]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, Mapping):  # as lr_scheduler_kwargs: transformers reads JSON
        try:
            return [f"--{name}", json.dumps(value)]
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"key {name!r} in the YAML file holds what JSON cannot ({error})") from error

    # A value that begins with a dash would be taken for a flag.
    text = str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _name(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise UserError("a key in the YAML file is a list or mapping, expected the name of a flag")
    return str(key.value).removeprefix("--").replace("-", "_")


def _refuse_doubles(path: str, node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        name = _name(key)
        if name in seen and name != "<<":
            raise UserError(f"--config {path}, line {key.start_mark.line + 1}: key {name!r} is given twice")
        seen.add(name)


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL:
            return None
        is_word = node.tag == _BOOL and node.style is None
        return _TRUE_OR_FALSE.get(node.value.lower(), node.value) if is_word else node.value
    return loader.construct_object(node, deep=True)
