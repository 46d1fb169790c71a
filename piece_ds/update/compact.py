"""Compact update mode: DeepSpeed optimises one flat parameter of the K selected values, and nothing else.

The model's own parameters have no fp32 master, no moments and no gradient partition. Their selected gradients are added
in fp32 during backward, and reduced once per optimizer step. DeepSpeed then unscales, clips, checks for overflow and
steps as usual. The new values are written into the weights, wherever they lie. Values are copies, not differences:
forward uses the plain weights, and everything means what it means in masked mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from piece_ds.models.layout import full_shape
from piece_ds.runtime.distributed import all_reduce_sum_
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask, gather_fragments
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values
from piece_ds.update.decay import SelectedDecay
from piece_ds.update.gradients import GradientCollection
from piece_ds.update.step_scale import StepScale
from piece_ds.zero.checkpoints import install_checkpoints
from piece_ds.zero.discarded import on_discard
from piece_ds.zero.engine_end import EngineEnd
from piece_ds.zero.scaled_update import ScaledUpdate, scale_selected
from piece_ds.zero.selected_state import SelectedState, read_selected_state, write_selected_state_
from piece_ds.zero.sequence_parallel import gradient_divisor
from piece_ds.zero.step_watch import Place, StepWatch
from piece_ds.zero.supported import adapter_for, require_trainable
from piece_ds.zero.weights import (
    SelectedWeightList,
    SelectedWeights,
    forget_secondary,
    read_selected,
    read_whole,
    weights_fingerprint,
)


class CompactUpdate:
    """A mask installed on one engine of a model that prepare_compact() has prepared. `detach()` undoes both.

    Attributes:
        mask: in force.
        watch: of the engine's steps; one with a NaN or infinite gradient is skipped.
    """

    def __init__(
        self,
        engine: Any,
        mask: Mask,
        save_full: bool,
        selected_gradient: str,
        step_scale: StepScale | None = None,
    ) -> None:
        # Check that mask, model and optimizer belong together.
        values = selected_values(engine.module)
        assert values is not None
        require_trainable(engine)
        self.mask, self._engine, self._values, self._save_full = mask, engine, values, save_full
        whole = mask.whole()
        self._index = {info.name: whole[info.name] for info in mask.layout.parameters if info.name in whole}
        self._adapter = adapter_for(engine)
        self._check()

        # The weights that the values are copied to, and room for their gradients.
        params = dict(engine.module.named_parameters())
        self._weights = {name: SelectedWeights(params[name], self._index[name]) for name in self._index}
        self._written = SelectedWeightList(self._weights.values())
        self._room = full_shape(values.values)[0]  # more than mask.num_selected if rows or columns competed
        self._grad = torch.zeros(self._room, dtype=torch.float32, device=engine.device)
        self._largest = torch.zeros((), device=engine.device)  # of this rank's last gradient, in absolute value
        self._fingerprint: Tensor | None = None

        # Either the weights give the values, or a checkpoint that was loaded before gives both.
        if values.checkpoint is None:
            self._fill()
        else:
            self._after_load()

        # Hooks around the step. The first one runs last before a step, so the watch sees the gradient as it is applied.
        decay = SelectedDecay(self._adapter, {PARAMETER_NAME: self._decaying()})
        self.watch = StepWatch(self._adapter, self._locate)
        self._remove = [
            *self.watch.install(),
            self._adapter.bypass_reduction(),
            self._adapter.around_step(self._before_step, self._after_step),
            on_discard(engine, self._grad.zero_),
            *decay.install(engine.basic_optimizer),
            *install_checkpoints(engine, self._saving, self._loading, self._after_load, save_full, PARAMETER_NAME),
        ]
        if step_scale is not None:
            self._remove += self._scale(step_scale).install(engine.basic_optimizer)

        self._end = EngineEnd(engine)

        # From here on backward adds to the values' gradient.
        values.attached = True
        grads = self._parts(self._grad)
        self._collection = GradientCollection(engine.module, self._weights, grads, selected_gradient)

    def detach(self) -> None:
        """Restore engine and model as they were before prepare_compact(). The engine cannot train any more."""
        self._collection.close()
        for remove in self._remove:
            remove()
        self._remove = []
        self._values.leave(self._engine.module)
        if self._values.after_engine is not None:
            self._end.call(self._values.after_engine)
            self._values.after_engine = None

    def is_local_finite(self) -> bool | None:
        """Return whether this rank's part of the last step's gradient was finite."""
        return bool(self._largest.isfinite())

    def state(self) -> SelectedState:
        """Return the optimizer's state of the selected weights. A collective."""
        return read_selected_state(self._adapter, {PARAMETER_NAME: torch.arange(self.mask.num_selected)})

    def restore(self, state: SelectedState) -> None:
        """Resume from a state() of any number of ranks and any stage. The model must hold the task's first weights."""
        everything = torch.arange(self.mask.num_selected)
        write_selected_state_(self._adapter, {PARAMETER_NAME: everything}, state)

        # The flat parameter, then the weights that copy it.
        values = self._values.values
        SelectedWeights(values, everything).write_(state.tensors["values"].to(values.dtype))
        self._write()

    def _check(self) -> None:
        values, mask = self._values, self.mask

        # The mask must fit the room that was prepared for it.
        (room,) = full_shape(values.values)
        if room < mask.num_selected or (room > mask.num_selected and not values.may_have_fewer):
            raise UserError(
                f"the mask selects {mask.num_selected} elements, the model was prepared for another number:"
                " give prepare_compact() the mask's ratio or number, and its unit"
            )

        # The optimizer must hold the values and nothing else.
        optimised = {piece.name for _, pieces in self._adapter.masters() for piece in pieces}
        if not optimised <= {PARAMETER_NAME}:
            raise UserError(
                f"compact mode expects an optimizer over the selected values alone, this one also has "
                f"{min(optimised - {PARAMETER_NAME})!r}: make it from prepare_compact(model).parameters(), "
                "or use masked mode (--update_mode masked)"
            )

        # Every selected weight must be trainable, and of the values' dtype.
        dtypes = {name: param.dtype for name, param in self._engine.module.named_parameters()}
        for name in self._index:
            if name not in values.trainable:
                raise UserError(f"the mask selects elements of {name!r}, which is frozen: use a mask without it")
            if dtypes[name] != dtypes[PARAMETER_NAME]:
                raise UserError(
                    f"compact mode keeps the selected values in one dtype, {dtypes[PARAMETER_NAME]}, but "
                    f"{name!r} is {dtypes[name]}: use masked mode (--update_mode masked)"
                )

    def _parts(self, flat_K: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, its part of a tensor of one entry per value). Entries left over belong to none."""
        sizes = [index.numel() for index in self._index.values()]
        yield from zip(self._index, flat_K[: self.mask.num_selected].split(sizes), strict=True)

    def _decaying(self) -> Tensor:
        """Return the positions among the values that weight decay acts on."""
        decays = self._values.decays
        everywhere = torch.zeros(self._room, dtype=torch.bool)
        for name, part in self._parts(everywhere):
            part.fill_(decays is None or name in decays)
        return everywhere.nonzero().view(-1)

    def _scale(self, step_scale: StepScale) -> ScaledUpdate:
        factors = step_scale.selected(self.mask)
        flat_K = torch.cat([factors[name] for name in self._index])
        everywhere = {PARAMETER_NAME: torch.arange(self.mask.num_selected)}
        return scale_selected(self._adapter, everywhere, {PARAMETER_NAME: flat_K})

    def _locate(self, place: Place) -> Place:
        """Return the place in the model for a place among the values."""
        name, offset = place[0], place[1]

        # Values lie in the order of the parameters: walk until the offset falls into one.
        for weight, index in self._index.items():
            if name == PARAMETER_NAME and offset < index.numel():
                return weight, int(index[offset])
            offset -= index.numel()
        return place

    def _fill(self) -> None:
        """Set values and their masters to the selected weights. A collective."""
        if self._engine.global_steps == 0:
            self._adapter.prepare()

        # Each rank reads the selected weights it owns; together they are all values.
        dtype_of = {name: param.dtype for name, param in self._engine.module.named_parameters()}
        fragments = gather_fragments(self.mask.layout, read_selected(self._engine.module, self.mask), dtype_of)

        # Values beyond the mask's number stay 0: nothing is ever written from them.
        parts = [fragments[name] for name in self._index]
        whole = torch.cat([*parts, parts[0].new_zeros(self._room - self.mask.num_selected)])

        # Into the parameter, and into its masters, which DeepSpeed made of zeros.
        SelectedWeights(self._values.values, torch.arange(whole.numel())).write_(whole)
        for master, pieces in self._adapter.masters():
            for piece in pieces:
                part = whole[piece.start : piece.start + piece.numel]
                master.data.view(-1)[piece.offset : piece.offset + piece.numel].copy_(part)

    def _before_step(self) -> None:
        if self._engine.global_steps == 0:
            self._collection.check()

        # Kept on the device: is_local_finite() reads it only if the step was skipped.
        self._largest = torch.linalg.vector_norm(self._grad, float("inf"))
        self._adapter.set_gradient(all_reduce_sum_(self._grad).div_(gradient_divisor(self._engine)))

    def _after_step(self) -> None:
        """Clear the gradient and write the values. After an overflow too: then the values are the old ones."""
        self._grad.zero_()
        self._write()

    def _write(self) -> None:
        """Write the values into the weights."""
        values = read_whole(self._values.values, self._engine.device)
        self._written.write_(values[: self.mask.num_selected])

    # Checkpoints.

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Add to a checkpoint where the values belong and, if it is not whole, the fingerprint of all other weights."""
        content = {"positions": self._positions(), "whole": torch.tensor(self._save_full)}
        if not self._save_full:
            content["surroundings"] = self._surroundings()
        with self._loading(), self._values.in_checkpoint(content):
            yield

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Freeze the weights inside, as DeepSpeed takes them to be. Otherwise a checkpoint would lose them."""
        weights = [weight.param for weight in self._weights.values()]
        needed = [param.requires_grad for param in weights]
        for param in weights:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param, requires_grad in zip(weights, needed, strict=True):
                param.requires_grad_(requires_grad)

    def _after_load(self) -> None:
        """Write the values into the weights, after DeepSpeed has restored values, masters and moments.

        Raises:
            UserError: the checkpoint is of another mask, or began with other weights.
        """
        # Refuse a checkpoint that does not belong to this mask and model.
        found, self._values.checkpoint = self._values.checkpoint, None
        if found is None:
            raise UserError(
                "the checkpoint was not written in compact mode: resume it in masked mode (--update_mode masked)"
            )
        if not torch.equal(found["positions"].cpu(), self._positions()):
            raise UserError("the checkpoint is of another mask: its selected positions differ from this one's")
        if not found["whole"] and not torch.equal(found["surroundings"].cpu(), self._surroundings()):
            raise UserError(
                "the checkpoint holds the selected weights alone, and this model's other weights are not "
                "those that the training began with: load the model that it began with, or save with "
                "--save_full True"
            )

        # A whole checkpoint has overwritten all weights, so their secondary shards are stale.
        if found["whole"]:
            forget_secondary(self._engine.module)
        self._grad.zero_()
        self._write()

    def _positions(self) -> Tensor:
        """Return where every value belongs (int64).

        A position counts the elements of all earlier parameters, too.
        """
        offset, parts = 0, []
        for info in self.mask.layout.parameters:
            if info.name in self._index:
                parts.append(self._index[info.name] + offset)
            offset += info.numel
        return torch.cat(parts)

    def _surroundings(self) -> Tensor:
        """Return the fingerprint of every weight that is not selected, computed once. A collective."""
        if self._fingerprint is None:
            self._fingerprint = weights_fingerprint(self._engine.module, self.mask)
        return self._fingerprint
