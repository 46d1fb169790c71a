"""Write a delta as an adapter of PEFT, for PeftModel.from_pretrained(model, folder): no piece_ds is needed to load it.

Weights of Linear modules become a SHiRA adapter: fp32 differences at 2-D int32 positions. Every module has
r * (rows + columns) of them, with the same r. Source: peft/tuners/shira, read at 0.21.2. Any other changed module
(norms, layers whose bias changes, embeddings, convolutions, stacked experts) the adapter holds whole, as
modules_to_save, so that it has the delta's bits.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from piece_ds.checkpoint.artifact import write_tensors
from piece_ds.deltas.delta import Change, Delta
from piece_ds.models.layout import full_shape
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json


@dataclass(frozen=True)
class PeftExport:
    """What export_peft() has written.

    Attributes:
        num_inexact: selected values that base + difference does not give to the bit. If a value crosses zero or changes
            by orders of magnitude, there may be no fp32 difference that leads from one to the other.
        whole: modules that the adapter holds whole.
        whole_bytes: of their parameters.
        rank: SHiRA's r.
        num_padding: places of SHiRA that hold no change, since every module has r * (rows + columns).
        unmergeable: one of whole that has no `weight` of its own, such as stacked experts, or None. The adapter
            computes with it, but PEFT 0.21's merge_and_unload() ends in an AttributeError there.
    """

    num_inexact: int
    whole: tuple[str, ...]
    whole_bytes: int
    rank: int
    num_padding: int
    unmergeable: str | None


def export_peft(
    delta: Delta, output: Path | str, model: nn.Module, base_model: str, read: Callable[[str], Tensor]
) -> PeftExport:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained(model, output).

    A module's differences are padded to r * (rows + columns) with zeros at its first element. r is the smallest that
    serves all modules. PEFT wants at least one such module: if no Linear weight has changed, the smallest one joins
    with differences of zero.

    Args:
        delta: to export.
        output: folder for both files.
        model: that the delta belongs to; only names, shapes and classes are read, so it may be empty.
        base_model: what the adapter's configuration names as its base.
        read: returns a parameter of the base.
    Raises:
        UserError: no previous values; a changed parameter that shares its values with another one, or lies beside other
            modules in one that PEFT cannot hold whole; no Linear weight; or more changes than SHiRA can hold.
    """
    if not delta.reversible:
        raise UserError(f"delta {delta.path} has no previous values, which an adapter of differences needs")

    # Which changes become differences, and which modules are held whole: every parameter of theirs, changed or not.
    linear, owner = _linear_weights(model), _holders(model)
    outside = [name for name in delta.shapes if name not in linear]
    lost = [name for name in outside if name not in owner]
    if lost:
        raise UserError(
            f"a PEFT adapter holds differences of Linear weights, and other modules whole; delta {delta.path} also "
            f"changes {lost[0]!r}, which is tied to another parameter or lies in a module beside others: --format "
            "piece-peft holds every change, or use piece_ds delta merge"
        )
    whole = {owner[name] for name in outside}
    sparse = [name for name in delta.shapes if name in linear and owner.get(name) not in whole]
    changes = {name: delta.change(name) for name in sparse} or _nothing(model, linear, whole)
    if not changes:
        raise UserError(f"{base_model} has no Linear weight, which a PEFT adapter needs: use piece_ds delta merge")

    # The differences.
    rank = _rank(changes, model)
    tensors: dict[str, Tensor] = {}
    num_inexact = 0
    for name, change in changes.items():
        rows_columns, weight, inexact = _shira(change, _shape(model, name), rank)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.shira_indices"], tensors[f"{module}.shira_weight"] = rows_columns, weight
        num_inexact += inexact

    # The modules that are held whole.
    num_bytes = 0
    for name in (name for name, module in owner.items() if module in whole):
        tensor = _changed(read(name), delta, name)
        tensors[f"base_model.model.{name}"] = tensor
        num_bytes += tensor.nbytes

    # The configuration names the modules in the order of the file.
    output = Path(output)
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(output / "adapter_config.json", _adapter_config(rank, list(changes), sorted(whole), base_model))
    places = sum(rank * sum(_shape(model, name)) for name in changes)
    padding = places - sum(change.index.numel() for change in changes.values())
    unmergeable = next((name for name in sorted(whole) if not hasattr(model.get_submodule(name), "weight")), None)
    return PeftExport(
        num_inexact, tuple(sorted(whole)), num_bytes, rank=rank, num_padding=padding, unmergeable=unmergeable
    )


