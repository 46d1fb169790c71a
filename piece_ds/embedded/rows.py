"""Rows of {"prompt", "answer"}, drawn without repetition: what base skills and stream tasks have in common.

A row maker draws one question from a random generator. Drawing until enough different prompts exist, and only then
splitting, is what makes the splits disjoint by construction.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

Row = dict[str, str]
RowMaker = Callable[[Random], Row]

# A maker that gives this many repeated prompts in a row has run out of questions.
MAX_REPEATS = 1000


def draw_rows(make_row: RowMaker, num_rows: int, random: Random) -> list[Row]:
    """num_rows rows of make_row with pairwise different prompts, in the order drawn.

    Args:
        make_row: draws one row from the generator it is given.
        num_rows: rows wanted.
        random: source of randomness; advanced.
    Returns:
        A list of num_rows new dictionaries.
    Raises:
        ValueError: make_row cannot give that many different prompts.
    """
    rows: dict[str, Row] = {}
    num_repeats = 0
    while len(rows) < num_rows:
        row = make_row(random)
        num_repeats = num_repeats + 1 if row["prompt"] in rows else 0
        if num_repeats > MAX_REPEATS:
            raise ValueError(f"only {len(rows)} of {num_rows} different prompts exist; last one: {row['prompt']!r}")
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def write_json(rows: list[Row], path: Path) -> None:
    """Write rows to path as one JSON list; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write rows to path, one JSON object a line; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
