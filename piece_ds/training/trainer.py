"""transformers' Trainer for a task of the stream: its checkpoints are sealed, and can be left at any step."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from piece_ds.checkpoint.manifest import is_complete, verify_manifest, write_manifest
from piece_ds.checkpoint.selected_file import load_selected_state, save_selected_state
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.data.tasks import Task
from piece_ds.methods.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.models.processor import Processing
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import not_written, write_json
from piece_ds.runtime.profiling import timed
from piece_ds.runtime.schema import read_json
from piece_ds.runtime.signals import stop_asked
from piece_ds.training.mask_source import MaskSource
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate


class _EpochOrder(Sampler[int]):
    """A new order for every pass, the same on every rank."""

    def __init__(self, draw: Callable[[torch.Generator], list[int]], length: int, seed: int) -> None:
        self._draw, self._length, self._seed, self._num_passes = draw, length, seed, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._num_passes)
        self._num_passes += 1
        return iter(self._draw(generator))


class OnEngine(TrainerCallback):
    """Tells a baseline's EngineCallback what happens to the trainer."""

    def __init__(self, trainer: Trainer, acts: EngineCallback) -> None:
        self.trainer, self.acts = trainer, acts

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.acts.begin(self.trainer.model_wrapped)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.acts.before_step(self.trainer.model_wrapped)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.acts.end()


CUT_NAME, SELECTED_NAME = "piece_checkpoint.json", "selected.safetensors"

Update = MaskedUpdate | CompactUpdate


class TaskTrainer(Trainer):
    """transformers' Trainer; the loss is never the very tensor that the engine's forward returned.

    DeepSpeed 0.19 divides such a loss by the accumulation steps although it is told not to, at ZeRO stage 0 and in
    BF16_Optimizer, and the Trainer has divided already.

    Attributes:
        update: the mask in force, once training has begun; checkpoints then hold the portable form of it too.
        portable: training goes on from a checkpoint of another cut: DeepSpeed's part of it is not read.
        losses: of the micro-batches since this was last cleared; on the device, nobody has waited for them.
    """

    update: Update | None = None
    portable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []
        self._num_tokens = torch.zeros((), dtype=torch.int64)

    def take_num_tokens(self) -> Tensor:
        """Tokens that this rank has trained on since they were last taken, without padding (int64, no element read)."""
        taken, self._num_tokens = self._num_tokens, torch.zeros_like(self._num_tokens)
        return taken

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._num_tokens = tokens + self._num_tokens.to(inputs["input_ids"].device)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return (self._noted(result[0], model.training), *result[1:])
        return self._noted(result, model.training)

    def _noted(self, loss: Tensor, training: bool) -> Tensor:
        """loss * 1.0; NaN where it is infinite, so that every rank sees it in the norm of the reduced gradient."""
        if not training:
            return loss * 1.0
        self.losses.append(loss.detach())
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        deepspeed_part = None if self.portable else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, deepspeed_part)
        if self.portable:  # the schedule is the trainer's own
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            groups = self.model_wrapped.basic_optimizer.param_groups  # a loaded schedule sets rates at its next step
            for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        return prepared

    @timed("saving")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint counts once it is sealed, and only then may older ones go."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with _without_rotation(self.args), _writing(folder):
            super()._save_checkpoint(model, trial)
        if self.update is not None:
            save_selected_state(folder / SELECTED_NAME, self.update.mask, self.update.state())
        if is_main():
            write_json(folder / CUT_NAME, cut_of(self.args))
        write_manifest(folder)
        if is_main():
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        barrier()


