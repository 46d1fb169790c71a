"""Load a causal or vision-language model with its tokenizer or processor, and settle dtype and eligibility before."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from piece_ds.config.arguments import ModelArguments
from piece_ds.config.piece import split_patterns
from piece_ds.models.checkpoint_files import main_dtype, refuse_incomplete, require_weight_files, stored_tensors
from piece_ds.models.eligible import (
    exclude,
    ineligible,
    input_embedding,
    let_gradients_in,
    make_eligible,
    towers,
)
from piece_ds.models.eligible_report import folded, report_eligible
from piece_ds.models.experts import gather_experts_whole, router_names
from piece_ds.models.fingerprint import files_folder
from piece_ds.models.layout import layout_of
from piece_ds.models.model_settings import check_attention, make_saveable_
from piece_ds.models.odd_configs import first_words, missing_folder, refuse_odd_config
from piece_ds.models.pretrained import model_source
from piece_ds.models.processor import Processing, load_processor
from piece_ds.models.token_ids import has_tokenizer_files
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(arguments: ModelArguments) -> Any:
    """Return the model's configuration. Raise UserError if there is none."""
    source = model_source(str(arguments.model_name_or_path))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
    except Exception as error:  # what a configuration's class raises for values of the wrong kind is its own matter
        reason = missing_folder(source) or first_words(error)
        raise UserError(f"--model_name_or_path {source}: no model can be loaded from there ({reason})") from error
    refuse_odd_config(f"--model_name_or_path {source}", config)
    return config


def require_weights(arguments: ModelArguments) -> None:
    """Raise UserError if model_name_or_path is a folder without weights. Nothing has been written by then."""
    source = Path(model_source(str(arguments.model_name_or_path)))
    if (source / "adapter_config.json").exists():  # transformers would load its base model, wherever that is
        raise UserError(
            f"--model_name_or_path {source} holds a PEFT adapter (adapter_config.json): give its base model, or merge "
            "the adapter into it first (PEFT's merge_and_unload) and save that by itself"
        )
    if source.is_dir():
        require_weight_files(f"--model_name_or_path {source}", source)


def bring_weights(arguments: ModelArguments) -> None:
    """Bring a Hub model's weights into the Hub's cache, so that a first run sees the files that later ones see.

    What is decided by the files (their dtype, whether they are whole, text of the model's own, a recipe's rate) is then
    the same in both. Without a network nothing is brought, and whoever loads the model says what is missing. Ranks of
    one machine may call it at once: the cache has locks.

    Cost: the download that loading would make.
    """
    source = model_source(str(arguments.model_name_or_path))
    if Path(source).exists():
        return
    # Of the file names that transformers loads, the first kind that the repository has.
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            folder = huggingface_hub.snapshot_download(source, allow_patterns=[pattern, f"{pattern}.index.json"])
        except Exception as error:  # every fault of the network has its own type, and loading will try again
            logger.warning("the weights of %s were not brought from the Hub (%s)", source, first_words(error))
            return
        if any(Path(folder).glob(pattern)):
            return


