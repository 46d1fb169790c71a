"""--peft_config FILE: a PEFT method as PEFT's own adapter_config.json describes it, checked before anything."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from piece_ds.runtime.errors import UserError, nearest

if TYPE_CHECKING:
    from peft import PeftConfig

# Types whose merged model says what the adapted one says, and whose saved adapter is read again without loss: the tests
# hold each to it. The others have no merge (LILY, SHADOW, XLORA, POLY, prompts), take part in the training loop
# (ADALORA), or merged to something else when this was written (ADAMSS, BEFT).
PROVEN = (
    *("LORA", "OFT", "OSF", "VERA", "IA3", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA"),
    *("HIRA", "HRA", "LN_TUNING", "LOHA", "LOKR", "MISS", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA"),
    *("SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "WAVEFT"),
)
# Types that read whole weights. Under ZeRO-3, PEFT begins them with something else, or not at all.
# The others train and merge under ZeRO-3 as in plain PyTorch.
_NEEDS_WHOLE_WEIGHTS = ("OSF", "DEFT", "DELORA", "FROD", "LN_TUNING", "LOHA", "SUPERTUNING", "TINYLORA")
# LoRA's variants that cannot be merged (a bias without one in the base, activated LoRA, experts), that need calls in
# the training loop, or that build the model from copies of its layers.
_REFUSED = (
    *("alora_invocation_tokens", "arrow_config", "megatron_config", "lora_bias", "layer_replication", "use_bdlora"),
    *("velora_config", "monteclora_config", "kasa_config"),
)
# Others (eva, corda, lora_ga, loftq) need a pass over data, or a quantized model, before there is an adapter.
_INITIALIZATIONS = re.compile("none|true|false|gaussian|orthogonal|olora|mica|pissa(_niter_[0-9]+)?")


def read_peft_config(path: str) -> "PeftConfig":
    """Return the configuration in a JSON or YAML file, ready to train causal language models.

    Args:
        path: of a file with PEFT's keys; `peft_type` is needed, `task_type` is CAUSAL_LM without one.
    Raises:
        UserError: no such file, neither JSON nor YAML, an unknown peft_type or key, a value that PEFT refuses, or a
            method whose adapter is not proven to merge into the model.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    # A type that is proven, with keys that PEFT knows for it.
    content = _read(path)
    name = str(content.get("peft_type", "")).upper()
    known = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    usable = [kind for kind in PROVEN if kind in known]
    if name not in usable:
        problem = "is not proven to merge into a model" if name in known else "is unknown"
        raise UserError(
            f"--peft_config {path}: peft_type {content.get('peft_type')!r} {problem}; usable: {', '.join(usable)}."
            f"{nearest(name, usable) if name not in known else ''}"
        )
    keys = [field.name for field in fields(known[name]) if field.init]
    for key in content:
        if key not in keys:
            raise UserError(f"--peft_config {path}: {name} has no key {key!r}.{nearest(str(key), keys)}")

    # What makes an adapter of it that cannot be merged, or not begun.
    for key in _REFUSED:
        if content.get(key):
            raise UserError(f"--peft_config {path}: an adapter with {key} is not proven to train and merge: remove it")
    if not _INITIALIZATIONS.fullmatch(str(content.get("init_lora_weights")).lower()):
        raise UserError(
            f"--peft_config {path}: init_lora_weights {content['init_lora_weights']!r} is not proven, or needs a pass "
            "over data before the adapter exists: use true, false, gaussian, orthogonal, olora, mica or pissa"
        )
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"--peft_config {path}: task_type {content['task_type']!r}, expected CAUSAL_LM: a task is learned by what "
            "the model answers"
        )

    values = content | {"peft_type": name, "task_type": "CAUSAL_LM", "inference_mode": False}
    try:
        return known[name](**{key: value for key, value in values.items() if key in keys})
    except Exception as error:  # PEFT's own checks raise whatever they raise; the file is data from outside
        raise UserError(f"--peft_config {path}: PEFT refuses it: {_one_line(error)}") from error


def needs_whole_weights(config: "PeftConfig") -> str:
    """Return what in config cannot begin under ZeRO-3, or ''."""
    if getattr(config.peft_type, "value", config.peft_type) in _NEEDS_WHOLE_WEIGHTS:
        return f"peft_type {getattr(config.peft_type, 'value', config.peft_type)}"
    return "trainable_token_indices" if getattr(config, "trainable_token_indices", None) else ""


def difference(first: "PeftConfig", second: "PeftConfig") -> list[str]:
    """Return the keys, in order, in which two configurations describe the adapter differently."""
    passing = {"inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type"}
    one, other = (json.loads(json.dumps(config.to_dict(), default=_plain)) for config in (first, second))
    keys = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return sorted(keys - passing)


def _read(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--peft_config {path} cannot be read: {_one_line(error)}") from error
    try:
        content = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--peft_config {path} is neither JSON nor YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--peft_config {path} must map PEFT's keys to values, got {type(content).__name__}")
    return content


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
