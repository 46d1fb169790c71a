"""One progress bar for the project: on rank 0 and a terminal only, with rate and remaining time."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from piece_ds.runtime.distributed import is_main


def progress_bar(items: Iterable, description: str, unit: str = "it", total: int | None = None) -> Iterable:
    """items, with a bar on stderr; silent on other ranks and where stderr is not a terminal."""
    silent = not is_main() or not sys.stderr.isatty()
    return tqdm(items, desc=description, unit=unit, total=total, disable=silent, dynamic_ncols=True)
