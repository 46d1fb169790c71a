"""Add general text's part to the loss of every micro-batch: replay, and divergence from the base model.

Rows of general text join each micro-batch. Replay adds S times their mean loss, so that the model keeps seeing what it
knew. The divergence term adds BETA times the mean of KL(base || model) over the same tokens, so that it keeps saying
what it said. One forward pass of the rows serves both. The base model's logits are kept in a file from before the first
task, to the bit: there is no second model, no weight is put back, and a method may train what it likes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.config.method_arguments import MethodArguments
from piece_ds.evaluation.kept_logits import KeptLogits, answer_logits, divergence
from piece_ds.runtime.distributed import all_reduce_sum_, collective_device
from piece_ds.training.base_logits import BaseLogits
from piece_ds.training.general_replay import GeneralRows, rows_per_row
from piece_ds.training.run_folder import LOGITS_FOLDER


class GeneralLoss:
    """General text's part of the loss. begin() must be called before the first step if there is a base.

    Attributes:
        num_tokens: of all ranks' rows that have joined, without padding, as far as take_row() has been called.
    """

    def __init__(
        self, rows: GeneralRows, *, replay_weight: float = 0.0, kl_weight: float = 0.0, base: BaseLogits | None = None
    ) -> None:
        """Keep what to add.

        Args:
            rows: that join the micro-batches.
            replay_weight: S, factor of their mean loss.
            kl_weight: BETA, factor of the mean KL(base || model) of their tokens.
            base: the base model's logits of all rows; needed if kl_weight is not 0.
        """
        self._rows, self._replay_weight, self._kl_weight, self._base = rows, replay_weight, kl_weight, base
        self._kept: KeptLogits | None = None
        self.num_tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def begin(self, engine: Any, has_moved: bool = False) -> KeptLogits | None:
        """Take the base model's logits, or read them. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine, before the first step.
            has_moved: as in BaseLogits.take().
        """
        if self._kl_weight:
            assert self._base is not None
            self._kept = self._base.take(engine, has_moved)
        return self._kept

    def loss(self, model: nn.Module, number: int, num_rows: int, device: torch.device) -> Tensor:
        """Return S * mean loss + BETA * mean KL(base || model) of the rows that join a micro-batch.

        Args:
            model: the engine.
            number: of the micro-batch over all ranks and steps of the task.
            num_rows: of the micro-batch.
            device: of the model.
        Cost: a forward (and backward) pass of the rows; with a base also two softmaxes of their logits in fp32.
        """
        # One forward pass.
        chosen = self._rows.drawn(number, num_rows)
        batch = {name: values.to(device) for name, values in self._rows.batch(chosen).items()}
        outputs = model(**batch)
        num_answer_tokens = (batch["labels"][:, 1:] != -100).sum()

        # The two terms; the sum of both divergences and losses is only for the log.
        total: Tensor = outputs.loss * self._replay_weight
        apart = torch.zeros((), device=device)
        if self._kept is not None:
            now = answer_logits(outputs.logits, batch["labels"])
            apart = divergence(now, self._kept.read(chosen).to(now.device)) / max(now.shape[0], 1)
            total = total + self._kl_weight * apart

        # Summed on the device: the host waits for nothing.
        means = torch.stack([outputs.loss.detach().float(), apart.detach().float()]).double() * num_answer_tokens
        counts = torch.stack([_num_tokens(batch), num_answer_tokens]).double()
        self._sums = self._sums.to(device) + torch.cat([counts, means])
        return total

    def take_row(self) -> dict[str, float]:
        """Return what the rows were since the last call, over all ranks, for the log. A collective of four numbers.

        Returns:
            general_tokens, without padding; general_loss and, with a base, general_kl: means over their answer tokens,
            nats, NaN if there were none.
        """
        sums = all_reduce_sum_(self._sums.to(collective_device()))
        self._sums = torch.zeros_like(self._sums)
        num_tokens, num_answer_tokens, loss, apart = sums.tolist()  # counts are exact in fp64
        self.num_tokens += int(num_tokens)
        of_one = num_answer_tokens or float("nan")
        row = {"general_tokens": int(num_tokens), "general_loss": loss / of_one}
        return row | ({"general_kl": apart / of_one} if self._kl_weight else {})


def general_loss_of(
    flags: MethodArguments,
    rows: Sequence[Any] | None,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    seed: int,
    folder: Path,
    is_base: bool,
) -> GeneralLoss | None:
    """Return what --general_replay and --general_kl ask for, or None without both.

    Args:
        flags: of the method.
        rows: text that stands for general ability, or None.
        collate: rows -> model inputs with labels.
        seed: another one for each task. Otherwise the same rows would come in the same order, and be learned by heart.
        folder: of the run, which keeps the base model's logits.
        is_base: as in BaseLogits.
    """
    if rows is None or not (flags.general_replay or flags.general_kl):
        return None
    base = BaseLogits(
        rows=rows,
        collate=collate,
        batch_size=flags.importance_batch_size,
        folder=folder / LOGITS_FOLDER,
        is_base=is_base,
    )
    return GeneralLoss(
        GeneralRows(rows, collate, rows_per_row(flags.general_share, flags.general_replay), seed),
        replay_weight=flags.general_replay,
        kl_weight=flags.general_kl,
        base=base,
    )


def _num_tokens(inputs: dict[str, Any]) -> Tensor:
    return inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())
