"""Run lm-evaluation-harness on the model as it is now: any of its tasks, even between two tasks of a stream."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from piece_ds.evaluation.batches import evaluating
from piece_ds.runtime.distributed import broadcast_object, is_main
from piece_ds.runtime.errors import UserError, nearest

OWN_TASKS = Path(__file__).with_name("harness_tasks")  # TRACE's eight, as YAML files of the harness


def check_harness(tasks: str, path: str | None) -> None:
    """Raise UserError if the harness is not installed or has no such task."""
    if path is not None and not Path(path).is_dir():
        raise UserError(f"--lm_eval_path {path}: no such folder")
    known = _task_manager(path).all_tasks
    for name in task_names(tasks):
        if name not in known:
            raise UserError(f"--lm_eval_tasks: the harness has no task {name!r}.{nearest(name, known)}")


def task_names(tasks: str) -> list[str]:
    """Return the names in --lm_eval_tasks."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str,
    path: str | None,
    limit: int | None,
    batch_size: int,
    device: torch.device | str,
) -> dict[str, float]:
    """Return the harness's results as "TASK METRIC" -> value; call it on every rank.

    Every rank does all of the work. So the ranks stay in step under ZeRO-3, and every stage gives the same numbers.
    Training modes and random states are restored afterwards.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one.
        tokenizer: the model's; it is not changed.
        tasks: names, separated by commas.
        path: folder with YAML files of further tasks.
        limit: rows of each task, from the first; None means all.
        batch_size: rows in a forward pass.
        device: where the batches go.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    place = torch.device(device)

    class Model(HFLM):
        device = place  # the harness asks the parameters, which ZeRO-3 may have moved to the CPU

    # Run it with everything that it changes put back.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every way it could have been called
    module = getattr(model, "module", model)
    with evaluating(module), same_random_states():
        # A copy of the tokenizer: the harness gives it a padding token of its own.
        wrapped = Model(pretrained=module, tokenizer=deepcopy(tokenizer), batch_size=batch_size, backend="causal")
        found: Any = simple_evaluate(
            wrapped,
            tasks=task_names(tasks),
            task_manager=_task_manager(path),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    # The harness returns results only on the main rank.
    return cast(dict[str, float], broadcast_object(_flat(found["results"]) if is_main() else None))


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return "TASK METRIC" -> value.

    A filter's name is part of it unless there is only one; errors and counts are left out.
    """
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and not metric.startswith("sample")
    }


@contextmanager
def same_random_states() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch afterwards: the harness seeds them all."""
    states, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(states)
    np.random.set_state(of_numpy)


@cache  # it reads some thousand YAML files
def _task_manager(path: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--lm_eval_tasks needs lm-evaluation-harness: pip install 'piece_ds[eval]'") from None
    return TaskManager(include_path=[str(OWN_TASKS), *([path] if path else [])])
