"""LwF: while the model learns new rows, it is held to its earlier predictions on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ds.evaluation.kept_logits import KeptLogits, answer_logits, divergence, keep_logits
from piece_ds.methods.baseline import Baseline, Collate, EngineCallback, Rows, TaskContext

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
    needs_logits = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher: KeptLogits | None = None

    def rows(self, context: TaskContext) -> Rows:
        return _Numbered(context.task.train)

    def collate(self, context: TaskContext) -> Collate:
        return _NumberedCollator(context.collate)

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
    return temperature**2 * divergence(student_AV.float() / temperature, teacher_AV.float() / temperature)


class _Numbered:
    """Rows that know their number."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._rows[index], ROW: index}


@dataclass(frozen=True)
class _NumberedCollator:
    """Adds the rows' numbers to a batch. A class, since a worker process that is spawned gets it by pickle."""

    of_rows: Collate

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        numbers = {ROW: torch.tensor([row[ROW] for row in rows])} if ROW in rows[0] else {}  # not while evaluating
        return {**self.of_rows(rows), **numbers}


class _Record(EngineCallback):
    """Writes the teacher when training begins."""

    def __init__(self, method: LwF, context: TaskContext) -> None:
        super().__init__()
        self.method, self.context = method, context

    def begin(self, engine: Any) -> None:
        batches = self.context.micro_batches(self.context.task.train)
        self.method.teacher = keep_logits(engine, batches, self.context.folder / FILE, "teacher")

    def end(self) -> None:
        if self.method.teacher is not None:
            self.method.teacher.close()
            self.method.teacher = None
