"""PieceCallback: PIECE in any transformers Trainer.

    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)
    trainer.add_callback(PieceCallback(trainer, recipe="mask"))
    trainer.train()

When training begins, DeepSpeed's engine exists and nothing has been trained. At that moment importance is estimated on
the trainer's own data, and the mask is attached.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.checkpoint.delta_file import chain_metadata, load_previous, save_delta
from piece_ds.checkpoint.delta_parts import CODINGS
from piece_ds.checkpoint.mask_base import say_other_base, with_base
from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.config.piece import PieceConfig, config_of
from piece_ds.config.recommended import MEASURED_SIZE, callback_settings, rate_in_proportion
from piece_ds.deltas.chain_files import CHAIN_NAME
from piece_ds.methods.estimate import count_selected, estimate_mask
from piece_ds.models.eligible import without
from piece_ds.models.experts import gather_experts_whole
from piece_ds.models.layout import layout_of
from piece_ds.models.weight_size import size_of_model, vocabulary_of
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import without_mpi
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.selected_values import selected_values
from piece_ds.training.chain_writer import ChainCallback, ChainWriter
from piece_ds.training.compact_trainer import engine_of, prepare_trainer
from piece_ds.training.general_text import GeneralText
from piece_ds.training.progress import selection_line
from piece_ds.training.resume_check import check_when_resumed
from piece_ds.training.run_folder import PREVIOUS_NAME
from piece_ds.training.trainer_checks import check_compact, check_importance, check_trainer
from piece_ds.training.trainer_loss import notes_kept, trainer_micro_batches
from piece_ds.update.attach import attach
from piece_ds.update.compact import CompactUpdate
from piece_ds.update.masked import MaskedUpdate
from piece_ds.zero.weights import read_selected

logger = logging.getLogger(__name__)

MASK_NAME, DELTA_NAME = "mask.safetensors", "delta.safetensors"

# TrainingArguments(deepspeed=...) starts torch.distributed before a callback exists. A script without a launcher
# must work from here on.
without_mpi()


class PieceCallback(TrainerCallback):
    """Select weights when training begins, train only them, and write mask and delta.safetensors to OUTPUT_DIR.

    Importance is that of the trainer's own loss over its own batches. TRL's SFTTrainer, DPOTrainer, RewardTrainer,
    KTOTrainer, GRPOTrainer, RLOOTrainer and DistillationTrainer work as transformers' Trainer does; general text needs
    a model that predicts tokens, so no RewardTrainer's. A run resumed from a checkpoint uses the mask that it began
    with, from the same file. previous.safetensors, which its delta needs, lies beside it, and so do general text's
    statistics and base logits.

    Attributes:
        config: settings of the method.
        mask: the mask in use, once training has begun.
        update: the mask in force, while training.
        select_seconds: wall time of statistics and selection; None if the mask came from a file.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: PieceConfig | None = None,
        *,
        mask_file: str | Path | None = None,
        delta_every: int | None = None,
        delta_coding: str = "indices",
        recipe: str | None = None,
        general_text: Sequence[Any] | str | None = None,
        general_replay: float = 0.0,
        general_kl: float | None = None,
        general_share: float | None = None,
        **settings: Any,
    ) -> None:
        """Check the settings and, in compact mode, prepare the trainer's model.

        Args:
            trainer: whose engine, training data and collator are used. In compact mode its model is prepared now, and
                DeepSpeed keeps state for only the selected weights. To resume from its checkpoints, make the trainer
                with the model that training began with (or save_full=True).
            config: settings of the method; None means the defaults.
            mask_file: use this mask instead of estimating one.
            delta_every: every so many optimizer steps, write what has changed since the last time into
                OUTPUT_DIR/chain, for copies of the model that follow the training; see deltas.follow.
            delta_coding: of the delta: "indices", which every program of the format reads, "gaps" or "smallest".
            recipe: "mask" sets what keeps most of what a pretrained model knew: 1 % of the weights by piece-ratio, text
                that the model writes itself, scaled steps, general_kl=4. The learning rate stays the trainer's; the
                log says which one is in proportion to what was measured. "wide" sets the same for 10 % at random.
                "paper" sets the paper's own. Other arguments win, but for method.
            general_text: rows with input_ids and labels that stand for general ability, for method="piece-ratio",
                step_scale="general", general_replay and general_kl; "self": the model writes 128 of them before
                training. Their loss is the model's own, of the next token, whatever the trainer's is.
            general_replay: S in [0, 1]: round(S * per_device_train_batch_size) of these rows, at least one, join every
                micro-batch, and S times their mean loss is added to the trainer's.
            general_kl: BETA: BETA times the mean KL(model before training || model) over the tokens of these rows, or
                without general_replay of a quarter as many as the micro-batch has, is added.
            general_share: rows of it per row of a micro-batch, in (0, 4], instead of S or a quarter.
            settings: fields of PieceConfig by name, in place of config's: method="piece-s", ratio=0.001,
                update_mode="masked", exclude="*norm*", importance_rows=1000 ...
        Raises:
            UserError: the trainer has no DeepSpeed or an adapter, or makes its loss only while it trains and no mask is
                given, a setting is outside its range, general text is missing or of no use, or compact mode is asked of
                a trainer that already has an optimizer.
        """
        check_trainer(trainer)
        self.trainer = trainer
        chosen = callback_settings(recipe, settings if config is None else (*settings, "method"))
        own_text, own_kl = chosen.pop("general_text", None), chosen.pop("general_kl", 0.0)
        general_text = own_text if general_text is None else general_text
        general_kl = own_kl if general_kl is None else general_kl
        _say_rate(recipe, chosen.pop("learning_rate", None), trainer)
        self.config = config_of(config, {**chosen, **settings})
        if mask_file is None:
            check_importance(trainer, self.config.method)
        self.general = GeneralText(trainer, self.config, general_text, general_replay, general_kl, share=general_share)
        if delta_every is not None and delta_every < 1:
            raise UserError(f"delta_every must be a positive number of steps, got {delta_every}")
        if delta_coding not in CODINGS:
            raise UserError(f"delta_coding must be one of {', '.join(CODINGS)}, got {delta_coding!r}")
        self.mask_file, self._coding = mask_file, delta_coding
        self._chain = ChainCallback(delta_every) if delta_every is not None else None
        self.mask: Mask | None = None
        self.update: MaskedUpdate | CompactUpdate | None = None
        self.select_seconds: float | None = None
        self._previous: dict[str, Tensor] = {}
        self._save_whole_again: Callable[[], None] | None = None
        check_when_resumed(trainer)

        # Now, because DeepSpeed makes its hooks before training begins.
        if trainer.model is not None:
            gather_experts_whole(trainer.model)

        # Now, because DeepSpeed makes its optimizer from the model's parameters before training begins.
        if self.config.update_mode == "compact":
            check_compact(trainer)
            self._save_whole_again = prepare_trainer(trainer, self._count, self.config.save_full, self.config.unit)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Select or read the mask, keep the weights before training, and attach.

        Raises:
            UserError: there is no suitable engine, or this callback has already served a train().
        """
        engine = engine_of(self.trainer)
        self.general.check(engine)
        is_resumed = state.global_step > 0
        is_left = self.config.update_mode == "compact" and selected_values(engine.module) is None
        if self.mask is not None or is_left:
            raise UserError("PieceCallback serves one train(): for another one make another Trainer and callback")

        # Select, or read the mask that the run began with.
        layout = without(layout_of(engine.module), self.config.exclude)
        self.general.prepare(engine, is_resumed)
        path = Path(args.output_dir) / MASK_NAME
        given = self.mask_file or (path if is_resumed else None)
        self.mask = load_mask(given, layout) if given is not None else self._select(engine, layout)
        if self.mask_file is not None and not is_resumed:
            say_other_base(self.mask, engine.module, self.mask_file)
        if not is_resumed:
            save_mask(path, self.mask)
        line = selection_line(self.mask, self.select_seconds)
        if is_main():
            logger.warning("%s", line)

        # What the selected weights were, for the delta.
        previous = Path(args.output_dir) / PREVIOUS_NAME
        self._previous = load_previous(previous, self.mask) if is_resumed else read_selected(engine.module, self.mask)
        if not is_resumed:
            save_delta(previous, engine.module, self.mask, self._previous)

        # Attach. What general text gives is taken before: a compact update takes every backward's gradients.
        step_scale = self.general.step_scale(engine, layout, is_resumed)
        self.general.begin(engine, is_resumed)
        self.update = attach(engine, self.mask, self.config.save_full, self.config.selected_gradient, step_scale)
        if self._chain is not None:
            self._chain.writer = ChainWriter(path.parent / CHAIN_NAME, engine.module, self.mask, self._previous)
        barrier()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a link of the chain, if one is due."""
        if self._chain is not None:
            self._chain.on_step_end(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add general text's tokens, loss and divergence to a row of the trainer's log."""
        if logs is not None and "loss" in logs:
            self.general.add_to_log(logs)
            state.log_history[-1] |= {name: value for name, value in logs.items() if name.startswith("general_")}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Write the delta and the chain's last link, detach, and let the trainer write whole checkpoints again."""
        if self.update is not None and self.mask is not None:
            module = self.trainer.model_wrapped.module
            chain = chain_metadata(None, state.global_step, 0)
            path = Path(args.output_dir) / DELTA_NAME
            save_delta(path, module, self.mask, self._previous, chain=chain, coding=self._coding)
            if self._chain is not None and self._chain.writer is not None:
                self._chain.writer.write(state.global_step, is_last=True)
            self.update.detach()
            self.update = None
        self.general.end()
        if self._save_whole_again is not None:
            self._save_whole_again()

    def _count(self, model: nn.Module) -> int:
        """Return how many weights the mask will have."""
        if self.mask_file is not None:
            return load_mask(self.mask_file, layout_of(model)).num_selected
        return count_selected(self.config, model)

    def _select(self, engine: Any, layout: Layout) -> Mask:
        begin = time.perf_counter()
        batches = trainer_micro_batches(self.trainer, self.config.importance_batch_size, self.config.importance_rows)

        # The statistics pass must not appear in the trainer's own log.
        with notes_kept(self.trainer):
            options = self.general.options(engine, layout)
            mask = estimate_mask(engine, batches, self.config, layout=layout, options=options)
        self.select_seconds = time.perf_counter() - begin
        return with_base(mask, engine.module)


def _say_rate(recipe: str | None, rate: float | None, trainer: Trainer) -> None:
    """Say that the trainer has another learning rate than the recipe's, in proportion to the model's weights."""
    if rate is None:
        return
    size = None if trainer.model is None else size_of_model(trainer.model, vocabulary_of(trainer.model))
    wanted = rate if size is None else rate_in_proportion(rate, size)
    if trainer.args.learning_rate != wanted:
        logger.warning(
            "recipe %r was measured at learning_rate=%g on weights of root mean square %.2g%s; the trainer has %g",
            *(recipe, rate, MEASURED_SIZE),
            "" if size is None else f", which is {wanted:g} for this model's of {size:.2g}",
            trainer.args.learning_rate,
        )