def reads_images(config: Any) -> bool:
    """Return whether transformers has an image-text-to-text model for config."""
    return getattr(config, "model_type", None) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_tokenizer(arguments: ModelArguments, config: Any = None) -> Processing:
    """Return the model's tokenizer or, if it reads images, its processor. Raise UserError if there is none."""
    source = model_source(str(arguments.model_name_or_path))
    # Without these files transformers would make some tokenizers an empty vocabulary.
    if Path(str(source)).is_dir() and not has_tokenizer_files(Path(str(source))):
        raise UserError(
            f"--model_name_or_path {source}: the folder holds no tokenizer (tokenizer.json); only rows of input_ids "
            "and labels can do without"
        )
    try:
        if reads_images(config):
            return load_processor(str(source), config, arguments.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
        tokenizer("Aa 1, \u00e9\u4e2d?")  # some cannot encode what they do not know, and say so only then
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # its files may hold anything, and each tokenizer's class reads them in its own way
        what = "processor" if reads_images(config) else "tokenizer"
        raise UserError(
            f"--model_name_or_path {source}: no {what} can be loaded from there ({first_words(error)})"
        ) from error


def dtype_of(arguments: ModelArguments, config: Any) -> torch.dtype:
    """Return the dtype to train in: --dtype or, for "auto", the dtype of most stored weights.

    config.json decides only if no file can be read. Its dtype and the files' often differ.
    """
    if arguments.dtype != "auto":
        return _DTYPES[arguments.dtype]
    folder = files_folder(model_source(str(arguments.model_name_or_path)))
    # config.json may name another dtype than the files hold: the files win.
    in_files = None if folder is None else main_dtype(stored_tensors(folder))
    stated = in_files or getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if dtype not in _DTYPES.values():
        raise UserError(
            f"--model_name_or_path {arguments.model_name_or_path} is {str(stated).removeprefix('torch.')}, in which "
            f"DeepSpeed does not train: give --dtype, one of {', '.join(_DTYPES)}, or a converted copy"
        )
    return dtype


def load_model(
    arguments: ModelArguments, dtype: torch.dtype, folder: Path | str | None = None, whole: bool = False
) -> nn.Module:
    """Return the model in dtype. It is partitioned while it loads if a TrainingArguments with ZeRO-3 is alive.

    Args:
        arguments: model settings.
        dtype: of the weights.
        folder: load from there instead of model_name_or_path; a resumed stream loads a later task's model so.
        whole: do not partition, whatever is alive.
    Raises:
        UserError: files that cannot be read, or that lack a parameter.
    """
    source = str(folder or model_source(str(arguments.model_name_or_path)))
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
        with without_zero3() if whole else nullcontext():
            model, info = _auto_class(config).from_pretrained(source, output_loading_info=True, **options)
    except (OSError, SafetensorError, UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"the model in {source} cannot be read: {reason[0][:300]}") from error
    except RuntimeError as error:  # torch.load's own of a damaged archive; others are the machine's
        if "PytorchStreamReader" not in str(error):
            raise
        raise UserError(f"the model in {source} cannot be read: {str(error).splitlines()[0][:300]}") from error
    # transformers only warns of parameters that it made up.
    refuse_incomplete(f"the model in {source}", model, info)
    make_saveable_(getattr(model, "generation_config", None))
    marked = gather_experts_whole(model)
    if marked and hf_deepspeed.is_deepspeed_zero3_enabled() and is_main():
        logger.warning("ZeRO-3 gathers the experts of %s together: ranks use different ones", ", ".join(folded(marked)))
    return model


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Return the model on the meta device, from its configuration only. No weight is read and no memory is taken.

    Raises:
        UserError: the configuration describes no model.
    """
    try:
        with without_zero3(), torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
            # An untied head would be counted twice.
            model.tie_weights()
    except Exception as error:  # sizes that do not fit, unknown names: each class finds them in its own way
        source = str(getattr(config, "_name_or_path", "") or "the model")
        raise UserError(f"{source}: its config.json describes no model ({first_words(error)}): mend it") from error
    return model


def check_attention_of(arguments: ModelArguments, config: Any) -> None:
    """Raise UserError if --attn_implementation cannot be used with the model. See check_attention()."""
    with without_zero3():
        check_attention(arguments, config, _auto_class(config))


def _auto_class(config: Any) -> Any:
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def empty_layout(arguments: ModelArguments, config: Any) -> Layout:
    """Return the layout of the model, from its configuration only."""
    return layout_of(empty_model(config, arguments.trust_remote_code))


def check_eligible(arguments: ModelArguments, config: Any) -> None:
    """Raise UserError if --eligible or --exclude names nothing, if nothing stays eligible, or if no tower can be found.

    Args:
        arguments: model settings, with the patterns.
        config: the model's.
    Cost: builds the model on the meta device.
    """
    model = empty_model(config, arguments.trust_remote_code)
    has_rule = reads_images(config) or bool(router_names(model))
    if arguments.eligible is None and arguments.exclude is None and not has_rule:
        return
    if reads_images(config) and not towers(model):
        raise UserError(
            f"--model_name_or_path {arguments.model_name_or_path}: transformers does not say which part of "
            f"{type(model).__name__} encodes images, so what may train is not known"
        )
    added = make_eligible(model, split_patterns(arguments.eligible))
    try:
        excluded = exclude(model, split_patterns(arguments.exclude))
    except UserError as error:
        raise UserError(f"--{error}") from None
    if all(name in ineligible(model) for name, _ in model.named_parameters()):
        raise UserError(f"--exclude {arguments.exclude} leaves no parameter to select: exclude fewer")
    if is_main():
        report_eligible(model, added, excluded)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers build plain models inside, although a TrainingArguments with ZeRO-3 may be alive."""
    alive = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = alive


def freeze_ineligible(
    model: nn.Module,
    selected: set[str] | None = None,
    patterns: Iterable[str] = (),
    excluded: Iterable[str] = (),
) -> None:
    """Freeze the parameters that may not be selected or, if a mask is given, all that the mask does not select from.

    A frozen parameter costs no gradient, no fp32 master weight and no optimizer moments. The weights that train are the
    same either way: no mask selects from what the rule leaves out.

    Args:
        model: a whole model of transformers, or any module.
        selected: names of the parameters of a given mask; None if the mask is yet to be estimated.
        patterns: --eligible; see make_eligible().
        excluded: --exclude; see exclude().
    """

    # A given mask already says what trains, so patterns matter only without one.
    if selected is None:
        make_eligible(model, patterns)
        exclude(model, excluded)
    left_out = ineligible(model)
    for name, param in model.named_parameters():
        if (name not in selected) if selected is not None else (name in left_out):
            param.requires_grad_(False)

    # Checkpointed blocks behind a frozen embedding would get no gradient.
    embedding = input_embedding(model)
    if embedding is not None and not embedding.requires_grad:
        let_gradients_in(model)
