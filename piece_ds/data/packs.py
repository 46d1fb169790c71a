"""Packs of training rows: as many rows end to end as fit a number of tokens, for micro-batches without padding.

The assignment is best-fit decreasing, from the longest row to the shortest: each goes into the fullest pack that still
has room (Johnson 1974; Ding et al. 2024, arXiv 2404.10830, for language models). No row is cut, dropped or repeated.

The number of packs is a multiple of the packs in an optimizer step, so that every rank has the same number of
micro-batches, every step the same number of them, and an epoch holds each row exactly once. For that, packs of many
rows are divided. The assignment depends only on the rows' lengths and that multiple: every rank, and a resumed run,
finds the same packs, of which the Trainer draws an order for each epoch as it does of rows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from piece_ds.data.lengths import lengths_of
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError

Pack = list[int]


class Packs(Dataset[dict[str, list[int]]]):
    """Rows in packs, as a data set of which an item is a pack. Rows are read when their pack is asked for."""

    def __init__(self, rows: Any, packs: Sequence[Pack]) -> None:
        """Keep what to read.

        Args:
            rows: a data set of encoded rows.
            packs: numbers of the rows of each.
        """
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return input_ids, labels and position_ids of a pack's rows, end to end.

        Positions begin again at every row; a row's first label is never counted, since no token of the row comes before
        it.
        """
        rows = [self.rows[number] for number in self.packs[index]]
        return {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": [label for row in rows for label in (IGNORED_LABEL, *row["labels"][1:])],
            "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
        }

    @property
    def rows_per_pack(self) -> float:
        """The mean number of rows in a pack."""
        return len(self.rows) / len(self.packs)

    def summary(self, num_tokens: int) -> str:
        """Return in a few words how full packs of at most num_tokens tokens are."""
        lengths = lengths_of(self.rows)
        too_long = int((lengths > num_tokens).sum())
        alone = f"; {too_long} longer rows stand alone" if too_long else ""
        full = lengths.sum() / (len(self) * num_tokens)
        return f"{len(self.rows)} rows in {len(self)} packs of at most {num_tokens} tokens, {full:.0%} full{alone}"


@dataclass(frozen=True)
class PackCollator:
    """Lays the packs of a micro-batch end to end; a callable for DataLoader and Trainer."""

    def __call__(self, packs: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return input_ids, labels and position_ids, int64, (1, tokens of all packs), on the CPU, and use_cache=False.

        With a cache transformers would not look for rows.
        """
        joined: dict[str, Tensor] = {
            name: torch.tensor([[value for pack in packs for value in pack[name]]], dtype=torch.int64)
            for name in ("input_ids", "labels", "position_ids")
        }
        return {**joined, "use_cache": False}


def pack_rows(name: str, rows: Any, num_tokens: int, multiple: int) -> Packs:
    """Return the rows of a task in packs.

    Args:
        name: of the task, for the message.
        rows: a datasets.Dataset of encoded rows.
        num_tokens: most tokens of a pack. A longer row is a pack of its own.
        multiple: packs in an optimizer step, over all ranks.
    Raises:
        UserError: the rows cannot make a multiple of that many packs.
    """
    packs = best_fit(lengths_of(rows).tolist(), num_tokens)
    if (target := -(-len(packs) // multiple) * multiple) > len(rows):
        raise UserError(
            f"--pack_tokens {num_tokens}: the {len(rows)} rows of task {name} make {len(packs)} packs, and a step "
            f"takes {multiple} (ranks x --per_device_train_batch_size x --gradient_accumulation_steps): they cannot be "
            f"divided into {target}; raise --pack_tokens, take smaller steps or drop it"
        )
    packs = divided(packs, target)

    # In the order of the file, for a sampler that does not shuffle.
    return Packs(rows, sorted(sorted(pack) for pack in packs))


def packs_per_step(arguments: TrainingArguments) -> int:
    """Return how many packs an optimizer step takes, over all ranks."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world_size()


def best_fit(lengths: Sequence[int], num_tokens: int) -> list[Pack]:
    """Return numbers of rows in packs of at most num_tokens tokens, by best-fit decreasing.

    Args:
        lengths: tokens of each row.
        num_tokens: most tokens of a pack. A longer row is a pack of its own.
    """
    packs: list[Pack] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> packs that have so many left
    rooms: list[int] = []  # its keys, ascending
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        at = bisect_left(rooms, length)

        # The fullest pack that has room, or a new one.
        if at < len(rooms):
            left = rooms[at]
            index = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
            packs[index].append(number)
        else:
            left, index = num_tokens, len(packs)
            packs.append([number])

        # What is left of it.
        if left > length:
            if left - length not in with_room:
                with_room[left - length] = []
                insort(rooms, left - length)
            with_room[left - length].append(index)
    return packs


def divided(packs: Sequence[Pack], target: int) -> list[Pack]:
    """Return target packs: those of most rows are divided in two until there are so many.

    Args:
        packs: at most target, of at least target rows together.
        target: number of packs.
    """
    heap = [(-len(pack), index, list(pack)) for index, pack in enumerate(packs)]
    heapify(heap)
    for index in range(len(packs), target):
        _, first, most = heappop(heap)
        for number, part in ((first, most[::2]), (index, most[1::2])):
            heappush(heap, (-len(part), number, part))
    return [pack for _, _, pack in sorted(heap, key=lambda entry: entry[1])]
