"""What a model wrote, kept as JSON lines of prompt, answer and output, so that scores can be computed again.

python -m piece_ds.evaluation.predictions FILE [FILE ...] [--scorer NAME] [--scoring authors]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piece_ds.config.output_arguments import SCORINGS
from piece_ds.data.readers import read_rows
from piece_ds.evaluation.scorers import Golds, choose_scorers, get_scorer, scorer_names
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text

KEYS = ("prompt", "answer", "output")


def write_predictions(path: Path, prompts: Sequence[str], answers: Golds, outputs: Sequence[str]) -> None:
    """Write one JSON object per row; call it on one rank. A single gold answer is text, several are a list."""
    golds = [answer[0] if isinstance(answer, list) and len(answer) == 1 else answer for answer in answers]
    rows = zip(prompts, golds, outputs, strict=True)
    lines = [json.dumps(dict(zip(KEYS, row, strict=True)), ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def read_predictions(path: Path | str) -> tuple[list[str], list[str | list[str]], list[str]]:
    """Return (prompts, answers, outputs) of a file that write_predictions() wrote. Several gold answers are a list.

    Raises:
        UserError: no such file, or a file of another form.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a run writes predictions/MOMENT/TASK.jsonl")
    rows = list(read_rows(Path(path)))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(_is_text(row.get(key), key == "answer") for key in KEYS):
            raise UserError(f"{path} row {number}: expected texts {', '.join(KEYS)}, got {str(row)[:60]}")
    prompts, answers, outputs = ([row[key] for row in rows] for key in KEYS)
    return prompts, answers, outputs


def _is_text(value: Any, may_be_list: bool) -> bool:
    many = may_be_list and isinstance(value, list) and bool(value)
    return all(isinstance(text, str) for text in (value if many else [value]))


def rescore(path: Path | str, scorer: str | None = None, scoring: str = SCORINGS[0]) -> dict[str, float]:
    """Return the measures of the predictions in path, the score first.

    Args:
        path: file that write_predictions() wrote.
        scorer: its name; None takes the scorer of the task that the file is named after.
        scoring: one of SCORINGS.
    Raises:
        UserError: the file cannot be used, or the scorer is unknown or scores no texts.
    """
    prompts, answers, outputs = read_predictions(path)
    task = Path(path).stem
    # The file is named after its task, which decides the scorer unless one is given.
    name = scorer or choose_scorers([(task, answers)])[task]
    if not get_scorer(name).generates:
        raise UserError(f"--scorer {name} scores no texts; one of the others does")
    return get_scorer(name).score(outputs, answers, prompts, scoring)


def main() -> int:
    """Print one line per file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m piece_ds.evaluation.predictions", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--scorer", choices=scorer_names(), help="instead of that of the task the file is named after")
    parser.add_argument("--scoring", choices=SCORINGS, default=SCORINGS[0])
    arguments = parser.parse_args()
    try:
        for path in arguments.files:
            found = rescore(path, arguments.scorer, arguments.scoring)
            print(f"{path}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
