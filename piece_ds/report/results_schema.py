"""The schema of results.json, on which reports and resumed runs rely."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from piece_ds.runtime.schema import Count

# 64 bits: a larger whole number may have no float.
Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float
Figure = Number | Literal["inf", "-inf", "nan"] | None
Row = list[Figure]


class Measure(BaseModel):
    """One measure of all tasks; see evaluation/matrix.py."""

    before: Row | None
    after: list[Row]


class General(BaseModel):
    """The loss on general text, before any task and after each."""

    before: Figure
    after: Row


class Matrix(BaseModel):
    """The result matrix. Rows have one value per task, and measures one row per trained task."""

    tasks: list[str]
    metrics: list[str]
    score: Measure | None = None
    accuracy: Measure
    loss: Measure
    general_loss: General

    @model_validator(mode="after")
    def _fits(self) -> Self:
        num_tasks, num_trained = len(self.tasks), len(self.loss.after)
        if len(set(self.tasks)) != num_tasks:
            raise ValueError("a task is named twice")
        if len(self.metrics) != num_tasks:
            raise ValueError(f"{len(self.metrics)} metrics for {num_tasks} tasks")
        if num_trained > num_tasks or len(self.general_loss.after) != num_trained:
            raise ValueError(f"{num_trained} rows of losses for {num_tasks} tasks")
        for measure in (self.score, self.accuracy, self.loss):
            if measure is None:
                continue
            rows = [*measure.after, *([] if measure.before is None else [measure.before])]
            if len(measure.after) != num_trained or any(len(row) != num_tasks for row in rows):
                raise ValueError("rows of a measure are not as many or as long as the tasks")
        return self


class Cell(BaseModel):
    """Selected and all elements of one module type in one layer."""

    selected: Count
    total: Count


class Changed(BaseModel):
    """How many values of one kind of tensor are selected, and how many of those changed."""

    values: Count
    changed: Count


class LogEntry(BaseModel, extra="allow"):
    """A row of the trainer's log."""

    step: Count | None = None
    loss: Number | None = None


class Forgetting(BaseModel, extra="allow"):
    """What --forgetting_budget found for one task; see training/forgetting.py."""

    delta_scale: Number
    curve: dict[str, Any]


class Evaluated(BaseModel, extra="allow"):
    """One evaluation on held-out rows; see training/best_step.py."""

    step: Count
    loss: Number | None
    score: Number | None = None
    general_rise: Number | None = None


class Validation(BaseModel, extra="allow"):
    """The evaluations while one task trained; see training/validation.py."""

    rows: Count
    metric: str
    best_step: Count | None
    used_step: Count
    last_step: Count
    stopped_early: bool
    curve: list[Evaluated]


class Results(BaseModel):
    """The content of results.json; see RunResults."""

    format: Literal["piece-results"]
    version: Literal[1]
    method: str
    ratio: Number
    matrix: Matrix
    masks: dict[str, dict[str, dict[str, Cell]]]
    overlaps: list[list[Number]]
    logs: dict[str, list[LogEntry]]
    cost: dict[str, dict[str, Number | None]]
    name: str | None = None
    measures: dict[str, dict[str, dict[str, Number]]] = {}
    ability: dict[str, dict[str, Number]] = {}
    divergence: dict[str, dict[str, Number]] = {}
    settings: dict[str, Any] = {}
    notes: list[str] = []
    forgetting: dict[str, Forgetting] = {}
    validation: dict[str, Validation] = {}
    rows: dict[str, Count] = {}
    changes: dict[str, dict[str, Changed]] = {}
