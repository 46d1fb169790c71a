"""The optimizer of a DeepSpeed file: refuse what cannot be made, and say what will step, before a weight is read.

DeepSpeed's own Adam is compiled where it is first used, which takes minutes on a new machine and says nothing. So it is
compiled here, or torch's takes its place where the two are the same.
"""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piece_ds.runtime.compile_lock import wait_with_a_limit
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

# What DeepSpeed raises for content that it cannot use: pydantic's errors are ValueErrors, its own are Exceptions.
REFUSALS = (AssertionError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)

ADAGRAD = "{flag} ends in DeepSpeed's partitioning of gradients: use AdamW"

# Options of Adam that DeepSpeed takes for itself.
_OF_DEEPSPEED = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
# Options of DeepSpeed's Adam that torch's lacks -> the value with which torch's does the same.
_SAME_IN_TORCH = {"bias_correction": True, "set_grad_none": True}


def file_optimizer(content: Mapping[str, Any], masked: bool) -> torch.optim.Optimizer:
    """Return an optimizer on a dummy parameter like the one that a configuration describes.

    Args:
        content: of a DeepSpeed file, with transformers' values in place of "auto".
        masked: whether steps act on single weights, which needs AdamW.
    Raises:
        UserError: DeepSpeed could not make it, or masks are not proven with it.
    """
    dummy = [nn.Parameter(torch.zeros(2))]
    if not content.get("optimizer"):
        return torch.optim.AdamW(dummy)
    section = section_of(content, "optimizer")
    name, options = str(section["type"]), dict(section.get("params") or {})

    # DeepSpeed makes its own of Adam and AdamW; other names are torch's.
    is_adam = _is_adam(name)
    kind = torch.optim.AdamW if is_adam else getattr(torch.optim, name, None)
    if masked and not is_adam:
        raise UserError(f"--deepspeed: optimizer {name}: a zero gradient may move a weight; use AdamW, or leave it out")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"--deepspeed: optimizer {name} is neither AdamW nor one of torch.optim's: use --optim instead")
    stage = (content.get("zero_optimization") or {}).get("stage", 0)
    if not is_adam and stage and not content.get("zero_allow_untested_optimizer"):
        raise UserError(
            f"--deepspeed: optimizer {name} is untested with ZeRO, DeepSpeed says: add "
            '"zero_allow_untested_optimizer": true, or use AdamW'
        )
    if name.lower() == "adagrad":
        raise UserError(ADAGRAD.format(flag="--deepspeed: optimizer Adagrad"))
    if is_adam:
        _check_adam(content, name, options, masked)
    own = (*_OF_DEEPSPEED, *_SAME_IN_TORCH) if is_adam else ()
    shown = {key: value for key, value in options.items() if key != "torch_adam"}
    try:
        made: torch.optim.Optimizer = kind(dummy, **{key: options[key] for key in options if key not in own})
    except REFUSALS as error:
        raise UserError(f"--deepspeed: optimizer {name} with {shown} cannot be made: {reason_of(error)}") from error
    return made


def settle_optimizer(content: dict[str, Any]) -> list[str]:
    """Change a configuration so that the engine's optimizer is the one that was asked for; return what to say of it.

    - Without an accelerator, torch's AdamW takes the place of DeepSpeed's, which would be compiled for minutes.
    - With the optimizer on the CPU and none in the file, accelerate would replace any optimizer by DeepSpeed's CPU
      Adam, without the betas and epsilon of the flags. That is switched off.

    Args:
        content: of a DeepSpeed file; changed in place. A second call changes nothing, and returns nothing.
    Raises:
        UserError: the file asks for the replacement by name.
    """
    offloads = _offloads(content)
    if content.get("optimizer"):
        section = section_of(content, "optimizer")
        options = section.get("params") or {}
        if not _is_adam(section["type"]) or options.get("torch_adam") or _has_accelerator():
            return []
        kept = {key: value for key, value in options.items() if _SAME_IN_TORCH.get(key) != value}
        content["optimizer"] = {**section, "params": {**kept, "torch_adam": True}}
        return [f"optimizer {section['type']} is torch's here: DeepSpeed's own is for accelerators"]
    if not offloads or content.get("zero_force_ds_cpu_optimizer") is False:
        return []
    if content.get("zero_force_ds_cpu_optimizer"):
        raise UserError(
            "--deepspeed: zero_force_ds_cpu_optimizer true without an optimizer in the file: any --optim would be "
            "replaced by DeepSpeedCPUAdam with betas and epsilon of its own; set it to false, or describe the "
            "optimizer in the file"
        )
    content["zero_force_ds_cpu_optimizer"] = False
    return ["the optimizer on the CPU is that of --optim: zero_force_ds_cpu_optimizer is taken as false"]


