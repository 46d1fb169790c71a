"""Turn flags into dataclasses. A library's complaint about a value becomes one line that names the flag."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from transformers import HfArgumentParser, TrainingArguments

from piece_ds.runtime.errors import UserError

_LONGEST_MESSAGE = 600  # characters: a value of thousands of digits is not repeated whole

# What TrainingArguments, and the libraries that it calls, raise for values that they cannot use.
_REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ImportError,
    OSError,
    ArithmeticError,
    RuntimeError,
)


class OneLineParser(HfArgumentParser):
    """argparse prints its whole usage before an error; a user wants only the error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(_shortened(message))


def make_parser(*classes: type) -> OneLineParser:
    """Return a parser of the flags of dataclasses. A flag that two of them have is that of the later one."""
    return OneLineParser(
        classes,
        allow_abbrev=False,
        conflict_handler="resolve",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def training_arguments_of(flags: Sequence[str]) -> TrainingArguments:
    """Return TrainingArguments of flags.

    Raises:
        UserError: transformers refuses a value; the message names its flag.
    """
    try:
        return _built(flags)
    except UserError:
        raise
    except _REFUSALS as error:
        # A library's message may not say which flag it is about.
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError | ImportError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        culprit = None if "--" in reason else _culprit(flags)
        raise UserError(_shortened(f"{culprit}: {reason}" if culprit else reason)) from error


def _built(flags: Sequence[str]) -> TrainingArguments:
    arguments, *rest = make_parser(TrainingArguments).parse_args_into_dataclasses(
        list(flags), return_remaining_strings=True, look_for_args_file=False
    )
    if rest[-1]:
        raise UserError(_shortened(f"what flag do {' '.join(map(repr, rest[-1]))} belong to? A flag takes one value"))
    return arguments


def _culprit(flags: Sequence[str]) -> str | None:
    """Return the flag, with its value, without which the others are accepted; the last if there are several.

    Else None.
    """
    groups: list[list[str]] = []
    for item in flags:
        if item.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(item)

    # Only after an error, so the cost of many attempts does not matter.
    for left_out in reversed(range(len(groups))):
        try:
            _built([item for index, group in enumerate(groups) if index != left_out for item in group])
        except _REFUSALS:
            continue
        return " ".join(groups[left_out])
    return None


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]} ... {message[-half:]}"
