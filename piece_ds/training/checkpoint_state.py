"""What a checkpoint says of the run's progress: checked before transformers and DeepSpeed read it."""

from dataclasses import fields
from pathlib import Path

from pydantic import BaseModel, FiniteFloat
from transformers import TrainerState

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import Count, read_file, read_json
from piece_ds.training.best_step import GENERAL_BEFORE

STATE_NAME, LATEST_NAME = "trainer_state.json", "latest"


class LogRow(BaseModel, extra="allow"):
    """A row of the trainer's log: the step that it is about, and the numbers that evaluations are read from."""

    __pydantic_extra__: dict[str, float | str | bool | None]
    step: Count
    epoch: FiniteFloat | None = None
    eval_loss: float | None = None
    eval_score: float | None = None
    eval_general_loss: float | None = None


class Progress(BaseModel, extra="allow"):
    """The content of trainer_state.json, as transformers reads it without looking."""

    global_step: Count
    max_steps: Count
    epoch: FiniteFloat | None
    num_train_epochs: Count
    num_input_tokens_seen: Count = 0
    total_flos: FiniteFloat = 0
    train_batch_size: Count | None = None
    logging_steps: FiniteFloat
    eval_steps: FiniteFloat
    save_steps: FiniteFloat
    log_history: list[LogRow]
    best_metric: float | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, object] | None = None


def check_progress(checkpoint: Path, step: int) -> None:
    """Raise UserError unless a checkpoint's trainer_state.json and latest can be read, and are of its step.

    Args:
        checkpoint: its folder.
        step: that the folder is named after.
    """
    remedy = f"remove {checkpoint} to resume from what was there before it"

    # transformers' part.
    found = read_json(checkpoint / STATE_NAME, Progress, "checkpoint", remedy)
    unknown = set(found.model_extra or {}) - {field.name for field in fields(TrainerState)}
    if unknown:
        raise UserError(f"checkpoint {checkpoint / STATE_NAME}: {min(unknown)[:60]!r} is not known: {remedy}")
    if found.global_step != step or any(row.step > step for row in found.log_history):
        last = max([found.global_step, *(row.step for row in found.log_history)])
        raise UserError(f"checkpoint {checkpoint / STATE_NAME} is of step {last}, its folder of step {step}: {remedy}")
    before = [value for row in found.log_history if (value := (row.model_extra or {}).get(GENERAL_BEFORE)) is not None]
    if any(not isinstance(value, float | int) for value in before):
        raise UserError(f"checkpoint {checkpoint / STATE_NAME}: {GENERAL_BEFORE} is no number: {remedy}")

    # DeepSpeed's part is in a folder that a file names.
    name = read_file(checkpoint / LATEST_NAME, "checkpoint", remedy).decode(errors="replace").strip()
    if name != f"global_step{step}" or not (checkpoint / name).is_dir():
        raise UserError(f"checkpoint {checkpoint / LATEST_NAME} names {name[:60]!r}, which is not there: {remedy}")
