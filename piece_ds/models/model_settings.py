"""Settings beside the weights that end a run late: of generation, if they cannot be saved, and of attention.

transformers loads a generation_config.json with a temperature and no do_sample, and refuses to save it: after training.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.pretrained import model_source
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

# What only drawing reads: without do_sample it has no effect.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def make_saveable_(settings: Any) -> list[str]:
    """Remove from generation settings what has no effect and keeps transformers from saving them.

    Args:
        settings: a GenerationConfig, or None. Changed in place.
    Returns:
        Names of what was removed, with their values.
    Raises:
        UserError: they cannot be saved for another reason.
    """
    if settings is None or _problem(settings) is None:
        return []
    removed = []
    if not settings.do_sample:
        for name in _OF_SAMPLING:
            value = getattr(settings, name, None)
            if value is not None:
                removed.append(f"{name} {value}")
                setattr(settings, name, None)
    problem = _problem(settings)
    if problem is not None:
        raise UserError(f"the model's generation_config.json cannot be saved again ({problem}): mend it, or remove it")
    return removed


def check_generation_settings(arguments: ModelArguments) -> None:
    """Raise UserError if the model's generation settings could not be saved with it after training."""
    source = model_source(str(arguments.model_name_or_path))
    try:
        settings = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, json.JSONDecodeError) as error:
        if isinstance(error, OSError) and not (Path(source) / "generation_config.json").exists():
            return  # there are none
        raise UserError(
            f"--model_name_or_path {source}: its generation_config.json cannot be read ({' '.join(str(error).split())})"
        ) from error
    removed = make_saveable_(settings)
    if removed:
        logger.warning(
            "generation_config.json has %s without do_sample, which has no effect: the saved model leaves it out",
            ", ".join(removed),
        )


def check_attention(arguments: ModelArguments, config: Any, auto_class: Any) -> None:
    """Raise UserError if --attn_implementation is misspelt, not installed, unknown to the model, or not for training.

    Args:
        config: the model's. Not modified.
        auto_class: transformers' class that makes a model of it.
    """
    asked = arguments.attn_implementation
    if not asked:
        return
    if "paged" in asked:
        raise UserError(
            f"--attn_implementation {asked} is for a server's paged cache, without which it attends to later tokens or "
            f"fails: use {asked.replace('paged|', '').replace('_paged', '')}"
        )
    if asked == "flex_attention" and not torch.cuda.is_available():
        raise UserError("--attn_implementation flex_attention has no backward pass on a CPU: use sdpa or eager")
    try:
        with torch.device("meta"):
            auto_class.from_config(
                copy.deepcopy(config), attn_implementation=asked, trust_remote_code=arguments.trust_remote_code
            )
    except (ValueError, ImportError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--attn_implementation {asked}: {reason}; sdpa and eager are always there") from error


def _problem(settings: Any) -> str | None:
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return None
