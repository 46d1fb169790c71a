"""Handle the mask of one task in its trainer: select or read it, attach it, and save what it changed."""

import logging
import time
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from piece_ds.checkpoint.delta_file import chain_metadata, checksum_of, load_previous, save_delta
from piece_ds.checkpoint.mask_base import say_other_base
from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.checkpoint.statistics_file import PartialStatistics
from piece_ds.config.output_arguments import OutputArguments
from piece_ds.deltas.chain_files import CHAIN_NAME
from piece_ds.deltas.delta import DELTA_NAME
from piece_ds.methods.baseline import TaskContext
from piece_ds.models.eligible import without
from piece_ds.models.layout import layout_of
from piece_ds.runtime.distributed import barrier, broadcast_object
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.training.callback import MASK_NAME
from piece_ds.training.chain_writer import ChainCallback, ChainWriter
from piece_ds.training.compact_trainer import engine_of, prepare_trainer
from piece_ds.training.forgetting import ForgettingBudget, masked_change
from piece_ds.training.mask_source import MaskSource
from piece_ds.training.progress import selection_line
from piece_ds.training.run_folder import PARTIAL_NAME, PREVIOUS_NAME
from piece_ds.training.trainer import TaskTrainer, Update
from piece_ds.update.attach import attach
from piece_ds.zero.weights import read_selected

logger = logging.getLogger(__name__)


