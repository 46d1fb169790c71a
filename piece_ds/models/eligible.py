"""Which parameters may be selected: the rule for the input embeddings and for towers that encode images or sound.

Not eligible, unless named: the input embeddings (and a head tied to them) and an encoder of another modality than text
with all that stands in it (patch and position embeddings, blocks, norms), except the merger or projector by which it
enters the language model. Parameters that are excluded by name never are. The encoder is where transformers says that
it is (get_encoder()), not at one model's names.
"""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from piece_ds.runtime.errors import UserError, nearest
from piece_ds.state.partition import Layout

_MODALITIES = ("image", "video", "audio")
# Parts that stand inside a tower but map into the language model's space. transformers marks them by name alone:
# `merger` and `deepstack_merger_list` of the Qwen-VL and GLM-V families, `multi_modal_projector`, `aligner`, ...
_INTO_TEXT = ("merger", "projector", "connector", "aligner", "resampler")
_ADDED, _EXCLUDED = "_piece_ds_eligible", "_piece_ds_excluded"


def input_embedding(model: nn.Module) -> nn.Parameter | None:
    """Return the input embedding's weight, or None for a model without get_input_embeddings()."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return getattr(module, "weight", None)


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> encoder of images, video or sound inside a model that also has text; empty for a text model."""
    getter: Any = getattr(model, "get_encoder", None)
    found = {id(getter(modality=modality)) for modality in _MODALITIES} if _takes_modality(getter) else set()
    whole = (model, getattr(model, "base_model", model))
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in found and not any(module is one for one in whole)
    }


def _takes_modality(getter: Any) -> bool:
    """Return whether get_encoder is the one of transformers' models: another one may mean the text encoder."""
    code = getattr(getter, "__code__", None)
    return code is not None and "modality" in code.co_varnames[: code.co_argcount]


def in_towers(model: nn.Module) -> set[str]:
    """Return names of the parameters in towers(), without what maps into the language model's space."""
    found = set()
    for tower, module in towers(model).items():
        for name, _ in module.named_parameters():
            if not any(word in name.lower() for word in _INTO_TEXT):
                found.add(f"{tower}.{name}")
    return found


def embedding_names(model: nn.Module) -> set[str]:
    """Return the input embedding's name in named_parameters(); a head tied to it has no name of its own there."""
    embedding = input_embedding(model)
    return {name for name, param in model.named_parameters() if param is embedding}


def is_tied(model: nn.Module) -> bool:
    """Return whether the input embedding is the output head too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = input_embedding(model)
    return embedding is not None and getattr(head, "weight", None) is embedding


def ineligible(model: nn.Module) -> set[str]:
    """Return the names, as in named_parameters(), of what may not be selected whatever its gradients."""
    by_rule = embedding_names(model) | in_towers(model)
    return (by_rule - getattr(model, _ADDED, frozenset())) | getattr(model, _EXCLUDED, frozenset())


def make_eligible(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Let model's parameters be selected that the rule leaves out, if their names match; return those names.

    Args:
        patterns: of fnmatch, for whole names of named_parameters(): '*' matches anything, dots too.
    Raises:
        UserError: a pattern that makes nothing eligible, with the reason.
    """
    names = [name for name, _ in model.named_parameters()]
    left_out = in_towers(model) | embedding_names(model)
    added: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching & left_out:
            raise UserError(f"--eligible {pattern!r} makes nothing eligible: {_reason(matching, left_out)}")
        added |= matching & left_out
    setattr(model, _ADDED, frozenset(added))
    return [name for name in names if name in added]


def _reason(matching: set[str], left_out: set[str]) -> str:
    if not left_out:
        return "every parameter is already"
    if not matching:
        between = f" to {max(left_out)}" if len(left_out) > 1 else ""
        return f"no parameter has such a name; left out: {min(left_out)}{between}"
    return f"{min(matching)} is already"


def exclude(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Keep model's parameters with matching names from being selected; return those names.

    Raises:
        UserError: a pattern that names nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    excluded = matching_names(names, patterns)
    setattr(model, _EXCLUDED, frozenset(excluded))
    return [name for name in names if name in excluded]


def without(layout: Layout, patterns: Iterable[str]) -> Layout:
    """Return layout with the parameters that match patterns not eligible.

    Raises:
        UserError: a pattern that names nothing.
    """
    excluded = matching_names([info.name for info in layout.parameters], patterns)
    infos = (replace(info, eligible=info.eligible and info.name not in excluded) for info in layout.parameters)
    return replace(layout, parameters=tuple(infos)) if excluded else layout


def matching_names(names: list[str], patterns: Iterable[str]) -> set[str]:
    """Return those of names that any of the fnmatch patterns of `exclude` matches.

    Raises:
        UserError: a pattern that matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise UserError(f"exclude {pattern!r} matches no parameter of the model.{nearest(pattern, names)}")
        found |= matching
    return found


def let_gradients_in(model: nn.Module) -> None:
    """Make gradients reach the blocks under reentrant checkpointing, which passes them through inputs alone.

    Where the input embeddings are frozen no input of a block requires a gradient, so the blocks would get none. Only
    towers that train are treated so too: else backward would run through all of a frozen one for nothing.
    """
    if not hasattr(model, "enable_input_require_grads"):
        return
    encoders = towers(model)
    if not encoders:
        model.enable_input_require_grads()
        return
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    inside = in_towers(model)
    training = [name for name, param in model.named_parameters() if name in inside and param.requires_grad]
    for tower, module in encoders.items():
        if any(name.startswith(f"{tower}.") for name in training):
            module.register_forward_pre_hook(_requiring_gradients, with_kwargs=True)


def _requiring_gradients(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a tower's inputs, of which those that are no indices require a gradient."""

    def require(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_(True) if is_float else value

    return tuple(map(require, args)), {name: require(value) for name, value in kwargs.items()}
