"""Handle a config.json that no model was made with: what a library says of it, and sizes that would never end."""

import os
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from piece_ds.runtime.errors import UserError

# Parts that are made one by one, so that a huge number would build modules for hours. The deepest known model has a few
# hundred layers, and the widest mixture a few hundred experts.
_PARTS = re.compile(r"(^|_)(n_layers?|num_\w*layers|depth|n_\w*experts|num_\w*experts)$")
_MOST_PARTS = 10_000
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def refuse_odd_config(source: str, config: Any) -> None:
    """Raise UserError if config asks for what no model that trains has.

    No layer, no token or far too many of them, a dropout rate that is no probability, and outputs without a loss.

    Args:
        source: what the configuration is of, for the message.
        config: of transformers.
    """
    try:
        content = config.to_dict()
    except Exception as error:  # a part of it is of the wrong kind
        raise UserError(f"{source}: its config.json cannot be used ({first_words(error)}): mend it") from error
    if content.get("return_dict") is False or content.get("output_attentions") is True:
        name = "return_dict false" if content.get("return_dict") is False else "output_attentions true"
        raise UserError(f"{source}: its config.json says {name}, with which it gives no loss to train on: remove it")
    for name, value in _numbers(content):
        if ("dropout" in name or name.endswith(("drop", "dropout_prob"))) and not 0 <= value <= 1:
            raise UserError(f"{source}: its config.json says {name} {value:.6g}, expected a probability: mend it")
        if name in _DEPTHS and value < 1:
            raise UserError(f"{source}: its config.json asks for {name} {value:.6g}: a model has at least one layer")
        if name == "vocab_size" and value < 1:
            raise UserError(f"{source}: its config.json asks for {name} {value:.6g}: a model has at least one token")
        if _PARTS.search(name) and value > _MOST_PARTS:
            raise UserError(f"{source}: its config.json asks for {name} {value:.6g}, which no model has: mend it")


def _numbers(content: dict[str, Any]) -> list[tuple[str, float]]:
    """Return (name, number) of a configuration and of those inside it."""
    found = []
    for name, value in content.items():
        if isinstance(value, dict):
            found += _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((str(name), float(value)))
    return found


def missing_folder(source: str) -> str | None:
    """Return what is not there of a source that transformers could not open; None if it may be the Hub's matter.

    A Hub id has at most one slash, and few signs: anything else was meant as a path, of which the Hub says nothing.
    """
    if os.path.isdir(source):
        if os.path.exists(os.path.join(source, "config.json")):
            return None
        if os.path.exists(os.path.join(source, "adapter_config.json")):
            return "the folder holds a PEFT adapter alone: give its base model, or merge the adapter into it"
        return "the folder holds no config.json"
    if os.path.exists(source):
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return "there is no such folder"
    if source.endswith(".json"):
        return "there is no such file"
    # As good as an id, but it begins with a folder that is here.
    first, slash, _ = source.partition("/")
    return (
        "there is no such folder, nor such a model on the Hub or in its cache"
        if slash and os.path.isdir(first)
        else None
    )


def first_words(error: BaseException) -> str:
    """Return what a library says of what it cannot use, in one short line with the kind of the error."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
