"""Make the lines that a run prints as it proceeds, one a phase, for the logs of unattended jobs."""

import re
from collections.abc import Mapping

import torch

from piece_ds.runtime.distributed import all_reduce_sum_, collective_device
from piece_ds.state.mask import Mask

_NUM_SHOWN = 4


def selection_line(mask: Mask, seconds: float | None) -> str:
    """Return how many weights are selected, where, and how long that took. A collective of one count a parameter.

    Args:
        mask: the selection.
        seconds: of statistics and selection; None if the mask came from a file.
    """
    took = "from a file" if seconds is None else f"in {duration(seconds)}"
    share = 100 * mask.num_selected / max(1, mask.layout.total)
    return (
        f"{mask.num_selected:,} of {mask.layout.total:,} weights selected ({share:.3g} %, {mask.method}) {took}: "
        f"{_shown(counts_by_module(mask), mask.num_selected)}{proposal(mask)}"
    )


def proposal(mask: Mask) -> str:
    """Return '; proposed ratio: 2.7 %' if the scores of a mask propose one, else ''."""
    return "" if mask.proposed_ratio is None else f"; proposed ratio: {100 * mask.proposed_ratio:.2g} %"


def counts_by_module(mask: Mask) -> dict[str, int]:
    """Return selected elements over all ranks by parameter name, most first. Block numbers become '*'. A collective."""
    names = [info.name for info in mask.layout.parameters]
    own = torch.tensor([mask.index[name].numel() if name in mask.index else 0 for name in names], dtype=torch.int64)
    counts = all_reduce_sum_(own.to(collective_device())).tolist()

    # Blocks are added up: what matters is which kind of layer was selected.
    found: dict[str, int] = {}
    for name, count in zip(names, counts, strict=True):
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight")
        found[kind] = found.get(kind, 0) + count
    return dict(sorted(((kind, count) for kind, count in found.items() if count), key=lambda item: -item[1]))


def _shown(counts: Mapping[str, int], total: int) -> str:
    parts = [f"{kind} {100 * count / max(1, total):.0f} %" for kind, count in list(counts.items())[:_NUM_SHOWN]]
    rest = len(counts) - _NUM_SHOWN
    return ", ".join(parts) + (f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else "")


def scores_line(score: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None) -> str:
    """Return each task's score, or its loss if it has no score, and the loss on general text."""
    parts = []

    # A task evaluated by loss has no score.
    for task, value in score.items():
        if value is not None:
            parts.append(f"{task} {value:.3f}")
        elif loss.get(task) is not None:
            parts.append(f"{task} loss {loss[task]:.4f}")
    if general_loss is not None:
        parts.append(f"general text loss {general_loss:.4f}")
    return ", ".join(parts)


def time_left(seconds_of_done: list[float], num_left: int) -> str:
    """Return ', about 7 min left' from the mean of what is done, or '' if nothing is left."""
    if not num_left or not seconds_of_done:
        return ""
    return f", about {duration(num_left * sum(seconds_of_done) / len(seconds_of_done))} left"


def duration(seconds: float) -> str:
    """Return seconds in a suitable unit: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
