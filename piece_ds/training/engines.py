"""Make DeepSpeed engines for the two jobs that train nothing: taking statistics, and evaluating."""

from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import TrainingArguments

from piece_ds.state.partition import is_partitioned
from piece_ds.update.attach import prepare_compact


def statistics_engine(model: nn.Module, arguments: TrainingArguments) -> Any:
    """Return an engine with backward for collect_statistics().

    Its optimizer holds one value and never steps. So DeepSpeed keeps neither masters nor gradients of the model.
    """
    optimizer = torch.optim.SGD(prepare_compact(model, num_selected=1).parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=_filled(model, arguments))[0]


def inference_model(model: nn.Module, arguments: TrainingArguments) -> Any:
    """Return an object to call and to generate with.

    It is an engine without optimizer if ZeRO-3 has partitioned the model, else the model itself on this rank's device.
    """
    if not is_partitioned(*model.parameters()):
        return model.to(arguments.device).eval()

    # An engine without optimizer has nothing to offload.
    config = _filled(model, arguments)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


def _filled(model: nn.Module, arguments: TrainingArguments) -> dict[str, Any]:
    """Return the DeepSpeed configuration with "auto" filled in by transformers, without optimizer and scheduler."""
    holder = arguments.hf_deepspeed_config
    holder.trainer_config_finalize(arguments, model, num_training_steps=1)
    return {key: value for key, value in holder.config.items() if key not in ("optimizer", "scheduler")}
