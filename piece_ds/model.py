"""Loading a causal LM and its tokenizer, and what is settled before the weights are read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import deepspeed as hf_deepspeed

from piece_ds.config import ModelArguments
from piece_ds.errors import UserError
from piece_ds.positions import count_positions_from_mask_
from piece_ds.state.partition import Layout, input_embedding, layout_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(arguments: ModelArguments) -> Any:
    """The model's configuration. Raises UserError where there is none."""
    source = arguments.model_name_or_path
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {source}: no model can be loaded from there ({reason})") from error


def require_weights(arguments: ModelArguments) -> None:
    """Raise UserError where model_name_or_path is a folder with no weights in it, before anything is written."""
    source = Path(str(arguments.model_name_or_path))
    if source.is_dir() and not any(path for kind in ("*.safetensors", "*.bin") for path in source.glob(kind)):
        raise UserError(f"--model_name_or_path {source}: the folder holds no weights (*.safetensors or *.bin)")


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError where there is none."""
    source = arguments.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {source}: no tokenizer can be loaded from there ({reason})") from error


def dtype_of(arguments: ModelArguments, config: Any) -> torch.dtype:
    """The dtype to train in: --dtype, or that of the model's files."""
    if arguments.dtype != "auto":
        return _DTYPES[arguments.dtype]
    stated = getattr(config, "dtype", None) or torch.float32
    return _DTYPES[stated] if isinstance(stated, str) else stated


def load_model(arguments: ModelArguments, dtype: torch.dtype, folder: Path | str | None = None) -> nn.Module:
    """The model in dtype; partitioned while loading where a ZeRO-3 TrainingArguments is alive.

    Args:
        folder: load from there instead of model_name_or_path (a later task of a resumed stream).
    """
    source = str(folder or arguments.model_name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model in {source} cannot be read: {str(error).strip().splitlines()[0]}") from error
    count_positions_from_mask_(model)
    return model


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model from its configuration alone, on the meta device: no weight is read and no memory taken."""
    with _no_zero3(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    return model


def names_in_files(model: nn.Module) -> dict[str, str]:
    """Every name under which a checkpoint may hold a parameter whole -> its name in named_parameters().

    The names differ for tied weights, which a checkpoint may hold under either or both, and where transformers renames
    while loading (GPT-NeoX's embed_out). Parameters that it stacks while loading (experts) are not in the result under
    the names of their parts.
    """
    parameter_of = {id(param): name for name, param in model.named_parameters()}
    stored = [*model.named_parameters(remove_duplicate=False)]
    stored += revert_weight_conversion(model, dict(model.state_dict(keep_vars=True))).items()
    return {name: parameter_of[id(param)] for name, param in stored if id(param) in parameter_of}


def empty_layout(arguments: ModelArguments, config: Any) -> Layout:
    """The layout of the model from its configuration alone."""
    return layout_of(empty_model(config, arguments.trust_remote_code))


@contextmanager
def _no_zero3() -> Iterator[None]:
    """transformers builds plain models inside, although a TrainingArguments with ZeRO-3 may be alive."""
    alive = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = alive


def freeze_ineligible(model: nn.Module, selected: set[str] | None = None) -> None:
    """Freeze the input embeddings or, where the selected parameters are known already, every other parameter.

    A frozen parameter costs no gradient, master or moment. Which weights train does not change: a mask that is yet
    to be estimated selects none of the embeddings.
    """
    embedding = input_embedding(model)
    for name, param in model.named_parameters():
        if (name not in selected) if selected is not None else (param is embedding):
            param.requires_grad_(False)
    if embedding is not None and not embedding.requires_grad and hasattr(model, "enable_input_require_grads"):
        # Reentrant checkpointing passes gradients through inputs: without one that requires it, blocks get none.
        model.enable_input_require_grads()