class TaskMask:
    """One task's mask, from selection to delta.

    Attributes:
        mask: once selected.
        previous: the selected weights before the task, by parameter.
        scale: factor on the task's changes, applied after training.
        unscaled: the selected weights before scaling; None at scale 1.
        select_seconds: wall time of statistics and selection; None if the mask was there already.
    """

    mask: Mask
    previous: dict[str, Tensor]
    scale: float = 1.0
    unscaled: dict[str, Tensor] | None = None
    select_seconds: float | None = None

    def __init__(
        self,
        trainer: TaskTrainer,
        source: MaskSource,
        context: TaskContext,
        resume: bool,
        output: OutputArguments,
    ) -> None:
        """Prepare the trainer's model in compact mode.

        Args:
            trainer: of the task, before it has an engine.
            source: where the mask comes from.
            context: the task in its stream, and its folder.
            resume: whether the folder may hold the mask of an interrupted run.
            output: how the delta is coded, and whether a chain of deltas is written.
        """
        self._trainer, self._source, self._folder, self._resume = trainer, source, context.folder, resume
        self._context, self._coding = context, output.delta_coding
        self._chain = ChainCallback(output.delta_every) if output.delta_every is not None else None
        if self._chain is not None:
            trainer.add_callback(self._chain)
        config = source.config
        if config.update_mode == "compact":
            self._save_whole_again = prepare_trainer(trainer, self._count, config.save_full, config.unit)
        else:
            self._save_whole_again = lambda: None

    def select(self) -> None:
        """Find the task's mask, keep the selected weights as they are now, and log where they are. A collective.

        The mask is read from --mask_file, or estimated on the task's data. If an interrupted run had already selected,
        its mask is used again.
        """
        # The mask: given, kept from an interrupted run, or estimated.
        engine, path, mask_file = engine_of(self._trainer), self._folder / MASK_NAME, self._source.files.mask_file
        layout = without(layout_of(engine.module), self._source.config.exclude)
        is_resumed = self._is_resumed()
        if mask_file is not None:
            self.mask = load_mask(mask_file, layout)
            # Later tasks, and a resumed one, begin with weights that the run itself has changed.
            if self._source.is_first and not is_resumed:
                say_other_base(self.mask, engine.module, mask_file)
        else:
            self.mask = load_mask(path, layout) if is_resumed else self._estimate(engine, layout)

        # The mask, then the weights before the task: with both there, an interrupted run need not select again.
        previous_path = self._folder / PREVIOUS_NAME
        if is_resumed:
            self.previous = load_previous(previous_path, self.mask)
        else:
            save_mask(path, self.mask)
            self.previous = read_selected(engine.module, self.mask)
            save_delta(previous_path, engine.module, self.mask, self.previous)
        logger.warning("%s", selection_line(self.mask, self.select_seconds))

    def attach(self) -> Update:
        """Put the mask in force. A collective."""
        config, engine = self._source.config, engine_of(self._trainer)
        layout = without(layout_of(engine.module), config.exclude)

        # Taken before attaching: a compact update takes every backward's gradients.
        step_scale = self._source.step_scale(engine, layout, has_moved=self._trainer.state.global_step > 0)
        update = attach(engine, self.mask, config.save_full, config.selected_gradient, step_scale)
        self._begin_chain()
        barrier()
        return update

    def end_training(self) -> None:
        """Detach the mask, let the trainer write whole checkpoints again, and restore the best step. A collective."""
        if self._trainer.update is not None:
            self._trainer.update.detach()
        self._save_whole_again()
        if self._trainer.best is not None:
            self._trainer.best.restore(engine_of(self._trainer), self._trainer.state)

    def limit_forgetting(self, budget: ForgettingBudget) -> dict[str, Any]:
        """Scale the trained weights into the forgetting budget; return what was found. A collective."""
        engine = engine_of(self._trainer)
        trained = read_selected(engine.module, self.mask)
        found = budget.limit(engine, masked_change(engine, self.mask, self.previous, trained))
        self.scale = found["delta_scale"]
        self.unscaled = None if self.scale == 1.0 else trained
        return found

    def save_delta(self) -> None:
        """Write what the task changed, and the last link of its chain. A collective."""
        module, step = self._trainer.model_wrapped.module, self._trainer.state.global_step
        before = self._context.previous
        parent = checksum_of(before / DELTA_NAME) if before is not None else None
        save_delta(
            self._folder / DELTA_NAME,
            module,
            self.mask,
            self.previous,
            unscaled=self.unscaled,
            scale=self.scale,
            chain=chain_metadata(parent, step, self._context.index),
            coding=self._coding,
        )
        if self._chain is not None and self._chain.writer is not None:
            self._chain.writer.write(step, is_last=True)

    def _begin_chain(self) -> None:
        """Begin the task's chain of deltas, or continue it, if one was asked for. A collective."""
        if self._chain is not None:
            module, before = self._trainer.model_wrapped.module, self._context.previous
            self._chain.writer = ChainWriter(
                self._folder / CHAIN_NAME,
                module,
                self.mask,
                self.previous,
                before=None if before is None else before / CHAIN_NAME,
            )

    def _count(self, model: nn.Module) -> int:
        mask_file = self._source.files.mask_file
        if mask_file is not None:
            return load_mask(mask_file, layout_of(model)).num_selected
        return self._source.count(model)

    def _is_resumed(self) -> bool:
        """Return whether an interrupted run has selected; the same on all ranks."""
        if self._trainer.state.global_step > 0:
            return True

        # previous.safetensors is written last: if it is there, so is the mask.
        may_be = self._resume and self._source.files.mask_file is None
        return may_be and bool(broadcast_object((self._folder / PREVIOUS_NAME).is_file()))

    def _estimate(self, engine: Any, layout: Layout) -> Mask:
        begin = time.perf_counter()
        source, context = self._source, self._context

        # Rows, also if the trainer takes packs of them.
        batches = source.batches(context.task.train, context.collate)

        # An interrupted pass resumes only on the same rows and batches.
        origin = source.source_of(engine, batches, layout)
        kept = PartialStatistics(self._folder / PARTIAL_NAME, source.files.statistics_save_steps, origin)
        mask = source.estimate(engine, batches, layout, kept)
        self.select_seconds = time.perf_counter() - begin
        return replace(mask, base_fingerprint=str(origin["weights"]))
