"""What a method without a mask adds to plain sequential fine-tuning. The base class adds nothing: it is seqft."""

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
    """Rows of a task: a dataset, or anything with a length and items."""

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
        earlier: the tasks before, in order.
        folder: where the task's files go.
        previous: the folder of the task before, or None.
        collate: rows -> batch.
        batch_size: rows of a micro-batch where gradients or outputs are taken beside training.
        seed: of what is drawn.
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

    @property
    def is_last(self) -> bool:
        return self.index == self.num_tasks - 1

    def micro_batches(self, rows: Rows) -> MicroBatches:
        return MicroBatches(cast(Sequence[Any], rows), self.collate, self.batch_size)


class Baseline:
    """One object serves a whole stream: what it learns from a task it may use in the next.

    A task that was interrupted begins again from its start, so what lasts from task to task is read from files.

    Attributes:
        passing: names of folders in a task's folder that nobody needs once the next task is finished.
        resumes_inside: whether a task that was interrupted goes on from the trainer's checkpoint.
        saves_itself: whether save_model() is to be called in the trainer's place.
        changes_gradient: whether it changes the reduced gradient, which optimizer offload does not allow.
    """

    passing: tuple[str, ...] = ()
    resumes_inside = True
    saves_itself = False
    changes_gradient = False

    def __init__(self, settings: BaselineArguments) -> None:
        self.settings = settings

    def adapt(self, model: nn.Module, num_tasks: int, previous: Path | None) -> nn.Module:
        """Return the model that the stream trains, made of the base model once.

        Args:
            previous: folder of the last finished task, where a stream is resumed.
        """
        return model

    def begin_task(self, model: nn.Module, context: TaskContext) -> None:
        """Prepare for a task, before the trainer is made."""

    def rows(self, context: TaskContext) -> Rows:
        """Return what is trained on."""
        return context.task.train

    def num_rows(self, task: Task, earlier: Sequence[Task]) -> int:
        """Return how many rows rows() will give."""
        return len(task.train)

    def collate(self, context: TaskContext) -> Collate:
        """Return the function that makes batches of the training rows."""
        return context.collate

    def epoch(self, context: TaskContext) -> Callable[[torch.Generator], list[int]] | None:
        """Return what draws one epoch's order of rows(); None leaves it to --train_sampling_strategy."""
        return None

    def engine_callback(self, context: TaskContext) -> "EngineCallback | None":
        """Return what acts on the engine while it trains."""
        return None

    def extra_loss(self, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        """Return what is added to the sum of a micro-batch's answer tokens' losses; may take keys out of inputs."""
        return None

    def take(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs without what only extra_loss() knows."""
        return inputs

    def end_task(self, engine: Any, context: TaskContext) -> None:
        """Note what later tasks need, after the last step, with the engine still there."""

    def save_model(self, model: nn.Module, state: dict[str, Tensor], context: TaskContext, to: Path | None) -> None:
        """Write a plain transformers folder; called on one rank, where saves_itself.

        Args:
            state: the whole model's state_dict().
            to: the folder, or None where the run keeps no models.
        """


class EngineCallback:
    """What acts on the engine while one task trains: installed when training begins, removed when it ends."""

    def __init__(self) -> None:
        self.remove: list[Callable[[], None]] = []

    def begin(self, engine: Any) -> None:
        """Begin: the engine exists and nothing has been trained. A collective."""

    def before_step(self, engine: Any) -> None:
        """Prepare for a step, before its first micro-batch. A collective."""

    def end(self) -> None:
        for remove in self.remove:
            remove()
        self.remove = []
