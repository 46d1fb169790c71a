"""Say how far a stream has moved the model: its divergence from the base model on held-out rows.

A loss on other text rises if something was lost, and falls if something was learned, so it cannot tell what was kept.
KL(base || model) can: it is zero only if the model still says what it said. On a task's own held-out rows it is what
forgetting follows (Shenfeld et al. 2025, arXiv 2509.04259).
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piece_ds.data.collate import MicroBatches
from piece_ds.evaluation.kept_logits import KeptLogits, divergence, forward_answers, num_answer_tokens
from piece_ds.report.results import GENERAL_TEXT
from piece_ds.runtime.distributed import all_reduce_sum_, broadcast_object, collective_device, rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.training.base_logits import BaseLogits
from piece_ds.training.run_folder import LOGITS_FOLDER

logger = logging.getLogger(__name__)

# Answer tokens whose softmaxes are held at once, in fp32.
_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class BaseDivergence:
    """KL(base || model) over the first answer tokens of held-out rows.

    Attributes:
        rows: name of a task, or GENERAL_TEXT -> its held-out rows.
        collate: rows -> batch.
        batch_size: rows of a forward pass.
        num_tokens: answer tokens of each text: its first rows until they have so many. 0 turns it off.
        folder: of the run, which keeps the base model's logits. All nodes must see it.
    """

    rows: Mapping[str, Sequence[Any]]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    batch_size: int
    num_tokens: int
    folder: Path

    def begin(self, engine: Any) -> None:
        """Keep what the base model says. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine, before the first step of the stream.
        Cost: a forward pass over the first rows; num_tokens * vocabulary * bytes of a logit on disk for each text.
        """
        # Logits that do not fit on the disk are no reason to stop a run.
        vocabulary = engine.module.config.get_text_config().vocab_size
        needed = 4 * len(self._names) * self.num_tokens * vocabulary
        self.folder.mkdir(parents=True, exist_ok=True)
        if not broadcast_object(2 * needed < shutil.disk_usage(self.folder).free):
            logger.warning("no room for the base model's logits (%.1f GB): its divergence is not logged", needed / 1e9)
            return
        for name in self._names:
            self._base(name, is_base=True).take(engine)

    def of(self, engine: Any, names: Sequence[str]) -> dict[str, float]:
        """Return KL(base || model) of tasks and of general text, means over their tokens, nats. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine.
            names: of the tasks.
        Returns:
            Name -> nats; without the texts that have no answer token, or of which the base model's logits are not kept.
        Cost: a forward pass over the first rows of each.
        """
        found = {}
        for name in self._names:
            kept = self._read(name, engine) if name in (*names, GENERAL_TEXT) else None
            if kept is not None:
                found[name] = self._mean(engine, name, kept)
        return found

    @property
    def _names(self) -> list[str]:
        return [name for name in self.rows if self.num_tokens and self._first(name)]

    def _first(self, name: str) -> list[Any]:
        """Return whole rows from the first on, until they have num_tokens answer tokens; [] if there are none."""
        rows: list[Any] = []
        num_tokens = 0
        for row in self.rows[name]:
            if num_tokens >= self.num_tokens:
                break
            rows.append(row)
            num_tokens += num_answer_tokens([row])[0]
        return rows if num_tokens else []

    def _base(self, name: str, is_base: bool) -> BaseLogits:
        # A task's name may hold what a folder's may not.
        folder = self.folder / LOGITS_FOLDER / f"evaluated-{list(self.rows).index(name):02d}"
        return BaseLogits(
            rows=self._first(name), collate=self.collate, batch_size=self.batch_size, folder=folder, is_base=is_base
        )

    def _read(self, name: str, engine: Any) -> KeptLogits | None:
        try:
            return self._base(name, is_base=False).take(engine)
        except UserError as error:  # a run that an older version began, or resumed with other rows
            logger.info("the divergence from the base model on %s is not logged: %s", name, error)
            return None

    def _mean(self, engine: Any, name: str, kept: KeptLogits) -> float:
        batches = MicroBatches(self._first(name), self.collate, self.batch_size)
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(batches), world_size()):
            # A rank without a micro-batch repeats one: ZeRO-3 gathers together.
            own = first + rank()
            b = own if own < len(batches) else first
            now_AV = forward_answers(engine, batches[b])
            if own >= len(batches):
                continue
            chosen = range(b * self.batch_size, min((b + 1) * self.batch_size, len(batches.rows)))
            before_AV = kept.read(chosen)
            for part in range(0, len(now_AV), _CHUNK):
                before = before_AV[part : part + _CHUNK].to(now_AV.device)
                sums[0] += divergence(now_AV[part : part + _CHUNK], before).double().cpu()
            sums[1] += len(now_AV)
        total, count = all_reduce_sum_(sums.to(collective_device())).tolist()
        return float(total / count)