def compile_optimizer(content: Mapping[str, Any]) -> None:
    """Compile what the optimizer of a settled configuration needs, if it is not there yet.

    Raises:
        UserError: it cannot be compiled on this machine.
    Cost: minutes on a new machine, else milliseconds.
    """
    if not content.get("optimizer"):
        return
    section = section_of(content, "optimizer")
    if not _is_adam(section["type"]) or (section.get("params") or {}).get("torch_adam"):
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    builder = CPUAdamBuilder() if _offloads(content) else FusedAdamBuilder()
    if is_main():
        _tell_of_compilation(builder.NAME)
    wait_with_a_limit()
    try:
        builder.load(verbose=False)
    except UserError:  # of a lock that a killed process has left
        raise
    except Exception as error:  # compilers, their absence, and versions that do not fit each other
        way_out = (
            "leave the optimizer out of the file" if _offloads(content) else 'add "torch_adam": true to its params'
        )
        raise UserError(
            f"--deepspeed: optimizer {section['type']} needs DeepSpeed's {builder.NAME}, which cannot be compiled here "
            f"({reason_of(error)}): {way_out}"
        ) from error


def section_of(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of a configuration that has a type and params. Raise UserError if it is anything else."""
    section = content[key]
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise UserError(f"--deepspeed: {key} expects an object with a type, got {section!r:.200}")
    if not isinstance(section.get("params") or {}, Mapping):
        raise UserError(f"--deepspeed: {key}.params expects an object, got {section['params']!r:.200}")
    return section


def reason_of(error: BaseException) -> str:
    """Return what a library says, in one line; of pydantic's list its first entry."""
    if hasattr(error, "errors"):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError | AssertionError) and text else f"{type(error).__name__}: {text}"


def _check_adam(content: Mapping[str, Any], name: str, options: Mapping[str, Any], masked: bool) -> None:
    """Raise UserError for options that the Adam which will step does not take, or takes otherwise than AdamW."""
    # Which Adam it is.
    is_torch = bool(options.get("torch_adam")) or not _has_accelerator()
    if is_torch:
        other = next((key for key, same in _SAME_IN_TORCH.items() if options.get(key, same) != same), None)
        if other is not None:
            raise UserError(f"--deepspeed: optimizer {name}: torch's Adam, which steps here, has no {other}: remove it")
    else:
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        kind = DeepSpeedCPUAdam if _offloads(content) else FusedAdam
        known = {*inspect.signature(kind.__init__).parameters, *_OF_DEEPSPEED} - {"self", "params", "model_params"}
        unknown = next((key for key in options if key not in known), None)
        if unknown is not None or options.get("amsgrad"):
            raise UserError(
                f"--deepspeed: optimizer {name} is DeepSpeed's {kind.__name__} here, which does not know "
                f"{unknown or 'amsgrad'!r}: remove it"
            )

    # Decay that is part of the gradient reaches weights that are not selected.
    decays = options.get("weight_decay") or 0
    if masked and decays and name.lower() == "adam" and not options.get("adam_w_mode", True):
        raise UserError(
            f"--deepspeed: optimizer {name} with adam_w_mode false adds weight decay {decays} to the gradient, also "
            "where nothing is selected: remove adam_w_mode, or set the decay to 0"
        )


def _tell_of_compilation(name: str) -> None:
    """Log that something will be compiled, if it is not there."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))
    if any(root.glob(f"**/{name}.so")):
        return
    logger.warning("DeepSpeed's %s is compiled, which takes some minutes once on a machine", name)


def _is_adam(name: str) -> bool:
    return name.lower() in ("adam", "adamw")


def _offloads(content: Mapping[str, Any]) -> bool:
    offload = (content.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return str(offload.get("device", "none")) != "none"


def _has_accelerator() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() != "cpu")