class BaselineTrainer(TaskTrainer):
    """TaskTrainer with a baseline's order of rows and its addition to the loss."""

    def __init__(self, baseline: Baseline, context: TaskContext, **options: Any) -> None:
        super().__init__(**options)
        self.baseline, self._epoch = baseline, baseline.epoch(context)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._epoch is None:
            return super()._get_train_sampler(train_dataset)
        return _EpochOrder(self._epoch, len(train_dataset or self.train_dataset), self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        known = self.baseline.take(inputs)
        loss, outputs = super().compute_loss(model, known, True, num_items_in_batch)
        extra = self.baseline.extra_loss(inputs, outputs) if model.training else None
        if extra is not None:
            loss = loss + extra / self._num_answer_tokens(inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _num_answer_tokens(self, labels: Tensor, num_items_in_batch: Any) -> Any:
        """What the Trainer divides the sum of the answer tokens' losses by, in effect."""
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return (labels[:, 1:] != IGNORED_LABEL).sum()
        shared = self.args.average_tokens_across_devices
        return num_items_in_batch / (self.accelerator.num_processes if shared else 1)


def make_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    task: Task,
    tokenizer: Processing,
    method: MaskSource | Baseline,
    context: TaskContext,
) -> TaskTrainer:
    """The trainer of one task: plain where a mask is trained, with the baseline's rows and loss otherwise."""
    options: dict[str, Any] = {
        "args": arguments,
        "eval_dataset": task.eval if arguments.eval_strategy != "no" else None,
        "processing_class": tokenizer,
    }
    if not isinstance(method, Baseline):
        return TaskTrainer(model=model, train_dataset=task.train, data_collator=context.collate, **options)
    arguments.remove_unused_columns = False  # a baseline's rows may carry more than the model knows
    method.begin_task(model, context)
    rows, collate = method.rows(context), method.collate(context)
    return BaselineTrainer(method, context, model=model, train_dataset=rows, data_collator=collate, **options)


def cut_of(arguments: TrainingArguments) -> dict[str, Any]:
    """What a checkpoint of DeepSpeed is cut for: it can be loaded where all of this is the same."""
    config = arguments.hf_deepspeed_config
    zero = {
        key: config.get_value(f"zero_optimization.{key}") for key in ("stage", "offload_optimizer", "offload_param")
    }
    return {
        "format": "piece-checkpoint",
        "version": 1,
        "world_size": world_size(),
        "zero": zero,
        "data_types": config.get_value("data_types"),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest sealed checkpoint of a task, or None; the same on all ranks. A collective."""
    sealed = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(path)]
    return broadcast_object(max(sealed, key=step_of, default=None))


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps before a checkpoint; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])


def needs_resharding(checkpoint: Path, arguments: TrainingArguments, masked: bool) -> bool:
    """Check a checkpoint's files, then say whether it must be read in its portable form. A collective.

    Raises:
        UserError: a file of it is damaged, or it is of another cut and holds no selection.
    """
    try:
        verify_manifest(checkpoint)
    except UserError as error:
        raise UserError(f"{error}; remove {checkpoint} to go on from what was there before it") from None
    found = read_json(checkpoint / CUT_NAME, dict[str, Any], "checkpoint", "resume from an earlier one")
    now = json.loads(json.dumps(cut_of(arguments)))
    if found == now:
        return False
    if not masked:
        raise UserError(
            f"{checkpoint} was written with {_shown(found)}, this is {_shown(now)}: without a mask a "
            "checkpoint goes on only as it was begun"
        )
    if not hasattr(Trainer, "_prepare_for_training"):
        raise UserError("going on with another number of ranks, ZeRO stage or offload needs transformers 5.23 or later")
    return True


def restore_resharded(update: Update, checkpoint: Path) -> None:
    """Bring a mask in force to where a checkpoint of another cut was. A collective."""
    update.restore(load_selected_state(checkpoint / SELECTED_NAME, update.mask))


class StopAtStep(TrainerCallback):
    """Where a signal asks the run to end: a checkpoint after this step, and no further step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if stop_asked():
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def _without_rotation(arguments: TrainingArguments) -> Iterator[None]:
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        yield
    finally:
        arguments.save_total_limit = limit


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Errors of the disk, which torch reports as RuntimeError, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from error
    except RuntimeError as error:
        if not any(writer in str(error) for writer in ("PytorchStreamWriter", "inline_container")):
            raise
        raise not_written(folder, error) from error


def _shown(cut: dict[str, Any]) -> str:
    return f"{cut.get('world_size')} ranks and {json.dumps(cut.get('zero'))}"
