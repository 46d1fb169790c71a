"""One task of the stream: a fresh engine and optimizer, statistics, selection, training, and the task's files."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from piece_ds.arguments import Settings
from piece_ds.baseline_trainer import OnEngine, make_trainer
from piece_ds.baselines import Baseline, TaskContext
from piece_ds.callback import PieceCallback
from piece_ds.checkpoint import read_selected, save_delta
from piece_ds.checkpoint.delta_file import load_previous
from piece_ds.distributed import barrier, is_main
from piece_ds.files import write_text
from piece_ds.memory import host_peak_bytes, peak_bytes, reset_peaks
from piece_ds.state.mask import Mask
from piece_ds.stream import Task
from piece_ds.task_mask import MaskSource

PREVIOUS_NAME = "previous.safetensors"
DELTA_NAME = "delta.safetensors"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class TaskResult:
    """What a trained task leaves in memory.

    Attributes:
        cost: wall time and memory.
        index: selected positions of the whole model per parameter; None without a mask.
        log: the trainer's log.
    """

    cost: "TaskCost"
    index: dict[str, Tensor] | None
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskCost:
    """Wall time and memory of one task on rank 0.

    Attributes:
        select_seconds: statistics and selection; 0 where there was nothing to select.
        train_seconds: optimizer steps.
        num_steps: optimizer steps.
        peak_bytes: most memory allocated on the accelerator; None on the CPU.
        host_peak_bytes: most resident memory of the process; None where the system does not tell.
        save_seconds: delta and model.
    """

    select_seconds: float
    train_seconds: float
    num_steps: int
    peak_bytes: int | None
    host_peak_bytes: int | None
    save_seconds: float


class TaskCallback(PieceCallback):
    """PieceCallback that also keeps what the selected weights were before the task, across interruptions."""

    previous: dict[str, Tensor]

    def on_mask(self, model: nn.Module, mask: Mask, resumed: bool) -> None:
        path = Path(self.trainer.args.output_dir) / PREVIOUS_NAME
        if resumed:
            self.previous = load_previous(path, mask)
        else:
            self.previous = read_selected(model, mask)
            save_delta(path, model, mask, self.previous)


def train_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Settings,
    folder: Path,
    method: MaskSource | Baseline,
    context: TaskContext,
    checkpoint: str | None,
    before_training: Callable[[Any], None] | None,
    after_training: Callable[[Any], None],
    save_model_to: Path | None,
    reporter: TrainerCallback,
) -> TaskResult:
    """Train one task and write its mask, delta, metrics and, if asked, model.

    Args:
        folder: of the task; the trainer's checkpoints go there too.
        method: where the task's mask comes from, or a method without a mask.
        context: the task in its stream.
        checkpoint: folder to resume from, or None.
        before_training: called with the engine before anything is estimated (not after a resume).
        after_training: called with the engine after the last step.
        save_model_to: transformers folder for the trained model, or None.
        reporter: takes the place of the Trainer's own reporters.
    """
    knows_host_peak = reset_peaks()
    arguments = settings.training_arguments(output_dir=folder, report_to="none")
    use_cache = getattr(model.config, "use_cache", None)
    trainer = make_trainer(model, arguments, task, tokenizer, method, context)
    trainer.add_callback(reporter)
    if before_training is not None and checkpoint is None:
        trainer.add_callback(_OnBegin(lambda: before_training(trainer.model_wrapped)))
    callback = None
    if isinstance(method, Baseline):
        acts = method.engine_callback(context)
        if acts is not None:
            trainer.add_callback(OnEngine(trainer, acts))
    else:
        callback = TaskCallback(
            trainer,
            ratio=settings.method.mask_ratio,
            importance_batch_size=settings.method.importance_batch_size,
            mask_file=settings.method.mask_file,
            update_mode=settings.method.update_mode,
            save_full=settings.output.save_full,
            selected_gradient=settings.method.selected_gradient,
            count=method.count,
            estimate=method.estimate,
        )
        trainer.add_callback(callback)
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=checkpoint)
    engine = trainer.model_wrapped
    if isinstance(method, Baseline):
        method.end_task(engine, context)
    index, saving_since = None, time.perf_counter()
    if callback is not None and callback.mask is not None:
        save_delta(folder / DELTA_NAME, engine.module, callback.mask, callback.previous)
        index = callback.mask.whole()
    if isinstance(method, Baseline) and method.saves_itself:
        model.config.use_cache = use_cache
        state = trainer.accelerator.get_state_dict(engine)
        if is_main():
            method.save_model(model, state, context, save_model_to)
            if save_model_to is not None:
                tokenizer.save_pretrained(str(save_model_to))
    elif save_model_to is not None:
        model.config.use_cache = use_cache  # the Trainer turns it off, and would save it so
        trainer.save_model(str(save_model_to))
        if is_main():
            (save_model_to / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says more
    if is_main():
        write_text(folder / METRICS_NAME, "".join(json.dumps(row) + "\n" for row in trainer.state.log_history))
    save_seconds = time.perf_counter() - saving_since
    after_training(engine)
    cost = TaskCost(
        select_seconds=(callback.select_seconds or 0.0) if callback else 0.0,
        train_seconds=clock.seconds,
        num_steps=trainer.state.global_step,
        peak_bytes=peak_bytes(),
        host_peak_bytes=host_peak_bytes() if knows_host_peak else None,
        save_seconds=save_seconds,
    )
    log = list(trainer.state.log_history)
    release(trainer)
    barrier()
    return TaskResult(cost, index, log)


class _OnBegin(TrainerCallback):
    """Calls a function when training begins: the engine exists, no weight has moved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.function()


class _Clock(TrainerCallback):
    """Seconds between the first step's beginning and the last step's end."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = self._begin or time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._begin is not None:
            self.seconds = time.perf_counter() - self._begin


def release(trainer: Trainer) -> None:
    """Free the engine: its hooks, buffers, masters and moments. The model stays, partitioned as it was."""
    trainer.model_wrapped.empty_partition_cache()  # ZeRO-3 may still be gathering for a forward that never comes
    trainer.model_wrapped.destroy()
    trainer.deepspeed = None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    for param in trainer.model.parameters():
        param.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
