"""Prepare a model for compact mode, and attach a mask to an engine in either mode."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from piece_ds.config.piece import split_patterns
from piece_ds.models.adapters import refuse_adapters
from piece_ds.models.eligible import input_embedding, let_gradients_in, without
from piece_ds.models.experts import gather_experts_whole
from piece_ds.models.layout import layout_of
from piece_ds.models.whole_layers import gather_layers_whole
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import num_selected as num_selected_of
from piece_ds.selection.budget import require_eligible
from piece_ds.state.mask import Mask
from piece_ds.state.selected_values import SelectedValues, selected_values
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate
from piece_ds.update.step_scale import StepScale
from piece_ds.zero.supported import require_engine

_ATTACHED = "_piece_ds_update"  # on an engine: the update that was attached to it last


def attach(
    engine: Any,
    mask: Mask,
    save_full: bool = False,
    selected_gradient: str = "auto",
    step_scale: StepScale | None = None,
) -> MaskedUpdate | CompactUpdate:
    """Make engine.step() train only the selected weights; every other weight keeps its bits. A collective.

    It works at ZeRO 0-3 with and without CPU offload, in fp32, bf16 and (stages 1-3) fp16. If prepare_compact() has
    prepared the model, DeepSpeed optimises only the selected values (compact mode). Otherwise the mask is applied to
    the reduced gradient (masked mode). Both act before DeepSpeed's overflow check, norm and clipping. So
    engine.get_global_grad_norm() is the norm of the selected gradient. Every rank calls it, once per engine and before
    the first step.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        mask: from select() or load_mask(), of this model and this number of ranks.
        save_full: in compact mode, engine.save_checkpoint() writes the whole model, not only what training changes.
        selected_gradient: in compact mode, 'auto' or 'dense'; see GradientCollection.
        step_scale: a factor on the optimizer's update of each selected weight (general_step_scale()). It is not part of
            a checkpoint: give the same one to a resumed run.
    Returns:
        The update in force. Its detach() removes it.
    Raises:
        UserError: the engine uses a feature or an optimizer with which this has not been proven to be exact, has a mask
            already, or has trained other weights, whose moments would move them on; its model has an adapter of PEFT.
            In compact mode also: a mask of another size, an optimizer that holds other parameters.
        UserError from engine.load_checkpoint() in masked mode: a checkpoint that was written without this mask.
    Cost per step: masked: one pass over the reduced gradient, and 8 bytes per selected element that this rank updates.
    compact: an fp32 all-reduce of K numbers, an all-gather of K values under ZeRO-3, and about 16 bytes per selected
    element on every rank, whatever the model's size.
    """
    require_engine(engine)
    refuse_adapters(engine.module, "attach()")
    before: MaskedUpdate | CompactUpdate | None = vars(engine).get(_ATTACHED)
    if before is not None and before._remove:  # not detached
        raise UserError(
            "a mask is attached to this engine already, and only what both select would train: detach() that one, and "
            "make a new engine of the model for every mask"
        )
    if isinstance(before, CompactUpdate):
        raise UserError(
            "the engine has left compact mode by detach() and cannot train any more: call prepare_compact() and "
            "deepspeed.initialize() again"
        )
    update: MaskedUpdate | CompactUpdate
    if selected_values(engine.module) is not None:
        update = CompactUpdate(engine, mask, save_full, selected_gradient, step_scale)
    else:
        update = MaskedUpdate(engine, mask, step_scale)
    setattr(engine, _ATTACHED, update)
    return update


def prepare_compact(
    model: nn.Module,
    ratio: float | None = None,
    num_selected: int | None = None,
    decays: Iterable[str] | None = None,
    exclude: str | Sequence[str] = (),
    *,
    unit: str = "element",
) -> SelectedValues:
    """Give model the one flat parameter that DeepSpeed shall optimise, and freeze all others.

    How many weights will be selected is known before which ones. So one engine, made after this call, serves the
    statistics pass and training. It never holds a master, a moment or a gradient partition of the model's own
    parameters.

    Args:
        model: as it will go into deepspeed.initialize(), together with the result's parameters() and no others.
        ratio: share of the eligible elements to select, as in estimate_mask(). Give it or num_selected.
        num_selected: elements in the mask that will be attached.
        decays: names of the parameters whose selected elements weight decay acts on; None means all.
        exclude: fnmatch patterns of parameters that are never selected; a text with commas is split. estimate_mask()
            then reads them from the model.
        unit: as in estimate_mask(). With rows or columns the mask may have fewer elements than there is room for. What
            is left over stays 0 and is never written into a weight.
    Returns:
        SelectedValues, already part of model, in the dtype of its parameters; zeros until attach().
    Raises:
        UserError: the model is prepared already, has an adapter of PEFT, or nothing in it is eligible.
        ValueError: both or neither of ratio and num_selected are given, or num_selected is less than 1.
    """
    # Check the arguments.
    if selected_values(model) is not None:
        raise UserError("the model is prepared for compact mode already: detach() the update first")
    if (ratio is None) == (num_selected is None):
        raise ValueError("give either ratio or num_selected")
    if num_selected is not None and num_selected < 1:
        raise ValueError(f"num_selected must be at least 1, got {num_selected}")

    refuse_adapters(model, "prepare_compact()")

    # How many values there will be.
    layout = without(layout_of(model), split_patterns(exclude))
    require_eligible(layout)
    if num_selected is None:
        num_selected = num_selected_of(layout, float(ratio or 0.0))

    # ZeRO-3 has to know before it makes its hooks.
    gather_experts_whole(model)

    # The values, in the dtype of the weights that they are copied to.
    params = dict(model.named_parameters())
    first = next(iter(params.values()))
    values = SelectedValues(
        num_selected,
        first.dtype,
        first.device if first.device.type != "meta" else torch.device("cpu"),
        trainable=frozenset(name for name, param in params.items() if param.requires_grad),
        eligible=frozenset(info.name for info in layout.eligible()),
        decays=None if decays is None else frozenset(decays),
        may_have_fewer=unit != "element",
    )

    # Reentrant checkpointing passes gradients only through inputs, and the frozen embedding gives none.
    embedding = input_embedding(model)
    if embedding is not None and embedding.requires_grad:
        let_gradients_in(model)
    values.join(model)
    # Last: nothing may fail between the marks and the one that takes them off.
    values.after_engine = gather_layers_whole(model)
    return values
