"""prepare_compact(): what must happen to a model before its engine is made, if it is to train in compact mode."""

from collections.abc import Iterable

import torch
from torch import nn

from piece_ds.errors import UserError
from piece_ds.selection.budget import num_selected as num_selected_of
from piece_ds.state.eligible import input_embedding, let_gradients_in
from piece_ds.state.partition import layout_of
from piece_ds.state.values import SelectedValues, selected_values


def prepare_compact(
    model: nn.Module,
    ratio: float | None = None,
    num_selected: int | None = None,
    decays: Iterable[str] | None = None,
) -> SelectedValues:
    """Give model the one flat parameter that DeepSpeed shall optimise, and freeze all others.

    How many weights will be selected is known before which ones: the engine made next serves the statistics pass and
    training, and never holds a master, a moment or a gradient partition of the model's own parameters.

    Args:
        model: as it will go into deepspeed.initialize(), together with the result's parameters() and no others.
        ratio: as in estimate_mask(); or
        num_selected: elements in the mask that will be attached.
        decays: names of the parameters whose selected elements weight decay acts on; None means all.
    Returns:
        SelectedValues, already part of model, in the dtype of its parameters; zeros until attach().
    Raises:
        UserError: the model is prepared already.
    """
    if selected_values(model) is not None:
        raise UserError("the model is prepared for compact mode already: detach() the update first")
    if (ratio is None) == (num_selected is None):
        raise ValueError("give either ratio or num_selected")
    layout = layout_of(model)
    if num_selected is None:
        num_selected = num_selected_of(layout, float(ratio or 0.0))
    params = dict(model.named_parameters())
    first = next(iter(params.values()))
    values = SelectedValues(
        num_selected,
        first.dtype,
        first.device if first.device.type != "meta" else torch.device("cpu"),
        trainable=frozenset(name for name, param in params.items() if param.requires_grad),
        eligible=frozenset(info.name for info in layout.eligible()),
        decays=None if decays is None else frozenset(decays),
    )
    embedding = input_embedding(model)
    if embedding is not None and embedding.requires_grad:
        let_gradients_in(model)
    values.join(model)
    return values
