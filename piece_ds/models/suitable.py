"""Refuse, before any weight is read, checkpoints that are not the causal model that would be trained."""

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.checkpoint_files import (
    FLOAT_DTYPES,
    StoredTensor,
    hold_the_same,
    refuse_incomplete,
    stored_tensors,
)
from piece_ds.models.eligible import towers
from piece_ds.models.fingerprint import files_folder
from piece_ds.models.loading import empty_model, reads_images, without_zero3
from piece_ds.models.pretrained import model_source
from piece_ds.runtime.errors import UserError

# transformers quantizes a dequantized model again while it saves, unless it is told not to: the page says how.
DEQUANTIZE = (
    "give the checkpoint that it was made from, or a dequantized copy (docs/deepspeed.md, Quantized models, makes one)"
)


def check_checkpoint(arguments: ModelArguments, config: Any) -> None:
    """Raise UserError unless model_name_or_path holds a whole causal model in a floating dtype.

    Pickled files (*.bin), and files of a Hub id that are not in the cache yet, are checked when they are loaded.

    Cost: reads headers. An embedding and a head that are stored twice are read whole, to compare them.
    """
    source = f"--model_name_or_path {arguments.model_name_or_path}"
    _check_config(source, config, arguments.trust_remote_code)
    model = empty_model(config, arguments.trust_remote_code)
    check_causal(source, config, model)
    check_heads(source, model)
    folder = files_folder(model_source(str(arguments.model_name_or_path)))
    stored = {} if folder is None else stored_tensors(folder)
    if stored:
        _check_dtypes(source, stored)
        _check_names(source, config, model, stored)
        _check_ties(source, model, stored)


def quantized_by(config: Any) -> str | None:
    """Return the method by which config.json says that weights are quantized, or None if they are not."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    known = quantization if isinstance(quantization, dict) else vars(quantization)
    method = known.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def _check_config(source: str, config: Any, trust_remote_code: bool) -> None:
    """Raise UserError if config.json describes a quantized model, or none that check_kind() takes."""
    # Most quantized checkpoints say so here; _check_dtypes() finds the others.
    method = quantized_by(config)
    if method is not None:
        raise UserError(f"{source} is quantized ({method}): its weights cannot be trained one by one; {DEQUANTIZE}")
    check_kind(source, config, trust_remote_code)


def check_kind(source: str, config: Any, trust_remote_code: bool = False) -> None:
    """Raise UserError if config.json describes an encoder-decoder, or no causal language model."""
    kind, name = getattr(config, "model_type", None), type(config).__name__
    if getattr(config, "is_encoder_decoder", False) and not reads_images(config):
        raise UserError(
            f"{source} is an encoder-decoder ({name}): as a causal model it would lose its encoder and have "
            "random weights; give a decoder-only model"
        )
    # A model's own code may provide a causal class that transformers does not know.
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not reads_images(config) and not remote:
        raise UserError(
            f"{source} is no causal language model ({name}): transformers has no AutoModelForCausalLM of model type "
            f"{kind!r}"
        )


def check_causal(source: str, config: Any, model: nn.Module) -> None:
    """Raise UserError if config or modules tell that a token sees later ones. A forward pass checks again, later."""
    encoders = tuple(towers(model))
    # Encoders of images see everything, rightly; so do cross-attentions.
    known = [
        module.is_causal
        for name, module in model.named_modules()
        if isinstance(getattr(module, "is_causal", None), bool)
        and not name.startswith(encoders or ("\0",))
        and "cross" not in name.lower()
    ]
    no_decoder = getattr(config, "is_decoder", None) is False and known and not any(known)
    if no_decoder or getattr(config, "causal", None) is False:
        raise UserError(
            f"{source}: {type(model).__name__} would see the answers that it shall learn: its config.json makes it an "
            "encoder (is_decoder or causal is false); give a decoder, or set is_decoder if it was trained as one"
        )


def check_heads(source: str, model: nn.Module) -> None:
    """Raise UserError if attention shares keys and values among heads in a way that leaves some without.

    transformers builds such a model, and its first forward pass ends in an error about shapes.
    """
    for name, module in model.named_modules():
        values, output = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
        groups = getattr(module, "num_key_value_groups", None)
        if not (isinstance(groups, int) and isinstance(values, nn.Linear) and isinstance(output, nn.Linear)):
            continue
        if values.out_features * groups != output.in_features:
            settings = getattr(module, "config", None)
            said = " and ".join(
                f"{key} {getattr(settings, key, 'unknown')}" for key in ("num_attention_heads", "num_key_value_heads")
            )
            raise UserError(
                f"{source}: its config.json says {said}: {name} cannot share its keys and values evenly among the "
                "heads; give key heads that divide the heads"
            )


def _check_dtypes(source: str, stored: dict[str, StoredTensor]) -> None:
    """Raise UserError if a matrix is not stored in floating point. Not every quantized model says so in config.json."""
    for name, tensor in stored.items():
        if tensor.dtype not in FLOAT_DTYPES and name.endswith("weight") and len(tensor.shape) > 1:
            raise UserError(f"{source} is quantized: {name!r} is stored as {tensor.dtype}; {DEQUANTIZE}")


def _check_names(source: str, config: Any, model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise UserError unless the files hold every parameter in its shape. transformers would draw the others at random.

    transformers itself is asked, by loading tensors without content: only it knows what it renames and stacks.
    """
    # Its own report of missing tensors would come before ours, and twice.
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with without_zero3():
            _, info = type(model).from_pretrained(
                None,
                config=config,
                state_dict={name: tensor.empty() for name, tensor in stored.items()},
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
    refuse_incomplete(source, model, info)


def _check_ties(source: str, model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise UserError unless weights that config.json ties are stored once, or twice with the same bits."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for tied in names.values():
        present = [(name, stored[name]) for name in tied if name in stored]
        for other in present[1:]:
            if not hold_the_same(present[0], other):
                raise UserError(
                    f"{source}: config.json ties {other[0]!r} to {present[0][0]!r} (tie_word_embeddings), but the "
                    "files hold two different tensors: set tie_word_embeddings to false in config.json, or remove one"
                )
