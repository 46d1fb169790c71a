"""Positions that count tokens and not padding, for models with learned positions.

Batches are padded on the left. Rotary positions are relative, so padding does not matter to them, and models such as
OPT count from the attention mask themselves; but GPT-2 and its kin number the columns of a batch, so that without this
the same row would have another loss in another batch.
"""

import inspect
from typing import Any

import torch
from torch import nn

from piece_ds.models.eligible import input_embedding


def count_positions_from_mask_(model: nn.Module) -> None:
    """Give model, where it needs them, position_ids that start with a row's first token.

    A caller's own position_ids win, and generation, which passes them itself, is not touched.
    """
    if has_learned_positions(model):
        model.register_forward_pre_hook(_with_positions, with_kwargs=True)


def has_learned_positions(model: nn.Module) -> bool:
    """Whether model looks positions up in a table of its longest length, at the position_ids it is called with."""
    length = getattr(model.config, "max_position_embeddings", None)
    tokens = input_embedding(model)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not tokens]
    accepts = "position_ids" in inspect.signature(model.forward).parameters
    return accepts and any(table.num_embeddings == length for table in tables)


def _with_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    given = args or any(kwargs.get(name) is not None for name in ("position_ids", "past_key_values"))
    if given or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    return args, {**kwargs, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
