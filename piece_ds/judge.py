"""What a model can do now: loss of every task, accuracy where answers can be right, loss on general text."""

import time
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from piece_ds.evaluation import TEXT, accuracy, answer_kind, evaluate_loss, generate_texts
from piece_ds.stream import Task, make_collator


@dataclass(frozen=True)
class Scores:
    """One row of the result matrix.

    Attributes:
        loss: task -> nats per answer token.
        accuracy: task -> share of right answers; None where answers are free text.
        general_loss: nats per token of general text, or None without such text.
        seconds: wall time.
    """

    loss: dict[str, float | None]
    accuracy: dict[str, float | None]
    general_loss: float | None
    seconds: float


def judge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    general: datasets.Dataset | None,
    batch_size: int,
    max_new_tokens: int,
    device: Any,
) -> Scores:
    """Evaluate tasks and general text. A collective: under ZeRO-3 every forward pass gathers parameters.

    Args:
        model: a transformers model or the DeepSpeed engine around one.
        batch_size: rows in a forward pass on each rank.
        max_new_tokens: of a generated answer.
    """
    begin = time.perf_counter()
    collate = make_collator(tokenizer)
    losses: dict[str, float | None] = {}
    accuracies: dict[str, float | None] = {}
    for task in tasks:
        losses[task.name] = evaluate_loss(model, task.test, collate, batch_size, device).mean
        kind = answer_kind(task.answers)
        accuracies[task.name] = None
        if kind != TEXT:
            texts = generate_texts(model, task.prompts(), tokenizer, max_new_tokens, batch_size, device)
            accuracies[task.name] = accuracy(texts, task.answers, kind)
    general_loss = None
    if general is not None:
        general_loss = evaluate_loss(model, general, collate, batch_size, device).mean
    return Scores(losses, accuracies, general_loss, time.perf_counter() - begin)
