"""LwF: while the model learns new rows, it is held to its earlier predictions on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.evaluation.batches import evaluating
from piece_ds.methods.baseline import Baseline, Collate, EngineCallback, Rows, TaskContext
from piece_ds.runtime.distributed import barrier, is_main, rank, world_size
from piece_ds.runtime.progress import progress_bar

FILE, ROW = "teacher.bin", "teacher_row"


class LwF(Baseline):
    """Learning without forgetting: CE + weight * T^2 * KL(before || now) at temperature T, over the answer tokens.

    The model's logits of every answer token are written once, before the task, into OUTPUT_DIR/NN-task/teacher.bin. The
    file is removed after the task. In the first task the base model is distilled.

    Cost: one forward pass over the rows, and a file of answer tokens * vocabulary * 2 bytes (4 for fp32 models). Every
    rank maps it, so all nodes must see the output folder. The paper distils old heads; a language model has one.
    Source: Li and Hoiem 2016 (arXiv 1606.09282).
    """

    resumes_inside = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher: Teacher | None = None

    def rows(self, context: TaskContext) -> Rows:
        return _Numbered(context.task.train)

    def collate(self, context: TaskContext) -> Collate:
        def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
            numbers = {ROW: torch.tensor([row[ROW] for row in rows])} if ROW in rows[0] else {}  # not while evaluating
            return {**context.collate(rows), **numbers}

        return collate

    def engine_callback(self, context: TaskContext) -> EngineCallback | None:
        return _Record(self, context)

    def take(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in inputs.items() if key != ROW}

    def extra_loss(self, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        assert self.teacher is not None

        # Both are answer token by answer token, in the batch's order of rows.
        student = answer_logits(outputs.logits, inputs["labels"])
        before = self.teacher.read(inputs[ROW].tolist()).to(student.device)
        return self.settings.lwf_weight * distillation(student, before, self.settings.lwf_temperature)


def distillation(student_AV: Tensor, teacher_AV: Tensor, temperature: float) -> Tensor:
    """Return T^2 * sum over answer tokens of KL(teacher || student), both softened by the temperature; fp32, nats.

    Args:
        student_AV, teacher_AV: logits of A answer tokens over V words.
        temperature: T.
    """
    now = F.log_softmax(student_AV.float() / temperature, dim=-1)
    before = F.log_softmax(teacher_AV.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(now, before, reduction="sum", log_target=True)


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits [A, V] that predict the answer tokens, row by row."""
    return logits[:, :-1][labels[:, 1:].to(logits.device) != IGNORED_LABEL]


class Teacher:
    """A model's logits of every answer token of some rows, in a file.

    Attributes:
        path: of the file.
        offsets: row -> its first answer token in the file; one more for the end.
    """

    def __init__(self, path: Path, num_answer_tokens: list[int], vocabulary: int, dtype: str) -> None:
        self.path = path
        self.offsets = np.concatenate([[0], np.cumsum(num_answer_tokens)])
        self._shape, self._dtype = (int(self.offsets[-1]), vocabulary), dtype

        # One rank makes the file; all of them write to it.
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.memmap(path, dtype, "w+", shape=self._shape).flush()
        barrier()
        self._values = np.memmap(path, dtype, "r+", shape=self._shape)

    def write(self, first_row: int, logits_AV: Tensor) -> None:
        """Write the logits of all answer tokens of consecutive rows."""
        begin = self.offsets[first_row]
        self._values[begin : begin + len(logits_AV)] = logits_AV.float().cpu().numpy()

    def finish(self) -> None:
        """Wait until all ranks have written, then open the file for reading."""
        self._values.flush()
        barrier()
        self._values = np.memmap(self.path, self._dtype, "r", shape=self._shape)

    def read(self, rows: list[int]) -> Tensor:
        """Return the logits [A, V] of rows, in their order."""
        # Read from the map: only these rows are in memory.
        parts = [np.asarray(self._values[self.offsets[row] : self.offsets[row + 1]]) for row in rows]
        return torch.from_numpy(np.concatenate(parts))

    def close(self) -> None:
        """Remove the file once all ranks are done."""
        barrier()
        del self._values
        if is_main():
            self.path.unlink()


class _Numbered:
    """Rows that know their number."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._rows[index], ROW: index}


class _Record(EngineCallback):
    """Writes the teacher when training begins."""

    def __init__(self, method: LwF, context: TaskContext) -> None:
        super().__init__()
        self.method, self.context = method, context

    def begin(self, engine: Any) -> None:
        # The file needs every row's number of answer tokens before the first is written.
        batches = self.context.micro_batches(self.context.task.train)
        counts = [sum(label != IGNORED_LABEL for label in row["labels"][1:]) for row in self.context.task.train]
        teacher = None
        for first in progress_bar(range(0, len(batches), world_size()), "teacher", unit="round"):
            # A rank without a micro-batch repeats one and does not write it.
            own = first + rank()
            b = own if own < len(batches) else first  # ZeRO-3 gathers together
            logits = _forward(engine, batches[b])
            # The file's width is that of the logits, which a configuration may not tell.
            if teacher is None:
                dtype = "float32" if logits.dtype == torch.float32 else "float16"
                teacher = Teacher(self.context.folder / FILE, counts, logits.shape[-1], dtype)
            if own < len(batches):
                teacher.write(b * batches.batch_size, logits)
        assert teacher is not None
        teacher.finish()
        self.method.teacher = teacher

    def end(self) -> None:
        if self.method.teacher is not None:
            self.method.teacher.close()
            self.method.teacher = None


def _forward(engine: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch = {key: value.to(engine.device) for key, value in batch.items()}
    with evaluating(engine):
        return answer_logits(engine(**batch).logits, batch["labels"])
