"""transformers' Trainer as a task uses it, and what a baseline changes in it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from piece_ds.baselines import Baseline, EngineCallback, TaskContext
from piece_ds.stream import Processing, Task
from piece_ds.stream.rows import IGNORED_LABEL
from piece_ds.task_mask import MaskSource
from piece_ds.task_trainer import TaskTrainer


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
