"""Say which parameters may train, and why the others may not."""

import logging
import re
from collections.abc import Iterable

import torch
from torch import nn

from piece_ds.models.eligible import eligible_rows, embedding_names, in_towers, ineligible, is_tied, towers
from piece_ds.models.experts import router_names
from piece_ds.models.layout import full_shape, layout_of

logger = logging.getLogger(__name__)


def report_eligible(model: nn.Module, added: list[str], excluded: list[str]) -> None:
    """Log what the user's patterns changed, what may train in the end, and what keeps the rest from it."""
    sizes = {name: torch.Size(full_shape(param)).numel() for name, param in model.named_parameters()}
    rows = eligible_rows(model)
    counts = {info.name: info.selectable.numel for info in layout_of(model).parameters}

    # What the user's own patterns changed.
    if added:
        logger.warning(
            "--eligible makes %d parameters in %d tensors eligible: %s",
            sum(counts[name] for name in added),
            len(added),
            ", ".join(folded([_with_rows(name, rows) for name in added])),
        )
    if is_tied(model) and embedding_names(model) & set(added):
        logger.warning(
            "--eligible: the input embeddings are the output head too: a weight that is selected there changes how its "
            "token is read and how likely it is written"
        )
    if excluded:
        logger.warning(
            "--exclude leaves out %d parameters in %d tensors: %s",
            sum(sizes[name] for name in excluded),
            len(excluded),
            ", ".join(folded(excluded)),
        )

    # What may train in the end, and what keeps the rest from it.
    left_out = ineligible(model)
    frozen = in_towers(model) & left_out
    embeddings = (embedding_names(model) & left_out) - frozen
    routers = (router_names(model) & left_out) - frozen - embeddings
    kinds = [(" and ".join(towers(model)), frozen)] if towers(model) else []
    kinds += [("the input embeddings", embeddings), *([("routers", routers)] if router_names(model) else [])]
    others = left_out - frozen - embeddings - routers
    logger.warning(
        "eligible: %d of %d parameters; not: %s, %d others",
        sum(count for name, count in counts.items() if name not in left_out),
        sum(sizes.values()),
        ", ".join(f"{sum(sizes[name] for name in names)} of {kind}" for kind, names in kinds),
        sum(sizes[name] for name in others),
    )


def _with_rows(name: str, rows: dict[str, tuple[int, int]]) -> str:
    return f"{name}[{rows[name][0]}:{rows[name][1]}]" if name in rows else name


def folded(names: Iterable[str]) -> list[str]:
    """Return names in their order; names that differ only in numbers become one: "blocks.*.norm1.weight (27)"."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return [group[0] if len(group) == 1 else f"{one} ({len(group)})" for one, group in alike.items()]
