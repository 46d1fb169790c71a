"""Keep results.json while a stream runs: it grows task by task, and tells where to resume.

It is written whole after the evaluation before any task, and again after every task.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from piece_ds.checkpoint.mask_statistics import mask_statistics, overlap, read_index
from piece_ds.config.settings import Settings
from piece_ds.data.tasks import Task
from piece_ds.evaluation.evaluate import EvalResult
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.methods.registry import METHODS, find_method
from piece_ds.report.results import RunResults, read_results
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.files import write_json


def open_results(
    path: Path, settings: Settings, tasks: list[Task], scorers: dict[str, str], resume: bool
) -> RunResults:
    """Return what path holds if the run is resumed, else empty results.

    Args:
        path: of results.json.
        settings: of the run.
        tasks: of the stream, in order.
        scorers: task -> name of its scorer.
        resume: whether to continue the results in path.
    """
    if resume and path.is_file():
        return read_results(path)

    # Name and ratio of the run's row in the report.
    method = settings.method
    chosen = find_method(method.method)
    ratio = 1.0 if chosen.trains_everything or chosen.ignores_ratio else method.mask_ratio
    notes = [
        f"{task.name} was judged on rows it trained on: it has no held-out ones." for task in tasks if not task.held_out
    ]
    return RunResults(
        name=method.method if ratio == 1.0 else f"{method.method} {100 * ratio:g} %",
        method=method.method,
        ratio=ratio,
        matrix=ResultMatrix(
            tuple(task.name for task in tasks), tuple(get_scorer(scorers[task.name]).metric for task in tasks)
        ),
        settings=settings.shown(),
        notes=notes,
        rows={task.name: len(task.test) for task in tasks},
    )


def num_finished(results: RunResults) -> int:
    """Return the number of tasks that need not be done again."""
    return len(results.matrix.loss.after)


def num_steps_before(results: RunResults) -> int:
    """Return the number of optimizer steps of all finished tasks."""
    return sum(int(cost.get("num_steps", 0)) for cost in results.cost.values())


def is_judged_before(results: RunResults) -> bool:
    """Return whether the row before any task is there."""
    return results.matrix.loss.before is not None


def with_before(results: RunResults, scores: EvalResult) -> RunResults:
    """Return results with the row before any task."""
    matrix = results.matrix.with_before(scores.score, scores.loss, scores.general_loss)
    return _with_details(replace(results, matrix=matrix), "before", scores)


def with_before_of(results: RunResults, other: RunResults) -> RunResults:
    """Return results with the row before any task of another run, which has judged the same model on the same rows."""
    assert (results.tasks, results.rows) == (other.tasks, other.rows)
    assert is_judged_before(other)
    return replace(
        results,
        matrix=results.matrix.with_before_of(other.matrix),
        measures={**results.measures, **_only_before(other.measures)},
        ability={**results.ability, **_only_before(other.ability)},
    )


def _only_before(found: Mapping[str, Any]) -> dict[str, Any]:
    return {moment: values for moment, values in found.items() if moment == "before"}


def with_task(
    results: RunResults,
    task: str,
    scores: EvalResult,
    cost: dict[str, Any],
    index: dict[str, Tensor] | None,
    numel: dict[str, int],
    log: list[dict[str, Any]],
) -> RunResults:
    """Return results with one more finished task.

    Args:
        results: so far.
        task: the task's name.
        scores: evaluation after it.
        cost: of the task, JSON-ready.
        index: selected positions per parameter, or None without a mask.
        numel: number of elements of each parameter.
        log: the trainer's log.
    """
    # The mask. Some methods decide themselves how much they select, so the ratio is known only now.
    masks = results.masks if index is None else {**results.masks, task: mask_statistics(index, numel)}
    if index is not None and METHODS[results.method].ignores_ratio:
        num_selected = sum(positions.numel() for positions in index.values())
        results = replace(results, ratio=num_selected / sum(numel.values()))
    results = replace(
        results,
        matrix=results.matrix.with_row(scores.score, scores.loss, scores.general_loss),
        masks=masks,
        logs={**results.logs, task: log},
        cost={**results.cost, task: {**cost, **scores.cost}},
    )
    return _with_details(results, f"after {task}", scores)


def with_forgetting(results: RunResults, task: str, found: dict[str, Any] | None) -> RunResults:
    """Return results with what --forgetting_budget found for a task."""
    return results if found is None else replace(results, forgetting={**results.forgetting, task: found})


def with_validation(results: RunResults, task: Task, found: dict[str, Any] | None) -> RunResults:
    """Return results with the evaluations while a task trained, and a note if they chose by the rows that judge it."""
    if found is None:
        return results
    results = replace(results, validation={**results.validation, task.name: found})
    chosen = found["used_step"] != found["last_step"] or found["stopped_early"]
    if not chosen or task.validation is not None:
        return results
    note = (
        f"{task.name} is judged on the rows that chose its best step, so its last figures flatter it a little: a test "
        "file has none of it."
    )
    return replace(results, notes=[*results.notes, note])


def with_divergence(results: RunResults, moment: str, found: dict[str, float]) -> RunResults:
    """Return results with the divergence from the base model at moment."""
    return replace(results, divergence={**results.divergence, moment: found}) if found else results


def _with_details(results: RunResults, moment: str, scores: EvalResult) -> RunResults:
    """Return results with what was measured besides the scores at moment."""
    measures = {**results.measures, moment: scores.measures} if scores.measures else results.measures
    ability = {**results.ability, moment: scores.ability} if scores.ability else results.ability
    return replace(results, measures=measures, ability=ability)


def with_overlaps(results: RunResults, mask_files: list[Path]) -> RunResults:
    """Return results with the overlap of every two masks; only rank 0 reads them."""
    if not is_main() or not mask_files:
        return results

    # From the files: masks of earlier tasks are not in memory.
    masks = [read_index(path)[0] for path in mask_files]
    return replace(results, overlaps=[[overlap(first, second) for second in masks] for first in masks])


def write_results(results: RunResults, path: Path) -> None:
    """Write results on rank 0; all ranks return when the file is there."""
    if is_main():
        write_json(path, results.to_json())
    barrier()
