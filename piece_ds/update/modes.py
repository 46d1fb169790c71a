"""attach(): the second of the two calls that PIECE is."""

from typing import Any

from piece_ds.state.mask import Mask
from piece_ds.state.values import selected_values
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate


def attach(
    engine: Any, mask: Mask, save_full: bool = False, selected_gradient: str = "auto"
) -> MaskedUpdate | CompactUpdate:
    """From now on engine.step() trains only the selected weights; every other weight keeps its bits.

    Works at ZeRO 0-3 with and without CPU offload, in fp32, bf16 and (stage 1-3) fp16. Of an engine whose model
    prepare_compact() has prepared, DeepSpeed optimises the selected values alone (compact mode); of any other, the mask
    is applied to the reduced gradient (masked mode). Both act before DeepSpeed's overflow check, norm and clipping, so
    engine.get_global_grad_norm() is the norm of the selected gradient.
    A collective: every rank calls it, once per engine and before the first step.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        mask: from select() or load_mask(), of this model and this number of ranks.
        save_full: in compact mode, engine.save_checkpoint() writes the whole model, not only what training changes.
        selected_gradient: in compact mode, 'auto' or 'dense'; see GradientCollection.
    Raises:
        UserError: the engine uses a feature or an optimizer with which this has not been proven to be exact; in compact
            mode also a mask of another size, and an optimizer that holds other parameters.
    Cost per step: masked: one pass over the reduced gradient, and 8 bytes per selected element that this rank updates.
        compact: an fp32 all-reduce of K numbers, an all-gather of K values under ZeRO-3, and about 16 bytes per
        selected element on every rank, whatever the model's size.
    """
    if selected_values(engine.module) is not None:
        return CompactUpdate(engine, mask, save_full, selected_gradient)
    return MaskedUpdate(engine, mask)
