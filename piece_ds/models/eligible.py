"""Which parameters may be selected.

The rule leaves out, unless the user names them:

- the input embeddings, and an output head tied to them. The user may name some of their rows, those of added tokens
  for instance: 'model.embed_tokens.weight[49152:]';
- the encoder of images, video or sound, with everything in it: patch and position embeddings, blocks, norms. The merger
  or projector that feeds the language model stays eligible;
- routers of a mixture of experts: what decides which experts see a token. A small step there sends tokens to experts
  that never saw their like, and undoes the balance that the model was trained to. Experts stay eligible.

Parameters that the user excludes by name are never eligible. The encoder is found by transformers' get_encoder(), not
by the names of any one model.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from piece_ds.config.piece import split_patterns
from piece_ds.models.experts import router_names
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.state.partition import Layout

_MODALITIES = ("image", "video", "audio")
# Parts inside a tower that map into the language model's space. transformers marks them only by name:
# `merger` and `deepstack_merger_list` of the Qwen-VL and GLM-V families, `multi_modal_projector`, `aligner`, ...
_INTO_TEXT = ("merger", "projector", "connector", "aligner", "resampler")
_ADDED, _EXCLUDED = "_piece_ds_eligible", "_piece_ds_excluded"
_ROWS = "_piece_ds_rows"
# A pattern that ends in rows, written as Python's slices are: NAME[first:past_the_last], either of them left out.
_SLICE = re.compile(r"(?P<pattern>.+)\[(?P<first>-?\d*):(?P<stop>-?\d*)\]")


def input_embedding(model: nn.Module) -> nn.Parameter | None:
    """Return the input embedding's weight, or None for a model without get_input_embeddings()."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return getattr(module, "weight", None)


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> encoder of images, video or sound, if the model also reads text; empty for a text model."""
    getter: Any = getattr(model, "get_encoder", None)
    found = {id(getter(modality=modality)) for modality in _MODALITIES} if _takes_modality(getter) else set()
    # A model without an encoder of its own returns itself: then nothing is a tower.
    whole = (model, getattr(model, "base_model", model))
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in found and not any(module is one for one in whole)
    }


def _takes_modality(getter: Any) -> bool:
    """Return whether get_encoder() takes `modality`, as transformers' own does; others may return a text encoder."""
    code = getattr(getter, "__code__", None)
    return code is not None and "modality" in code.co_varnames[: code.co_argcount]


def in_towers(model: nn.Module) -> set[str]:
    """Return names of the parameters in towers(), except those of parts that map into the language model's space."""
    found = set()
    for tower, module in towers(model).items():
        for name, _ in module.named_parameters():
            if not any(word in name.lower() for word in _INTO_TEXT):
                found.add(f"{tower}.{name}")
    return found


def embedding_names(model: nn.Module) -> set[str]:
    """Return the input embedding's name in named_parameters(). A head tied to it has no name of its own there."""
    embedding = input_embedding(model)
    # By identity, as names differ from one architecture to the next.
    return {name for name, param in model.named_parameters() if param is embedding}


def is_tied(model: nn.Module) -> bool:
    """Return whether the input embedding and the output head are one parameter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = input_embedding(model)
    return embedding is not None and getattr(head, "weight", None) is embedding


def ineligible(model: nn.Module) -> set[str]:
    """Return names, as in named_parameters(), of the parameters that may not be selected, whatever their gradients."""
    return (_left_out(model) - getattr(model, _ADDED, frozenset())) | getattr(model, _EXCLUDED, frozenset())


def _left_out(model: nn.Module) -> set[str]:
    """Return what the rule leaves out, before the user's patterns."""
    return embedding_names(model) | in_towers(model) | router_names(model)