def _linear_weights(model: nn.Module) -> set[str]:
    """Return names of the weights of Linear modules that are no other module's too, such as a tied head's."""
    uses = _num_uses(model)
    modules = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name, module in modules.items() if uses[id(module.weight)] == 1}


def _holders(model: nn.Module) -> dict[str, str]:
    """Return parameter -> its module, for modules that an adapter can hold whole.

    No part of them is a module with parameters, which might be adapted by itself, and none is shared.
    """
    uses = _num_uses(model)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if len(own) == len(list(module.parameters())) and all(uses[id(param)] == 1 for param in own.values()):
            found |= {f"{name}.{parameter}": name for parameter in own}
    return found


def _num_uses(model: nn.Module) -> Counter[int]:
    """Return how many modules hold each parameter, by its id."""
    return Counter(id(param) for module in model.modules() for param in module._parameters.values())


def _nothing(model: nn.Module, linear: Iterable[str], whole: set[str]) -> dict[str, Change]:
    """Return no change of the smallest Linear weight outside the modules that are held whole, if there is one."""
    free = [name for name in linear if name.removesuffix(".weight") not in whole]
    if not free:
        return {}
    empty = torch.zeros(0)
    name = min(free, key=lambda name: (prod(_shape(model, name)), name))
    return {name: Change(empty.long(), empty, empty)}


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(full_shape(model.get_parameter(name)))


def _rank(changes: dict[str, Change], model: nn.Module) -> int:
    """Return SHiRA's r, one for all modules: the largest that any of them needs.

    Raises:
        UserError: some module has fewer elements than that.
    """
    shapes = {name: _shape(model, name) for name in changes}
    rank = max(1, *(-(-change.index.numel() // sum(shapes[name])) for name, change in changes.items()))
    tight = [name for name in changes if rank * sum(shapes[name]) > prod(shapes[name])]
    if tight:
        raise UserError(
            f"SHiRA gives every module r * (rows + columns) elements, here r = {rank}, which is more than "
            f"{tight[0]!r} of shape {list(shapes[tight[0]])} has: use piece_ds delta merge"
        )
    return rank


def _changed(base: Tensor, delta: Delta, name: str) -> Tensor:
    """Return a parameter of the base with the delta's values."""
    whole = base.clone().view(-1)
    if name in delta.shapes:
        change = delta.change(name)
        whole[change.index] = change.values
    return whole.view(base.shape)


def _shira(change: Change, shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor, int]:
    """Return one module's part of the adapter.

    Returns:
        Positions, int32 (2, r (m + n)); differences, fp32 (r (m + n)); and how many values they do not reproduce.
    """
    assert change.previous is not None
    length = rank * sum(shape)
    difference = (change.values.double() - change.previous.double()).float()
    # PEFT adds in fp32 and rounds: count where that misses the delta's value.
    reproduced = (change.previous.float() + difference).to(change.values.dtype)
    index = torch.zeros(length, dtype=torch.int64)
    weight = torch.zeros(length)
    index[: change.index.numel()], weight[: change.index.numel()] = change.index, difference
    positions = torch.stack([index // shape[1], index % shape[1]]).to(torch.int32)
    return positions, weight, int((reproduced != change.values).sum())


def _adapter_config(rank: int, names: list[str], whole: list[str], base_model: str) -> dict[str, object]:
    """Return what ShiraConfig.from_pretrained() needs.

    A mask_type other than 'random' makes PEFT take the positions from the file.
    """
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "mask_type": "precomputed",
        "target_modules": [name.removesuffix(".weight") for name in names],
        "modules_to_save": whole or None,
    }
