"""Refuse rows that a model cannot take, before its weights are read.

These are token ids without a row in the embedding, and rows longer than the model's positions.
"""

import logging
from typing import Any

import datasets

from piece_ds.data.lengths import largest_of, lengths_of
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.data.tasks import Task
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)


def check_rows_fit(
    config: Any, tasks: list[Task], others: dict[str, datasets.Dataset | None], pad_id: int | None
) -> None:
    """Raise UserError if a token id, a label or a row's length exceeds what the model has.

    Args:
        config: the model's.
        tasks: of the stream.
        others: flag -> encoded text that is evaluated, or that importance is taken of; None if it is not given.
        pad_id: token id that pads batches.
    Cost: a pass over the tokens.
    """
    # What the model has, and the rows by the name of their place.
    text = config.get_text_config()
    size, positions = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    named = {
        f"task {task.name}, {split}": getattr(task, split) for task in tasks for split in ("train", "eval", "test")
    }
    named |= {flag: rows for flag, rows in others.items() if rows is not None}
    if size and pad_id is not None and pad_id >= size:
        raise UserError(
            f"the tokenizer pads with id {pad_id}, but the model's embedding has {size} rows: resize the model's "
            "embedding (resize_token_embeddings) and save it, or name another pad_token"
        )
    for name, rows in named.items():
        if size:
            _check_ids(rows, name, size)
        if positions:
            _check_lengths(rows, name, positions, bool(getattr(text, "rope_parameters", None)))


def _check_ids(rows: datasets.Dataset, name: str, size: int) -> None:
    for column in ("input_ids", "labels"):
        largest = largest_of(rows, column)
        if largest is not None and largest >= size:
            # Only now is it worth reading rows one by one.
            number = next(i for i, ids in enumerate(rows[column], start=1) if max(ids, default=IGNORED_LABEL) >= size)
            raise UserError(
                f"{name} row {number}: {column} holds {max(rows[column][number - 1])}, but the model's embedding has "
                f"{size} rows (ids 0 to {size - 1}): use the model's own tokenizer, or resize its embedding"
            )


def _check_lengths(rows: datasets.Dataset, name: str, positions: int, rotary: bool) -> None:
    lengths = lengths_of(rows)
    longest = int(lengths.max(initial=0))
    if longest <= positions:
        return
    number = int(lengths.argmax()) + 1
    said = f"{name} row {number} has {longest} tokens, the model {positions} positions (max_position_embeddings)"
    if not rotary:  # there is no row in the table of positions
        raise UserError(f"{said}: lower --max_prompt_len and --max_ans_len, or shorten the row")
    logger.warning("%s: it was not made for rows of that length; --max_prompt_len and --max_ans_len cut them", said)


def check_prompts_fit(config: Any, tasks: list[Task], scorers: dict[str, str], new_tokens: tuple[int, int]) -> None:
    """Raise UserError if a prompt leaves no position for the answer that is generated.

    Args:
        config: the model's.
        tasks: of the stream.
        scorers: task -> name of its scorer.
        new_tokens: most tokens of a short answer, and of free text.
    """
    # Rotary positions have no table that could end.
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or getattr(text, "rope_parameters", None):
        return
    for task in tasks:
        scorer = get_scorer(scorers[task.name])
        if not scorer.generates:
            continue

        # The prompt and what is generated share the positions.
        longest = max(map(len, task.prompts()), default=0)
        num_new = new_tokens[0] if scorer.is_short else new_tokens[1]
        if longest + num_new > positions:
            raise UserError(
                f"task {task.name}: a prompt of {longest} tokens and {num_new} generated ones need more than the "
                f"model's {positions} positions: lower --max_prompt_len or "
                f"{'--max_new_tokens' if scorer.is_short else '--max_new_tokens_text'}, or judge it by loss "
                f"(--scorers {task.name}=loss)"
            )
