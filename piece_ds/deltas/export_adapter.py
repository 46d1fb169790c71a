"""Write a delta as an adapter of PEFT for this package's own tuner, which holds any parameter sparsely.

export_peft.py writes what PEFT loads by itself; that holds whole what is no Linear weight.
"""

from math import prod
from pathlib import Path

from torch import Tensor

from piece_ds.checkpoint.artifact import write_tensors
from piece_ds.deltas.delta import Delta
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.extras import require_extra
from piece_ds.runtime.files import write_json
from piece_ds.state.partition import INT32_MAX


def register_peft_tuner() -> None:
    """Let PEFT load adapters that `piece_ds delta export --format piece-peft` writes. Call it once in a process.

    Raise UserError if peft is not installed.
    """
    require_extra("peft", "an adapter of piece_ds")
    from piece_ds.deltas.peft_tuner import register

    register()


def export_adapter(delta: Delta, output: Path | str, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained(model, output).

    Args:
        delta: to export.
        output: folder for both files.
        base_model: what the adapter's configuration names as its base.
    Raises:
        UserError: no previous values; or a changed parameter lies in a module that holds another changed one.
    """
    if not delta.reversible:
        raise UserError(f"delta {delta.path} has no previous values, which an adapter needs to be taken off again")

    # A module is wrapped; one inside another that is wrapped would get another name.
    modules = {name.rpartition(".")[0] for name in delta.shapes}
    outer = [name for name in sorted(modules) if any(other.startswith(f"{name}.") for other in modules) or not name]
    if outer:
        raise UserError(
            f"delta {delta.path} changes a parameter of {outer[0]!r} itself and one of a module in it, which no "
            "adapter can hold: use piece_ds delta merge"
        )

    # Positions as small as they can be, and both values of each.
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, change in delta.changes():
        assert change.previous is not None
        module, _, parameter = name.rpartition(".")
        small = prod(delta.shapes[name]) <= INT32_MAX
        parts = {"indices": change.index.int() if small else change.index}
        parts |= {"values": change.values, "previous": change.previous}
        for part, tensor in parts.items():
            tensors[f"base_model.model.{module}.piece_{parameter}_{part}"] = tensor
        counts[name] = change.index.numel()

    # The configuration says how much room a loader makes.
    output = Path(output)
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "PIECE", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model}
    write_json(output / "adapter_config.json", {**config, "inference_mode": True, "counts": counts})
