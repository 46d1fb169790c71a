"""Count the selected values that a task has changed: for the log, results.json and the report.

A value in 16 bits changes only if training moves it by half of its last place or more. At the rates of the literature
many never do, least of all weights near 1 (of norms). Who pays for K selected values should know how many of them take
part.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.mask_statistics import place_of
from piece_ds.deltas.delta import Delta, open_delta
from piece_ds.deltas.value_changes import change_sizes
from piece_ds.report.results import RunResults
from piece_ds.runtime.distributed import is_main

logger = logging.getLogger(__name__)

FEW_CHANGED = 0.5  # below this share a rate is proposed
AIM = 0.8  # share of the values that should change at that rate
# Half of the last place, relative to the largest value with the same exponent: 8 and 11 bits of significand.
HALF_PLACE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def with_changes(results: RunResults, task: str, delta_file: Path) -> RunResults:
    """Return results with task's changed values counted by kind of tensor, and log them. Only rank 0 reads the file.

    Args:
        results: of the run so far.
        task: the task's name.
        delta_file: its delta; without it, or without previous values in it, results are returned as they are.
    Cost: reads the delta once.
    """
    if not is_main() or not delta_file.is_file():
        return results
    delta = open_delta(delta_file)
    if not delta.reversible or not delta.num_selected:
        return results

    # Counted as the report counts them, by kind of module.
    moved = change_sizes((place_of(name).module, delta.change(name)) for name in delta.shapes)
    counts = {kind: {"values": of.num_values, "changed": of.num_changed} for kind, of in moved.items()}
    rate = results.settings.get("learning_rate")
    logger.warning("%s", changes_line(task, counts, _proposed_rate(delta, counts, rate)))
    return replace(results, changes={**results.changes, task: counts})


def changes_line(task: str, counts: dict[str, dict[str, int]], proposed_rate: float | None) -> str:
    """Return the log's line on a task: the share that changed, the kinds that changed least, and a rate if few did."""
    line = f"task {task}: {_share(counts.values()):.1%} of the selected values changed"

    # Three kinds are enough to see a pattern, such as norms that hardly move.
    least = sorted(counts, key=lambda kind: counts[kind]["changed"] / counts[kind]["values"])[:3]
    if len(counts) > 1:
        line += f" (least: {', '.join(f'{kind} {_share([counts[kind]]):.1%}' for kind in least)})"
    if proposed_rate is not None:
        line += (
            f"; values in 16 bits hardly change at this rate: --learning_rate {proposed_rate:.0e} would change about "
            f"{AIM:.0%} if all move equally far"
        )
    return line


def _share(counts: Iterable[dict[str, int]]) -> float:
    cells = list(counts)
    return sum(cell["changed"] for cell in cells) / max(sum(cell["values"] for cell in cells), 1)


def _proposed_rate(delta: Delta, counts: dict[str, dict[str, int]], rate: object) -> float | None:
    """Return the rate at which AIM of the values would change; None if enough have, or nothing can be said.

    Assume that all values move equally far. Then the share that has changed tells the distance: for that share of the
    values, half a last place is below it. The rate must grow by the ratio of two distances: the one below which AIM of
    the values lie, and this one.
    """
    # No proposal if enough changed, if nothing did, or if values are not 16-bit.
    share = _share(counts.values())
    dtypes = set(delta.dtypes.values())
    if share >= FEW_CHANGED or share == 0.0 or not isinstance(rate, int | float) or not dtypes <= set(HALF_PLACE):
        return None

    # From the share that changed to the share that should.
    places = torch.cat([_half_places(delta, name) for name in delta.shapes]).sort().values
    now, then = (float(places[int(part * (places.numel() - 1))]) for part in (share, AIM))
    return rate * then / now if now > 0 else None


def _half_places(delta: Delta, name: str) -> Tensor:
    previous = delta.change(name).previous
    assert previous is not None
    return previous.float().abs() * HALF_PLACE[delta.dtypes[name]]
