"""Define what a trained task leaves in memory: its cost, its mask and its log."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TaskResult:
    """What a trained task leaves in memory.

    Attributes:
        cost: wall time and memory.
        index: selected positions of the whole model per parameter; None without a mask.
        log: the trainer's log.
        forgetting: what --forgetting_budget found, see limit_forgetting(); None without it.
        validation: evaluations while it trained and the step that is kept, see BestStep.result(); None without any.
    """

    cost: "TaskCost"
    index: dict[str, Tensor] | None
    log: list[dict[str, Any]]
    forgetting: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None


@dataclass(frozen=True)
class TaskCost:
    """Wall time and memory of one task on rank 0.

    Attributes:
        select_seconds: statistics and selection; 0 if there was nothing to select.
        train_seconds: optimizer steps.
        num_steps: number of optimizer steps.
        trained_tokens_per_second: over all ranks, of the steps of this process, general text's included; None if it
            took none.
        general_tokens_per_second: of them, those of general text beside the task's; None without it.
        nonfinite_steps: of num_steps, those skipped because a loss or gradient was NaN or infinite.
        overflow_steps: of num_steps, those skipped because fp16's loss scale was too large.
        peak_bytes: most memory allocated on the accelerator; None on the CPU.
        host_peak_bytes: most resident memory of the process; None if the system does not tell.
        save_seconds: delta and model.
    """

    select_seconds: float
    train_seconds: float
    num_steps: int
    trained_tokens_per_second: float | None
    general_tokens_per_second: float | None
    nonfinite_steps: int
    overflow_steps: int
    peak_bytes: int | None
    host_peak_bytes: int | None
    save_seconds: float