def make_eligible(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Make parameters eligible that the rule leaves out, if their names match; return their names in the model's order.

    A second call replaces the choice of the first.

    Args:
        model: a model of transformers, or any module.
        patterns: fnmatch patterns for whole names of named_parameters(); '*' also matches dots. One that ends in
            [a:b] means rows a to b - 1 of the first dimension alone, counted as Python's slices count.
    Raises:
        UserError: a pattern makes nothing eligible; the message says why.
    """
    shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in model.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    # Only what the rule leaves out can be added: a pattern that adds nothing is a mistake to report.
    left_out = _left_out(model)
    added: set[str] = set()
    rows: dict[str, tuple[int, int]] = {}
    for pattern in patterns:
        sliced = _SLICE.fullmatch(pattern)
        matching = {name for name in names if fnmatchcase(name, sliced["pattern"] if sliced else pattern)}
        if not matching & left_out:
            raise UserError(f"--eligible {pattern!r} makes nothing eligible: {_reason(matching, left_out)}")
        for name in matching & left_out:
            wanted = _rows_of(pattern, name, shapes[name], sliced) if sliced else None
            if name in added and rows.get(name) != wanted:
                raise UserError(f"--eligible {pattern!r}: another pattern has named {name!r} already: name it once")
            if wanted is not None:
                rows[name] = wanted
        added |= matching & left_out
    # The choice is kept on the model, so that every later layout of it agrees.
    setattr(model, _ADDED, frozenset(added))
    setattr(model, _ROWS, rows)
    return [name for name in names if name in added]


def _rows_of(pattern: str, name: str, shape: tuple[int, ...], sliced: re.Match[str]) -> tuple[int, int]:
    """Return (first row, past the last) that a pattern's slice means of a parameter."""
    height = shape[0] if shape else 1
    first, stop = (int(sliced[end]) if sliced[end] else None for end in ("first", "stop"))
    begin, end, _ = slice(first, stop).indices(height)
    if begin >= end or any(bound is not None and abs(bound) > height for bound in (first, stop)):
        raise UserError(
            f"--eligible {pattern!r} names no row of {name!r}, which has {height}: give the ids of added tokens, from "
            "the first to one past the last"
        )
    return begin, end


def names_rows(patterns: str | None) -> bool:
    """Return whether any of comma-separated patterns means rows of a parameter."""
    return any(_SLICE.fullmatch(pattern) for pattern in split_patterns(patterns))


def eligible_rows(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return parameter name -> (first, past the last) row that may be selected, if not all of them may."""
    rows: dict[str, tuple[int, int]] = getattr(model, _ROWS, {})
    return rows


def _reason(matching: set[str], left_out: set[str]) -> str:
    if not left_out:
        return "every parameter is already"
    if not matching:
        between = f" to {max(left_out)}" if len(left_out) > 1 else ""
        return f"no parameter has such a name; left out: {min(left_out)}{between}"
    return f"{min(matching)} is already"


def exclude(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Make parameters with matching names ineligible; return their names in the model's order.

    A second call replaces the choice of the first.

    Args:
        model: a model of transformers, or any module.
        patterns: fnmatch patterns, as in make_eligible().
    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    excluded = matching_names(names, patterns)
    setattr(model, _EXCLUDED, frozenset(excluded))
    return [name for name in names if name in excluded]


def without(layout: Layout, patterns: Iterable[str]) -> Layout:
    """Return layout with the parameters that match patterns marked ineligible.

    Raises:
        UserError: a pattern matches no parameter.
    """
    excluded = matching_names([info.name for info in layout.parameters], patterns)
    infos = (replace(info, eligible=info.eligible and info.name not in excluded) for info in layout.parameters)
    return replace(layout, parameters=tuple(infos)) if excluded else layout


def matching_names(names: list[str], patterns: Iterable[str]) -> set[str]:
    """Return those of names that any of the fnmatch patterns matches.

    Raises:
        UserError: a pattern matches no name.
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise UserError(f"exclude {pattern!r} matches no parameter of the model.{nearest(pattern, names)}")
        found |= matching
    return found


def let_gradients_in(model: nn.Module) -> None:
    """Make gradients reach the blocks under reentrant checkpointing.

    Reentrant checkpointing computes gradients only if an input of the block requires one. With frozen input embeddings
    no input does, so the blocks would get no gradient. A tower gets the same treatment only if some of it trains;
    otherwise backward would run through a frozen tower for nothing.
    """
    if not hasattr(model, "enable_input_require_grads"):
        return
    encoders = towers(model)
    if not encoders:
        model.enable_input_require_grads()
        return
    # transformers' own hook would also open every tower: hook the text embedding only.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    inside = in_towers(model)
    training = [name for name, param in model.named_parameters() if name in inside and param.requires_grad]
    for tower, module in encoders.items():
        if any(name.startswith(f"{tower}.") for name in training):
            module.register_forward_pre_hook(_requiring_gradients, with_kwargs=True)


def _requiring_gradients(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a tower's inputs with every floating tensor made to require a gradient. Indices stay as they are."""

    def require(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_(True) if is_float else value

    return tuple(map(require, args)), {name: require(value) for name, value in kwargs.items()}
