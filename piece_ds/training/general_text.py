"""General text in any trainer of transformers or TRL: importance, scaled steps, replay and divergence."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer

from piece_ds.config.piece import PieceConfig
from piece_ds.config.ranges import MAX_SHARE, has_good_share
from piece_ds.data.collate import Collator, pad_id
from piece_ds.data.general_text import SELF, rows_of_tokens
from piece_ds.evaluation.self_written import SelfWriting, write_rows
from piece_ds.methods.registry import find_method
from piece_ds.methods.request import SelectionOptions
from piece_ds.models.loading import reads_images
from piece_ds.models.processor import tokenizer_of
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main, rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text
from piece_ds.runtime.overriding import override
from piece_ds.state.partition import Layout
from piece_ds.training.base_logits import BaseLogits
from piece_ds.training.general_loss import GeneralLoss
from piece_ds.training.general_replay import GeneralRows, rows_per_row
from piece_ds.training.general_statistics import GeneralStatistics
from piece_ds.training.run_folder import LOGITS_FOLDER
from piece_ds.update.step_scale import StepScale, general_step_scale
from piece_ds.zero.sequence_parallel import refuse_sequences

STATISTICS_FOLDER = "general_statistics"
# What the model wrote, kept for a run that is resumed: by then the model would write something else.
WRITTEN_NAME = "general_text.jsonl"


class GeneralText:
    """What a trainer does with text that stands for general ability.

    The loss there is the model's own, of the next token, whatever the trainer's is.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: PieceConfig,
        rows: Sequence[Any] | str | None,
        replay: float,
        divergence: float,
        *,
        share: float | None = None,
    ) -> None:
        """Check what is asked; nothing is computed yet.

        Args:
            trainer: of a causal language model.
            config: settings of the method.
            rows: with input_ids and labels; "self" if the model writes them; or None.
            replay, divergence: S and BETA, as in GeneralLoss; 0 for none.
            share: rows per row of a micro-batch; None for S, or a quarter.
        Raises:
            UserError: rows are missing, or given to nothing; or the trainer's model predicts no tokens.
        """
        self._trainer, self._config = trainer, config
        self._is_written = isinstance(rows, str)
        self._rows: Sequence[Any] | None = None if isinstance(rows, str) else rows
        self._replay, self._divergence, self._share = replay, divergence, share
        self.loss: GeneralLoss | None = None
        self._own_loss: Any = None
        self._micro_batch = (-1, 0)  # (step, micro-batches of it so far)

        # Rows and uses need each other.
        uses = {
            f"method={config.method!r}": find_method(config.method).needs_general_text,
            f"step_scale={config.step_scale!r}": config.step_scale != "none",
            f"general_replay={replay:g}": replay > 0,
            f"general_kl={divergence:g}": divergence > 0,
        }
        used = [name for name, is_used in uses.items() if is_used]
        if used and rows is None:
            raise UserError(f'PieceCallback\'s {used[0]} needs general_text: rows of input_ids and labels, or "self"')
        if rows is not None and not used:
            raise UserError(
                "PieceCallback was given general_text, but no method, step_scale, general_replay or general_kl uses it"
            )
        if not (0 <= replay <= 1 and 0 <= divergence < float("inf")):
            raise UserError(f"general_replay must be in [0, 1] and general_kl 0 or more, got {replay} and {divergence}")
        if not has_good_share(share) or (share is not None and not (replay or divergence)):
            raise UserError(
                f"general_share must be above 0 and at most {MAX_SHARE:g}, and goes with general_replay or general_kl, "
                f"got {share}"
            )

        # Who writes needs its words.
        if self._is_written and rows != SELF:
            raise UserError(
                f'PieceCallback\'s general_text expects rows of input_ids and labels, or "self", got {rows!r}'
            )
        if self._is_written and getattr(trainer, "processing_class", None) is None:
            raise UserError("PieceCallback's general_text=\"self\" needs the trainer's tokenizer: processing_class")
        if self._is_written and reads_images(trainer.model.config):
            raise UserError(
                'PieceCallback\'s general_text="self" does not write for a model that reads images: give rows'
            )

        # The loss on general text is that of the next token.
        if used and trainer.model.get_output_embeddings() is None:
            raise UserError(
                f"PieceCallback's {used[0]} needs a model that predicts tokens, got {type(trainer.model).__name__}"
            )
        if divergence and reads_images(trainer.model.config):
            raise UserError("PieceCallback's general_kl does not keep the logits of a model that reads images")

    def check(self, engine: Any) -> None:
        """Raise UserError if ranks share rows: rows of general text are whole."""
        if self._replay or self._divergence:
            refuse_sequences(engine, "general_replay or general_kl")

    def prepare(self, engine: Any, has_moved: bool) -> None:
        """Let the model write its text, or read what it wrote when the run began. A collective; nothing without "self".

        Args:
            engine: deepspeed.DeepSpeedEngine, with its weights before the first step unless has_moved.
            has_moved: whether the weights are those of a checkpoint.
        Raises:
            UserError: the text of a run that is resumed is not there.
        Cost: see write_rows(); under ZeRO-3 each token gathers the model once.
        """
        if not self._is_written:
            return
        path = Path(self._trainer.args.output_dir or ".") / WRITTEN_NAME
        if has_moved:
            self._rows = broadcast_object(_read_written(path) if is_main() else None)
            if not self._rows:
                raise UserError(f"{path}: expected the general text that this run began with, which is not there")
            return
        tokenizer = tokenizer_of(self._trainer.processing_class)
        written = write_rows(engine, tokenizer, SelfWriting(), engine.device)
        self._rows = rows_of_tokens(written["input_ids"])
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows))
        barrier()

    def options(self, engine: Any, layout: Layout) -> SelectionOptions:
        """Return what selection may need of general text."""
        if self._rows is None:
            return SelectionOptions()
        statistics = self._statistics(is_base=True)
        return SelectionOptions(general=partial(statistics.take, engine, layout), general_batches=statistics.batches)

    def step_scale(self, engine: Any, layout: Layout, has_moved: bool) -> StepScale | None:
        """Return the factors of step_scale "general", or None without it. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine.
            layout: of its model.
            has_moved: whether the weights are those of a checkpoint.
        """
        if self._config.step_scale == "none":
            return None
        taken = self._statistics(not has_moved).take(engine, layout, has_moved)
        return general_step_scale(taken, self._config.damping_quantile)

    def begin(self, engine: Any, has_moved: bool) -> None:
        """Add general text's part to the trainer's loss from here on. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine, with its weights before the first step unless has_moved.
            has_moved: as in step_scale().
        """
        if not (self._replay or self._divergence):
            return
        rows, collate, trainer = self._rows or (), self._collate(), self._trainer
        base = BaseLogits(
            rows=rows,
            collate=collate,
            batch_size=self._config.importance_batch_size,
            folder=Path(trainer.args.output_dir or ".") / LOGITS_FOLDER,
            is_base=not has_moved,
        )
        share = rows_per_row(self._share, self._replay)
        self.loss = GeneralLoss(
            GeneralRows(rows, collate, share, trainer.args.seed),
            replay_weight=self._replay,
            kl_weight=self._divergence,
            base=base,
        )
        self.loss.begin(engine, has_moved)

        # On the object: the trainer's class, and other trainers of it, stay as they are.
        self._own_loss = trainer.compute_loss
        self._give_back = override(trainer, "compute_loss", self._compute_loss)

    def end(self) -> None:
        """Give the trainer its own loss back."""
        if self._own_loss is not None:
            self._give_back()
            self._own_loss = None

    def add_to_log(self, row: dict[str, Any]) -> None:
        """Add general text's tokens, loss and divergence since the last log. A collective."""
        if self.loss is not None:
            row |= self.loss.take_row()

    def _compute_loss(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        """Return what the trainer's own compute_loss() does, with general text's part added in training."""
        found = self._own_loss(model, inputs, *others, **named)
        if not model.training or self.loss is None:
            return found
        device = next(model.parameters()).device
        num_rows = self._trainer.args.per_device_train_batch_size
        extra = self.loss.loss(model, self._next_micro_batch(), num_rows, getattr(model, "device", device))
        extra = extra / self._divisor(named.get("num_items_in_batch"))
        if isinstance(found, tuple):
            return (found[0] + extra.to(found[0].device), *found[1:])
        return found + extra.to(found.device)

    def _divisor(self, num_items_in_batch: Any) -> int:
        """Return by what to divide a micro-batch's mean: the trainer divides some losses itself, and adds up others."""
        trainer: Any = self._trainer
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            is_summed = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = is_summed or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if is_scaled else 1

    def _next_micro_batch(self) -> int:
        """Return the number of this micro-batch over all ranks and steps, and count it."""
        step, in_step = self._micro_batch
        now, accumulation = self._trainer.state.global_step, self._trainer.args.gradient_accumulation_steps
        in_step = in_step if step == now else 0
        self._micro_batch = (now, in_step + 1)
        return (now * accumulation + in_step) * world_size() + rank()

    def _statistics(self, is_base: bool) -> GeneralStatistics:
        return GeneralStatistics(
            rows=self._rows or (),
            collate=self._collate(),
            batch_size=self._config.importance_batch_size,
            folder=Path(self._trainer.args.output_dir or ".") / STATISTICS_FOLDER,
            is_base=is_base,
            device="cpu" if self._config.statistics_device == "cpu" else None,
        )

    def _collate(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        processing: Any = self._trainer.processing_class
        # Padding is masked, so without a tokenizer any token will do.
        return Collator(0 if processing is None else pad_id(tokenizer_of(processing)))


def _read_written(path: Path) -> list[Any]:
    """Return the rows of a file, [] if it is not there or not whole."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
