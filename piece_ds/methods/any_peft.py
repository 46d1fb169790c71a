"""Train any PEFT method as a baseline: one adapter through the whole stream, merged as PEFT merges it."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.methods.baseline import TaskContext
from piece_ds.methods.lora import FOLDER, LoRA
from piece_ds.methods.peft_config import difference, needs_whole_weights, read_peft_config
from piece_ds.models.loading import without_zero3
from piece_ds.runtime.environment import environment_kept
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import is_partitioned

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# BOFT sets both to gcc while it compiles an extension of its own, and leaves them so if it cannot. What is compiled
# later in the process, such as the kernels of piece_ds, would then be compiled by another compiler than the user's.
_COMPILERS = ("CC", "CXX")


class AnyPeft(LoRA):
    """The adapter that --peft_config describes: one through all tasks. PEFT may rewrite the base model once.

    Some methods (PiSSA, OLoRA, OSF) take their adapter out of the weights and leave the rest in them. So the weights of
    the run are merged, never the base model on disk. A resumed stream first makes the adapter again, from the same base
    model and seed, then reads what was trained.

    Source: PEFT.
    """

    reads_peft_config = True
    scalable = "none"

    def __init__(self, settings: BaselineArguments) -> None:
        super().__init__(settings)
        if settings.peft_config is None:
            raise UserError("--method peft needs --peft_config FILE, PEFT's own adapter_config.json (or YAML)")
        self.config = read_peft_config(settings.peft_config)

    def adapt(self, model: nn.Module, num_tasks: int, previous: Path | None) -> nn.Module:
        from peft import get_peft_model

        unfit = needs_whole_weights(self.config)
        if unfit and is_partitioned(*model.parameters()):
            raise UserError(
                f"--peft_config {self.settings.peft_config}: {unfit} begins with whole weights, which ZeRO-3 has put "
                "away: use ZeRO 0, 1 or 2"
            )
        try:
            with environment_kept(*_COMPILERS):
                adapted = get_peft_model(model, copy.deepcopy(self.config))
        except Exception as error:  # PEFT's checks of a configuration against a model raise whatever they raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--peft_config {self.settings.peft_config} does not fit the model: {reason}") from error
        if not any(param.requires_grad for param in adapted.parameters()):
            raise UserError(f"--peft_config {self.settings.peft_config} leaves nothing to train in this model")

        # Refuse now what could not be saved, and only then read what an earlier run has trained.
        _require_mergeable(adapted, str(self.settings.peft_config))
        if previous is not None:
            _load(adapted, previous / FOLDER)
        return adapted

    def save_model(self, model: nn.Module, state: dict[str, Tensor], context: TaskContext, to: Path | None) -> None:
        from peft import PeftModel

        assert isinstance(model, PeftModel)
        state = _under_every_name(model, state)
        model.save_pretrained(str(context.folder / FOLDER), state_dict=state)
        if to is not None:
            merged_model(model, state, self.config).save_pretrained(str(to))


def _require_mergeable(adapted: "PeftModel", path: str) -> None:
    """Raise UserError if PEFT cannot merge some layer. Better said now than after training.

    A copy of the first layer of each kind is merged. Under ZeRO-3, whose weights are elsewhere, nothing is tried.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried = set()
    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = cast(Any, module)  # PEFT's class is a mixin, of a module
        if is_partitioned(*layer.parameters()):
            continue
        kind = (type(layer), type(layer.get_base_layer()), tuple(n for n, _ in layer.named_parameters()))
        if kind in tried:
            continue
        tried.add(kind)
        try:
            copy.deepcopy(layer).merge()
        except Exception as error:  # PEFT's methods raise whatever they raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--peft_config {path}: the adapter of {name} cannot be merged: {reason}") from error


def _load(adapted: "PeftModel", folder: Path) -> None:
    """Set the adapter to the one that folder holds.

    Raises:
        UserError: there is none, or it was made by other settings.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} does not hold an adapter: the stream cannot go on from there")
    changed = difference(adapted.peft_config["default"], PeftConfig.from_pretrained(str(folder)))
    if changed:
        raise UserError(
            f"{folder} was trained with another --peft_config, which differs in {', '.join(changed)}: "
            "go on with the file that the stream began with"
        )
    set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))


def _under_every_name(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return state with each tensor under all of its names: PEFT looks for projections that layers share by any."""
    every = model.state_dict(keep_vars=True)
    found = {id(every[name]): tensor for name, tensor in state.items()}
    return {name: found[id(tensor)] for name, tensor in every.items() if id(tensor) in found}


def merged_model(model: "PeftModel", state: dict[str, Tensor], config: "PeftConfig") -> nn.Module:
    """Return the base model with the adapter merged by PEFT, in the base model's dtypes, on the CPU.

    Args:
        model: read for its class, configuration and buffers; its weights may be partitioned.
        state: names as in model.state_dict(), whole tensors; one that has several names stands under one of them.
        config: of the adapter.
    Raises:
        RuntimeError: state does not hold every weight of the model.
    Cost: a second model in fp32 on the host, in which PEFT merges; rounded once at the end.
    """
    from peft import get_peft_model

    # A second, whole model of the same structure.
    base = model.get_base_model()
    with without_zero3(), environment_kept(*_COMPILERS):
        plain = type(base)(copy.deepcopy(base.config))
        again = get_peft_model(plain, _quick(config)).float()

    # Weights are in state; buffers that no state dict holds (indices, projections) are the run's own.
    missing, unexpected = again.load_state_dict(state, strict=False)
    own = {name: buffer for name, buffer in again.named_buffers() if name not in state}
    for name, buffer in model.named_buffers():
        if name in own:
            own[name].copy_(buffer)
    every = again.state_dict()
    loaded = {every[name].data_ptr() for name in state if name in every}
    lost = [name for name in missing if every[name].data_ptr() not in loaded] + list(unexpected)  # tied ones are there
    if lost:
        raise RuntimeError(f"the adapted model cannot be merged: {lost[0]!r} is not where PEFT expects it")

    # Every weight in the dtype that it has in the model.
    prefix = "base_model.model."
    dtypes = {name.removeprefix(prefix).replace(".base_layer.", "."): tensor.dtype for name, tensor in state.items()}
    again.eval()
    whole: nn.Module = again.merge_and_unload()
    for name, param in whole.named_parameters():
        param.data = param.data.to(dtypes.get(name, base.dtype))
    whole.generation_config = base.generation_config
    whole.config.dtype = base.dtype
    return whole


def _quick(config: "PeftConfig") -> "PeftConfig":
    """Return config without an initialization that decomposes weights. Its result would be overwritten anyway."""
    quick = copy.deepcopy(config)
    if getattr(quick, "init_lora_weights", None) is not None:
        quick.init_lora_weights = True
    return quick
