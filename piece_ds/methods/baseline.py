"""Define what a method without a mask adds to plain sequential fine-tuning.

The base class adds nothing: it is seqft.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.data.collate import MicroBatches
from piece_ds.data.tasks import Task


class Rows(Protocol):
    """Rows of a task: a dataset, or any object with a length and items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class TaskContext:
    """One task of the stream, as a baseline sees it.

    Attributes:
        index: of the task.
        num_tasks: of the stream.
        task: the rows.
        earlier: the earlier tasks, in order.
        folder: of the task's files.
        previous: the folder of the task before, or None.
        collate: rows -> batch.
        batch_size: rows of a micro-batch when gradients or outputs are taken besides training.
        seed: of what is drawn.
        pack_tokens: most tokens of a pack of training rows; None if a batch is of rows.
    """

    index: int
    num_tasks: int
    task: Task
    earlier: tuple[Task, ...]
    folder: Path
    previous: Path | None
    collate: Collate
    batch_size: int
    seed: int
    pack_tokens: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether the stream ends with this task."""
        return self.index == self.num_tasks - 1

    def micro_batches(self, rows: Rows) -> MicroBatches:
        """Return rows as micro-batches of batch_size rows."""
        return MicroBatches(cast(Sequence[Any], rows), self.collate, self.batch_size)


class Baseline:
    """A method without a mask. One object serves a whole stream, so a task may use what an earlier one has left in it.

    An interrupted task begins again from its start, so what lasts from task to task is read from files.

    Attributes:
        passing: names of folders in a task's folder that nobody needs once the next task is finished.
        resumes_inside: whether an interrupted task resumes from the trainer's checkpoint.
        saves_itself: whether save_model() is called instead of the trainer's.
        needs_logits: whether it reads the logits of the training rows.
        changes_gradient: whether it changes the reduced gradient, which optimizer offload does not allow.
        reads_peft_config: whether --peft_config says what it is.
        scalable: in which tasks scaled_names() scales the whole change: "every", "first" or "none".
    """

    passing: tuple[str, ...] = ()
    resumes_inside = True
    saves_itself = False
    needs_logits = False
    changes_gradient = False
    reads_peft_config = False
    scalable = "every"

    def __init__(self, settings: BaselineArguments) -> None:
        self.settings = settings

    def adapt(self, model: nn.Module, num_tasks: int, previous: Path | None) -> nn.Module:
        """Return the model that the stream trains, made once from the base model.

        Args:
            model: the base model.
            num_tasks: of the stream.
            previous: folder of the last finished task if a stream is resumed, else None.
        """
        return model

    def begin_task(self, model: nn.Module, context: TaskContext) -> None:
        """Prepare for a task, before the trainer is made."""

    def scaled_names(self, model: nn.Module) -> list[str]:
        """Return the parameters in which a task's change is linear: scaling theirs by alpha scales it by alpha.

        Args:
            model: after begin_task().
        """
        return [name for name, param in model.named_parameters() if param.requires_grad]

    def rows(self, context: TaskContext) -> Rows:
        """Return the rows to train on."""
        return context.task.train

    def num_rows(self, task: Task, earlier: Sequence[Task]) -> int:
        """Return how many rows rows() will give."""
        return len(task.train)

    def collate(self, context: TaskContext) -> Collate:
        """Return the function that makes batches of the training rows."""
        return context.collate

    def epoch(self, context: TaskContext) -> Callable[[torch.Generator], list[int]] | None:
        """Return a function that draws one epoch's order of rows(); None leaves it to --train_sampling_strategy."""
        return None

    def engine_callback(self, context: TaskContext) -> "EngineCallback | None":
        """Return what acts on the engine while it trains, or None."""
        return None

    def extra_loss(self, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        """Return what is added to the sum of a micro-batch's answer tokens' losses, or None.

        Args:
            inputs: of the micro-batch, with what take() leaves out for the model.
            outputs: of the model.
        """
        return None

    def take(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs without what only extra_loss() knows."""
        return inputs

    def end_task(self, engine: Any, context: TaskContext) -> None:
        """Keep what later tasks need, after the last step, while the engine still exists."""

    def save_model(self, model: nn.Module, state: dict[str, Tensor], context: TaskContext, to: Path | None) -> None:
        """Write a plain transformers folder. Called on one rank, if saves_itself.

        Args:
            model: the trained model.
            state: the whole model's state_dict().
            context: of the task.
            to: the folder, or None if the run keeps no models.
        """


class EngineCallback:
    """What acts on the engine while one task trains: installed when training begins, removed when it ends."""

    def __init__(self) -> None:
        self.remove: list[Callable[[], None]] = []

    def begin(self, engine: Any) -> None:
        """Install everything. The engine exists and nothing has been trained. A collective."""

    def before_step(self, engine: Any) -> None:
        """Prepare for a step, before its first micro-batch. A collective."""

    def end(self) -> None:
        """Remove everything that begin() has installed."""
        for remove in self.remove:
            remove()
        self.remove = []
