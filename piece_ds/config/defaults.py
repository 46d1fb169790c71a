"""Choose values of flags that a user need not give: what suits this machine, and the DeepSpeed configuration."""

import sys
from collections.abc import Collection
from typing import Any

from piece_ds.config.deepspeed_configs import FOLDER
from piece_ds.runtime.errors import UserError

# If TrainingArguments' own defaults do not suit: a log line is cheap and a checkpoint of an 8B model is 100 GB.
DEFAULTS = {"logging_steps": 10, "save_strategy": "no", "report_to": "none"}

DEFAULT_CONFIG = FOLDER / "zero3.json"


def machine_defaults(given: Collection[str]) -> dict[str, Any]:
    """Return values for flags that are not given.

    Args:
        given: names of the flags and YAML keys that the user has set; --save_steps turns checkpoints on.
    """
    from deepspeed.accelerator import get_accelerator

    defaults: dict[str, Any] = {
        "deepspeed": DEFAULT_CONFIG,
        **DEFAULTS,
        "use_cpu": get_accelerator().device_name() == "cpu",
    }

    # The user wants checkpoints.
    if "save_steps" in given:
        del defaults["save_strategy"]

    # A progress bar in a log file is noise.
    if not sys.stderr.isatty():
        defaults["disable_tqdm"] = True
    return defaults


def timeout_seconds(text: str | None) -> float | None:
    """Return --ddp_timeout in seconds, or None without it.

    Needed before TrainingArguments, which expects a process group.

    Raises:
        UserError: it is no positive number, or one that no clock holds.
    """
    try:
        seconds = None if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if seconds is not None and not 0 < seconds < 2**31:
        raise UserError(f"--ddp_timeout expects seconds, above 0 and below 2**31, got {text!r:.80}")
    return seconds
