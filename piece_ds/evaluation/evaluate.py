"""Evaluate a model: loss and score of every task, loss on general text, and benchmarks if they are asked for."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from piece_ds.config.settings import Settings
from piece_ds.data.image_collate import ImageCollator, make_collator
from piece_ds.data.tasks import Task
from piece_ds.evaluation.benchmarks import run_benchmarks
from piece_ds.evaluation.generate import Decoding, Generated, generate_texts
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.evaluation.predictions import write_predictions
from piece_ds.evaluation.scorers import AUTHORS, Scorer, get_scorer
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.runtime.distributed import barrier, is_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalResult:
    """One row of the result matrix.

    Attributes:
        loss: task -> nats per answer token.
        score: task -> its scorer's score, in [0, 1]; None if nothing was generated.
        general_loss: nats per token of general text; None without such text.
        seconds: wall time.
        measures: task -> other measures, in [0, 1]; only for tasks that have any.
        ability: benchmark -> value, in [0, 1] unless the harness uses another unit.
        num_tokens: generated for the tasks, by all ranks.
        generate_seconds: wall time of that generation.
    """

    loss: dict[str, float | None]
    score: dict[str, float | None]
    general_loss: float | None
    seconds: float
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    ability: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    generate_seconds: float = 0.0

    @property
    def cost(self) -> dict[str, float]:
        """What the evaluation took, under names that say the unit."""
        cost = {"evaluate_seconds": self.seconds}
        if self.num_tokens:
            cost["generated_tokens_per_second"] = self.num_tokens / self.generate_seconds
        return cost


def evaluate_tasks(
    model: Any,
    tokenizer: Processing,
    tasks: list[Task],
    scorers: dict[str, str],
    general: datasets.Dataset | None,
    batch_size: int,
    settings: Settings,
    device: Any,
    folder: Path,
) -> EvalResult:
    """Evaluate tasks and general text. A collective: under ZeRO-3 every forward pass gathers parameters.

    Args:
        model: a transformers model or the DeepSpeed engine around one.
        tokenizer: the model's tokenizer or processor.
        tasks: tasks to evaluate.
        scorers: task -> name of its scorer, at least for tasks.
        general: encoded text that no task trains.
        batch_size: rows in a forward pass on each rank.
        settings: the run's; scoring, lengths and decoding are read.
        device: where the batches go.
        folder: rank 0 writes the outputs there, one TASK.jsonl per task.
    """
    begin = time.perf_counter()
    collate = make_collator(tokenizer)
    losses: dict[str, float | None] = {}
    scores: dict[str, float | None] = {}
    measures: dict[str, dict[str, float]] = {}
    generated: list[Generated] = []

    # Each task: the loss of the gold answers, then the score of the model's own.
    for task in tasks:
        losses[task.name] = evaluate_loss(model, task.test, collate, batch_size, device).mean
        scores[task.name] = None
        if get_scorer(scorers[task.name]).generates:
            answers, found = score_task(model, tokenizer, task, scorers[task.name], batch_size, settings, device)
            generated.append(answers)
            scores[task.name] = found.pop("score")
            measures |= {task.name: found} if found else {}
            if is_main():
                golds = task.references or task.answers
                write_predictions(folder / f"{task.name}.jsonl", task.prompt_texts, golds, answers.texts)

    # What no task trains: general text and benchmarks.
    general_loss = None
    if general is not None:
        general_loss = evaluate_loss(model, general, collate, batch_size, device).mean
    ability = run_benchmarks(model, tokenizer_of(tokenizer), batch_size, settings, device, folder)

    # No rank may read rank 0's files, or start to train, before they are written.
    barrier()
    return EvalResult(
        losses,
        scores,
        general_loss,
        time.perf_counter() - begin,
        measures,
        ability,
        sum(answers.num_tokens for answers in generated),
        sum(answers.seconds for answers in generated),
    )


def score_task(
    model: Any,
    tokenizer: Processing,
    task: Task,
    scorer: str,
    batch_size: int,
    settings: Settings,
    device: Any,
) -> tuple[Generated, dict[str, float]]:
    """Return a model's answers to a task's test rows, and its "score" with the measures beside it. A collective.

    Args:
        model, tokenizer, batch_size, settings, device: as in evaluate_tasks().
        task: with rows that answers can be generated for.
        scorer: name of one that generates.
    """
    judge = get_scorer(scorer)
    answers = _answers(model, tokenizer, task, judge, batch_size, settings, device)
    golds = task.references or task.answers
    return answers, judge.score(answers.texts, golds, task.prompt_texts, settings.evaluation.scoring)


def _answers(
    model: Any,
    tokenizer: Processing,
    task: Task,
    scorer: Scorer,
    batch_size: int,
    settings: Settings,
    device: Any,
) -> Generated:
    asked = settings.evaluation
    is_short = scorer.is_short_for_authors if asked.scoring == AUTHORS else scorer.is_short
    collate = make_collator(tokenizer)
    answers = generate_texts(
        model,
        task.prompts(),
        tokenizer_of(tokenizer),
        settings.data.max_new_tokens if is_short else asked.max_new_tokens_text,
        batch_size,
        device,
        Decoding(sample=asked.sample, seed=asked.sample_seed),
        description=f"answers to {task.name}",
        batch_of=(lambda indices: collate.prompts([task.test[index] for index in indices]))
        if isinstance(collate, ImageCollator)
        else None,
    )
    rate = answers.num_tokens / max(answers.seconds, 1e-9)
    logger.info("%s: %d answers, %d tokens, %.0f tokens/s", task.name, len(answers.texts), answers.num_tokens, rate)
    return answers
