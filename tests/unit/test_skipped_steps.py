"""What is said of a step that was not taken: which loss or rank, how many entries, and what the run does then."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from piece_ds.training import nonfinite
from piece_ds.training.nonfinite import NONFINITE, OVERFLOW, NonfiniteCallback, NonfiniteError, _Report
from piece_ds.training.trainer_callbacks import EvaluateLastStep
from piece_ds.zero.step_watch import SkippedStep

WEIGHT = "model.norm.weight"


class Metrics:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, dict[str, Any]]] = []

    def note(self, event: str, **values: Any) -> None:
        self.noted.append((event, values))

    def count(self, event: str) -> int:
        return sum(noted == event for noted, _ in self.noted)


def end_of_step(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own: SkippedStep | None,
    other: _Report | None = None,
    *,
    losses: tuple[float, ...] = (1.0, 2.0),
    finite: bool | None = True,
    replicated: bool = False,
    policy: str = "skip",
) -> Metrics:
    """Tell the callback that step 5 has ended; another rank's report follows its own."""
    metrics = Metrics()
    watch = SimpleNamespace(fault=own, replicated=replicated, take_charge=lambda: None)
    update = SimpleNamespace(watch=watch, is_local_finite=lambda: finite)
    trainer: Any = SimpleNamespace(update=update, losses=[torch.tensor(loss) for loss in losses])
    monkeypatch.setattr(nonfinite, "all_gather_objects", lambda report: [report, *([] if other is None else [other])])
    callback = NonfiniteCallback(trainer, "law", policy, metrics)  # type: ignore[arg-type]
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_step_end(args, TrainerState(global_step=5), TrainerControl())
    return metrics


def test_a_step_that_was_taken_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert end_of_step(monkeypatch, tmp_path, None).noted == []


def test_the_loss_is_named_by_rank_and_micro_batch_from_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = SkippedStep(3, (WEIGHT, 7))
    metrics = end_of_step(monkeypatch, tmp_path, own, losses=(1.0, float("nan"), float("inf")))
    where = f"3 entries of the gradient are NaN or infinite, the first {WEIGHT}[7] (flat index)"
    assert metrics.noted == [(NONFINITE, {"found": f"the loss is nan on rank 0, micro-batch 2 and 1 more; {where}"})]
    other = _Report(SkippedStep(2, (WEIGHT, 9)), [(1, float("-inf"))], True)
    metrics = end_of_step(monkeypatch, tmp_path, SkippedStep(), other)
    where = where.replace("3 entries", "2 entries").replace("[7]", "[9]")
    assert metrics.noted == [(NONFINITE, {"found": f"the loss is -inf on rank 1, micro-batch 1; {where}"})]


def test_entries_of_ranks_add_up_unless_each_holds_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for replicated, count in ((False, 7), (True, 3)):
        own, other = SkippedStep(3, (WEIGHT, 7)), _Report(SkippedStep(4, (WEIGHT, 8)), [], False)
        metrics = end_of_step(monkeypatch, tmp_path, own, other, replicated=replicated)
        ((_, said),) = metrics.noted
        assert said["found"].startswith(f"{count} entries of the gradient")
        assert said["found"].endswith("every loss is finite; the gradient of rank 1 is not")
    metrics = end_of_step(monkeypatch, tmp_path, SkippedStep(), finite=None)
    assert metrics.noted[0][1]["found"].startswith("the norm of the gradient is infinite, its entries are finite")


def test_a_scale_that_is_too_large_is_no_fault_unless_a_loss_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    falls = SkippedStep(may_recover=True)
    assert end_of_step(monkeypatch, tmp_path, falls, _Report(falls, [], None)).noted == [(OVERFLOW, {})]
    for other in (_Report(falls, [(1, float("nan"))], None), _Report(SkippedStep(), [], None)):
        assert end_of_step(monkeypatch, tmp_path, falls, other).noted[0][0] == NONFINITE


def test_a_run_that_is_to_stop_says_the_step_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NonfiniteError, match=r"step 5 of task law: 1 entries.*--nonfinite skip$"):
        end_of_step(monkeypatch, tmp_path, SkippedStep(1, (WEIGHT, 0)), policy="stop")


def test_the_last_step_is_evaluated_if_the_best_one_is_kept() -> None:
    for loads_best, step, is_due in ((True, 4, True), (True, 3, False), (False, 4, False), (None, 4, False)):
        validation: Any = None if loads_best is None else SimpleNamespace(loads_best=loads_best)
        control = TrainerControl()
        state = TrainerState(global_step=step, max_steps=4)
        EvaluateLastStep(validation).on_step_end(None, state, control)  # type: ignore[arg-type]
        assert control.should_evaluate == is_due
