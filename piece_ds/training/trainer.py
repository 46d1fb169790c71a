"""Adapt transformers' Trainer to a task of the stream: its checkpoints are complete, and it can end at any step."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from piece_ds.checkpoint.manifest import write_manifest
from piece_ds.checkpoint.selected_file import save_selected_state
from piece_ds.config.deepspeed_configs import contradiction
from piece_ds.data.packs import Packs
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.runtime.distributed import barrier, is_main, rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.profiling import timed
from piece_ds.runtime.signals import stop_asked
from piece_ds.training.checkpoints import (
    CUT_NAME,
    SELECTED_NAME,
    Update,
    cut_of,
    without_rotation,
    writing,
)
from piece_ds.training.epoch_order import EpochOrder
from piece_ds.training.general_loss import GeneralLoss
from piece_ds.training.optimizer_defaults import show_defaults
from piece_ds.training.sequences import SequenceTraining
from piece_ds.training.validation import BestStep


class TaskTrainer(Trainer):
    """transformers' Trainer; the loss is never the very tensor that the engine's forward returned.

    DeepSpeed 0.19 divides such a tensor by the accumulation steps although it is told not to, at ZeRO stage 0 and in
    BF16_Optimizer. The Trainer has divided already.

    Attributes:
        update: the mask in force, once training has begun. Checkpoints then also hold its resharded form.
        is_resharded: training resumes from a checkpoint with another sharding, so DeepSpeed's part of it is not read.
        seconds_before_first_step: of evaluation, statistics and selection between the engine and the first step.
        general: what rows of general text add to the loss of every micro-batch, or None.
        sequences: how ranks share rows, or None if each trains on its own.
        best: follows the evaluations of the task's held-out rows; None without such evaluations.
        num_packed_rows: of a micro-batch whose rows lie end to end; of packs, their mean.
        losses: of the micro-batches since this was last cleared. On the device: the host has not waited for them.
    """

    update: Update | None = None
    is_resharded = False
    seconds_before_first_step = 0.0
    general: GeneralLoss | None = None
    sequences: SequenceTraining | None = None
    best: BestStep | None = None
    control: TrainerControl

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []
        batch_size, rows = self.args.per_device_train_batch_size, self.train_dataset
        self.num_packed_rows = round(batch_size * rows.rows_per_pack) if isinstance(rows, Packs) else batch_size
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        self._micro_batch = (-1, 0)  # (step, micro-batches of it so far)

    def take_num_tokens(self) -> Tensor:
        """Return how many tokens but padding this rank has trained on since the last call (int64, on the device)."""
        taken, self._num_tokens = self._num_tokens, torch.zeros_like(self._num_tokens)
        return taken

    def for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the model takes: some columns, or this rank's range of rows."""
        return inputs if self.sequences is None else self.sequences.part(self.model_wrapped, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers' Trainer does, with what general text was since the last row of training."""
        if "loss" in logs and self.general is not None:
            logs |= self.general.take_row()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does, with attention over all ranks that share rows."""
        with nullcontext() if self.sequences is None else self.sequences.attention(self.model):
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward as transformers' Trainer does, or with the ranks that share rows."""
        if self.sequences is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        self._num_tokens = _num_tokens(inputs) + self._num_tokens.to(inputs["input_ids"].device)
        general = None if self.general is None else partial(self._general_part, model, inputs, num_items_in_batch)
        self.losses.append(self.sequences.step(self, model, inputs, num_items_in_batch, general))
        # The Trainer averages means, and adds up what was divided by the tokens of a step.
        is_mean = num_items_in_batch is None
        return self.losses[-1] / self.current_gradient_accumulation_steps if is_mean else self.losses[-1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss as transformers' Trainer does, with general text's added, and count tokens."""
        if model.training:
            self._num_tokens = _num_tokens(inputs) + self._num_tokens.to(inputs["input_ids"].device)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.general is not None:
            loss = loss + self._general_part(model, inputs, num_items_in_batch)
        loss = self._noted(loss, model.training)
        return (loss, outputs) if return_outputs else loss

    def _general_part(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Return what general text adds to the loss of a micro-batch."""
        assert self.general is not None
        num_rows = self.num_packed_rows if "position_ids" in inputs else len(inputs["input_ids"])
        extra = self.general.loss(model, self._next_micro_batch(), num_rows, inputs["input_ids"].device)
        return self._as_expected(extra, num_items_in_batch)

    def _as_expected(self, mean: Tensor, num_items_in_batch: Any) -> Tensor:
        """Return a micro-batch's mean as the Trainer adds it up to the mean of a step's micro-batches."""
        # The Trainer adds up losses that the model has divided by the tokens of the whole step, and averages others.
        is_summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return mean / self.current_gradient_accumulation_steps if is_summed else mean

    def _next_micro_batch(self) -> int:
        """Return the number of this micro-batch over all ranks and steps of the task, and count it."""
        # A step's count begins anew whenever the Trainer has taken one.
        step, in_step = self._micro_batch
        in_step = in_step if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, in_step + 1)
        number = self.state.global_step * self.args.gradient_accumulation_steps + in_step
        return number * world_size() + rank()

    def _noted(self, loss: Tensor, training: bool) -> Tensor:
        """Return loss * 1.0, or NaN if it is infinite: every rank then sees it in the norm of the reduced gradient."""
        if not training:
            return loss * 1.0
        self.losses.append(loss.detach())
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # With another sharding, DeepSpeed must not read its part of the checkpoint.
        deepspeed_part = None if self.is_resharded else resume_from_checkpoint
        engine = nullcontext() if self.sequences is None else self.sequences.engine()
        try:
            with engine:
                prepared = super()._prepare_for_training(max_steps, train_dataloader, deepspeed_part)
        except ValueError as error:
            if "DeepSpeed config values" not in str(error):
                raise
            raise UserError(contradiction(error)) from error
        if self.is_resharded:  # the schedule is the trainer's own
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            groups = self.model_wrapped.basic_optimizer.param_groups  # a loaded schedule sets rates at its next step
            for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule. Some (polynomial, cosine_with_min_lr) read defaults that DeepSpeed's wrapper hides."""
        show_defaults(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time + self.seconds_before_first_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model on the task's held-out rows, and log it. A collective."""
        if self.best is None:
            return super().evaluate(*args, **kwargs)
        metrics = self.best.validation.measure(self.model_wrapped)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

        # A signal that came meanwhile ends the run at this step, with a checkpoint.
        if stop_asked():
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether a checkpoint of --save_strategy best is due; keep the weights of a new best step."""
        if self.best is None:
            return super()._determine_best_metric(metrics, trial)
        is_best = self.best.note(self.model_wrapped, self.state)
        if is_best and self.args.metric_for_best_model is not None:
            self.state.best_metric = metrics.get(f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}")
            self.state.best_global_step = self.state.global_step
        if self.best.is_exhausted(self.state):
            self.control.should_training_stop = True
        return is_best or stop_asked()

    def _run_epoch(self, **kwargs: Any) -> None:
        # A run may resume from a checkpoint of the very step that early stopping ended it at.
        if self.best is not None and self.best.is_exhausted(self.state):
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    @timed("saving")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint. It counts once it is complete; only then may older ones be removed."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with without_rotation(self.args), writing(folder):
            super()._save_checkpoint(model, trial)

        # What lets another number of ranks or stage resume.
        if self.update is not None:
            save_selected_state(folder / SELECTED_NAME, self.update.mask, self.update.state())
        if self.best is not None:
            self.best.save(folder, self.model_wrapped)
        if is_main():
            write_json(folder / CUT_NAME, cut_of(self.args))

        # The manifest makes it complete.
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
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochOrder(self._epoch, len(train_dataset or self.train_dataset), seed)

    def for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs without what only the baseline knows."""
        return self.baseline.take(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss as TaskTrainer does, plus what the baseline adds to it."""
        known = self.for_model(inputs)
        loss, outputs = super().compute_loss(model, known, True, num_items_in_batch)
        extra = self.baseline.extra_loss(inputs, outputs) if model.training else None
        if extra is not None:
            loss = loss + extra / self._num_answer_tokens(inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _num_answer_tokens(self, labels: Tensor, num_items_in_batch: Any) -> Any:
        """Return the number by which the Trainer, in effect, divides the sum of the answer tokens' losses."""
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return (labels[:, 1:] != IGNORED_LABEL).sum()
        shared = self.args.average_tokens_across_devices
        return num_items_in_batch / (self.accelerator.num_processes if shared else 1)


def _num_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return how many tokens are not padding (int64, on the device; the host does not wait)."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return torch.tensor(inputs["input_ids"].numel())
