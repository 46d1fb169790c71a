"""Refuse options of activation checkpointing that transformers and torch would refuse once the model is loaded."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from piece_ds.runtime.errors import UserError, nearest

# Options of torch.utils.checkpoint that JSON can hold, and those that are true or false: text would count as true.
_OF_TORCH = ["use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"]
_SWITCHES = ("use_reentrant", "preserve_rng_state", "debug", "early_stop")


def check_activation_checkpointing(arguments: TrainingArguments, make_model: Callable[[], nn.Module]) -> None:
    """Raise UserError if activations cannot be checkpointed as --gradient_checkpointing asks for.

    Args:
        arguments: of the run.
        make_model: returns the model without weights. Called only if activations are checkpointed.
    """
    if not arguments.gradient_checkpointing:
        return
    flag = "--gradient_checkpointing_kwargs"
    given = arguments.gradient_checkpointing_kwargs
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{flag} expects a JSON object such as '{{\"use_reentrant\": false}}', got {given!r:.80}")

    # What a newer transformers takes for itself.
    options = dict(given or {})
    if "activation_checkpointing" in {field.name for field in fields(arguments)}:
        _check_own(flag, options.pop("every_n_layers", 1), options.pop("offload", False))

    # What torch takes, tried on one function. To other names it would give the function's own meaning.
    unknown = next((name for name in options if name not in _OF_TORCH), None)
    if unknown is not None:
        raise UserError(f"{flag}: {unknown!r} is unknown; known: {', '.join(_OF_TORCH)}.{nearest(unknown, _OF_TORCH)}")
    for name in _SWITCHES:
        if not isinstance(options.get(name, False), bool):
            raise UserError(f"{flag}: {name} expects true or false, got {options[name]!r:.80}")
    try:
        checkpoint(torch.tanh, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options}).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{flag} {given!r:.200}: {' '.join(str(error).split())}") from error

    # Whether the model's class can do it at all.
    model = make_model()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has another name for it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise UserError(
            f"--gradient_checkpointing: {type(model).__name__} cannot checkpoint activations "
            f"({' '.join(str(error).split())[:200]}): leave it out"
        ) from error


def _check_own(flag: str, every_n_layers: Any, offload: Any) -> None:
    if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
        raise UserError(f"{flag}: every_n_layers expects a whole number of at least 1, got {every_n_layers!r:.80}")
    if offload is not False:
        raise UserError(
            f"{flag}: offload {offload!r:.80} is not proven with sampled gradients, which keep activations too: leave "
            "it out"
        )
