"""Refuse label smoothing and an order by length where transformers' Trainer would do something else than is meant."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from piece_ds.config.settings import Settings
from piece_ds.data.tasks import Task
from piece_ds.models.processor import Processing
from piece_ds.runtime.errors import UserError


def check_label_smoothing(
    settings: Settings, arguments: TrainingArguments, make_model: Callable[[], nn.Module]
) -> None:
    """Raise UserError if --label_smoothing_factor would smooth another loss than the model's.

    Args:
        settings: of the run.
        arguments: of the run.
        make_model: returns the model without weights. Called only if labels are smoothed.
    """
    factor = arguments.label_smoothing_factor
    if not factor:
        return
    if settings.model.loss_chunk_tokens:
        raise UserError(
            f"--loss_chunk_tokens has no meaning with --label_smoothing_factor {factor:g}, which needs the logits of "
            "every answer token"
        )
    # The Trainer shifts labels by a token only for classes that it knows by this list.
    name = type(make_model()).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UserError(
            f"--label_smoothing_factor {factor:g}: transformers does not list {name} as a causal model, and would "
            "compare each token's logits with that token instead of the next one: leave it out"
        )


def check_lengths(arguments: TrainingArguments, tasks: Sequence[Task], tokenizer: Processing) -> None:
    """Raise UserError if --train_sampling_strategy group_by_length cannot tell how long rows are."""
    if _plain(arguments.train_sampling_strategy) != "group_by_length":
        return
    column = arguments.length_column_name
    measured = (getattr(tokenizer, "model_input_names", None) or ["input_ids"])[0]
    for task in tasks:
        rows: Any = task.train
        if column not in rows.column_names:
            if measured not in rows.column_names:
                raise UserError(
                    f"--train_sampling_strategy group_by_length would measure {measured!r}, which rows of task "
                    f"{task.name} do not hold: leave it out"
                )
        elif not str(getattr(rows.features[column], "dtype", "")).startswith(("int", "uint")):
            raise UserError(
                f"--length_column_name {column}: in task {task.name} this column does not hold whole numbers: leave it "
                "out, and rows are measured"
            )


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
