"""Ulysses sequence parallelism: several ranks hold parts of the same rows, and their gradients add up to one.

DeepSpeed's UlyssesSPAttentionHF gives each of S ranks a range of every row's tokens, and exchanges heads for tokens
around attention. A micro-batch then belongs to S ranks, and its gradient is the sum of theirs. W ranks take W / S
micro-batches at a time. Here rows are cut into these ranges, and the first one of a pass proves that model and engine
give the loss that whole rows have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.runtime.distributed import all_reduce_max_, collective_device, rank, world_size
from piece_ds.runtime.errors import UserError

_KNOWN_INPUTS = ("input_ids", "attention_mask", "labels", "position_ids")
IGNORED = -100

# Tokens of each row that the proof reads: whole rows may not fit one rank.
PROOF_TOKENS = 64

# |difference| / size that rounding may make of the loss and of the logits. Tokens that do not see the other ranks'
# have logits that are off by tenths.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-3, 1e-2), torch.bfloat16: (5e-3, 5e-2)}


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share rows with this one.

    Attributes:
        size: S, how many they are; 1 without sequence parallelism.
        place: of this rank among them: it holds the tokens of range `place`.
        shard: which of the W / S groups they are; group g takes micro-batch g of a round.
        num_shards: W / S.
        group: their process group; None if size is 1.
    """

    size: int
    place: int
    shard: int
    num_shards: int
    group: Any = None


def sequence_size(engine: Any) -> int:
    """Return over how many ranks the engine spreads each row; 1 without sequence parallelism."""
    return int(getattr(engine, "sequence_parallel_size", 1) or 1)


def num_data_shards(engine: Any) -> int:
    """Return how many micro-batches the ranks compute at a time."""
    return world_size() // sequence_size(engine)


def gradient_divisor(engine: Any) -> int:
    """Return the number by which DeepSpeed divides the sum of all ranks' gradients.

    Measured with 0.19.8: at ZeRO 0 to 2 it is the number of micro-batches at a time. At ZeRO-3 it is the number of
    ranks, whatever they share.
    """
    return world_size() if engine.zero_optimization_stage() == 3 else num_data_shards(engine)


def sequence_loss(engine: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return (loss to differentiate, mean loss to report) of a micro-batch of whole rows that several ranks hold.

    engine.backward() of the first gives, once DeepSpeed has averaged, the gradient that one rank has of whole rows, at
    every ZeRO stage. transformers' own loss of sequence parallelism gives S times as much at ZeRO 0 to 2.

    Args:
        engine: with sequence parallelism, or without: then these are the model's loss.
        batch: input_ids and labels, perhaps attention_mask and position_ids, of whole rows, padded on the right. The
            same on the ranks that share rows.
    Raises:
        UserError: see SequenceShards.part().
    """
    where = sequence_group(engine)
    if where.size == 1:
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        return loss, loss.detach()
    part = SequenceShards([], engine).part(batch)
    loss = engine(**{key: value.to(engine.device) for key, value in part.items()}).loss
    whole = loss.detach().clone()
    dist.all_reduce(whole, group=where.group)
    return loss * (gradient_divisor(engine) / where.num_shards), whole


def refuse_sequences(engine: Any, what: str) -> None:
    """Raise UserError if ranks share rows, for what gives whole rows to the model and is not proven with that."""
    if sequence_size(engine) > 1:
        raise UserError(f"{what} is not proven with sequence parallelism: set its size to 1, or leave {what} out")


def sequence_group(engine: Any) -> SequenceGroup:
    """Return the ranks that share rows with this one.

    Raises:
        UserError: they are not consecutive, as DeepSpeed's own groups are.
    """
    size = sequence_size(engine)
    if size == 1:
        return SequenceGroup(1, 0, rank(), world_size())

    # Elements are added in the order of micro-batches, so a group has to be a run of ranks.
    group = engine.seq_parallel_group
    first = rank() - rank() % size
    if dist.get_process_group_ranks(group) != list(range(first, first + size)):
        raise UserError(
            f"sequence parallelism over ranks {dist.get_process_group_ranks(group)}: expected consecutive ranks, as "
            "deepspeed's register_with_transformers() makes them"
        )
    return SequenceGroup(size, rank() - first, rank() // size, world_size() // size, group)


class SequenceShards:
    """Micro-batches of whole rows as this rank's ranges of them; a MicroBatchSource."""

    def __init__(self, source: Any, engine: Any) -> None:
        """Check what can be known without a row.

        Args:
            source: micro-batches of whole rows, padded on the right, the same on every rank.
            engine: with sequence parallelism.
        Raises:
            UserError: micro-batches bring a loss of their own, which takes whole rows, or tokens attend to a window,
                which Ulysses drops.
        """
        if getattr(source, "loss_of", None) is not None:
            raise UserError(
                "sequence parallelism is not proven with a loss of the trainer's own, which takes whole rows: use the "
                "model's loss, or set the size of sequence parallelism to 1"
            )
        self._source, self.where = source, sequence_group(engine)
        self._num_rows = int(engine.train_micro_batch_size_per_gpu())
        self._window = attention_window(engine.module)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        return self.part(self._source[b])

    def part(self, batch: Any) -> dict[str, Tensor]:
        """Return this rank's range of every row, with labels shifted before the cut.

        Raises:
            UserError: the batch has inputs that cannot be cut, packed rows, padding on the left, or more rows than
                the engine was made for.
        """
        ids, labels, positions = _whole_rows(batch)
        num_rows, length = ids.shape
        if self._window is not None and length > self._window:
            raise UserError(
                f"a row of {length} tokens, and the model attends to windows of {self._window}: Ulysses sequence "
                "parallelism drops the window; set its size to 1"
            )
        if num_rows > self._num_rows:
            raise UserError(
                f"a micro-batch of {num_rows} rows, and sequence parallelism was set up for {self._num_rows}: give "
                "importance a batch size of at most train_micro_batch_size_per_gpu"
            )

        # Every range has the same length and every micro-batch the same number of rows. What is added has no label.
        more_tokens, more_rows = -length % self.where.size, self._num_rows - num_rows
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        ids = nn.functional.pad(ids, (0, more_tokens, 0, more_rows))
        targets = nn.functional.pad(targets, (0, more_tokens, 0, more_rows), value=IGNORED)
        whole = positions.new_ones(self._num_rows, length + more_tokens).cumsum(1) - 1
        whole[:num_rows, :length] = positions

        # The loss is this range's share of the mean over all tokens of the micro-batch.
        count = (targets != IGNORED).sum()
        size = ids.shape[1] // self.where.size
        own = slice(size * self.where.place, size * (self.where.place + 1))
        targets = targets[:, own].contiguous()
        return {
            "input_ids": ids[:, own].contiguous(),
            "position_ids": whole[:, own].contiguous(),
            "labels": targets,
            "shift_labels": targets,
            "num_items_in_batch": count.clamp(min=1),
        }


def _whole_rows(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token ids, labels, positions) of a micro-batch, int64 [rows, tokens]; raise UserError if it has more."""
    known = isinstance(batch, Mapping) and "input_ids" in batch and "labels" in batch
    if not known or not set(batch) <= set(_KNOWN_INPUTS):
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"sequence parallelism expected micro-batches of {', '.join(_KNOWN_INPUTS)}, got {found}: other inputs "
            "cannot be cut along the rows"
        )
    ids, labels = batch["input_ids"], batch["labels"]
    attention = batch.get("attention_mask")
    positions = batch.get("position_ids")
    counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    # Ulysses drops the mask, which changes nothing only if padding comes after the row.
    if attention is not None and bool((attention.diff(dim=1) > 0).any()):
        raise UserError("sequence parallelism drops the attention mask, so rows must be padded on the right")
    read = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
    if bool(((labels != IGNORED) & ~read).any()):
        raise UserError(
            "sequence parallelism drops the attention mask, so tokens of padding may have no label: use -100"
        )
    if positions is not None and bool(((positions - positions[:, :1] != counted) & read).any()):
        raise UserError("sequence parallelism is not proven with packed rows, whose positions begin again: do not pack")
    return ids, labels, counted if positions is None else positions


def attention_window(model: nn.Module) -> int | None:
    """Return to how many tokens some layer attends at most, by the model's configuration; None means to all."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = any("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds) if kinds else window is not None
    if getattr(text, "use_sliding_window", True) is False:
        slides = False
    chunk = getattr(text, "attention_chunk_size", None)
    sizes = [int(size) for size in (window, chunk) if isinstance(size, int) and size > 0]
    return min(sizes) if slides and sizes else None


def proof_rows(batch: Any) -> dict[str, Tensor]:
    """Return the beginning of a micro-batch of whole rows, every token of which has a loss."""
    ids, _, positions = _whole_rows(batch)
    part = slice(0, PROOF_TOKENS)
    attention = batch.get("attention_mask")
    labels = ids if attention is None else ids.masked_fill(~attention.bool(), IGNORED)
    found = {"input_ids": ids[:, part], "labels": labels[:, part], "position_ids": positions[:, part]}
    return found if attention is None else found | {"attention_mask": attention[:, part]}


def prove_parts(engine: Any, batch: dict[str, Tensor], shards: SequenceShards) -> None:
    """Raise UserError unless the ranges of a micro-batch have the loss that its whole rows have. A collective.

    What layer takes part in the exchange is not written anywhere: attention that does not go through transformers'
    table, recurrences and losses of a model's own would see only this rank's tokens, without an error.

    Args:
        engine: in training mode, without dropout.
        batch: proof_rows().
        shards: that cuts them.
    Cost: two forward passes of at most PROOF_TOKENS tokens a row.
    """
    device, where = engine.device, shards.where
    modes = {module: module.training for module in engine.module.modules()}
    with torch.no_grad():
        parts = engine(**{key: value.to(device) for key, value in shards.part(batch).items()})
        total = parts.loss.detach().double()
        dist.all_reduce(total, group=where.group)

        # In evaluation mode DeepSpeed's attention does not exchange, if it was told so.
        engine.eval()
        try:
            whole = engine(**{key: value.to(device) for key, value in batch.items()})
        finally:
            for module, mode in modes.items():
                module.training = mode

    # How far loss and logits are off. Another group's rows may tell more.
    off = torch.stack(
        [
            (total - whole.loss.double()).abs() / whole.loss.double().abs().clamp(min=1e-3),
            _logits_off(parts, whole, batch, where).to(device),
        ]
    )
    worst = all_reduce_max_(off.nan_to_num(nan=float("inf")).to(collective_device())).tolist()
    tolerances = TOLERANCES.get(next(engine.module.parameters()).dtype, TOLERANCES[torch.bfloat16])
    for what, found, tolerance in zip(("losses", "logits"), worst, tolerances, strict=True):
        if found > tolerance:
            raise UserError(
                f"sequence parallelism: with rows spread over {where.size} ranks the {what} differ by {found:.1g} from "
                f"those of whole rows: {type(engine.module).__name__} has layers that do not take part in Ulysses' "
                "exchange (or register_with_transformers() was called without disable_in_eval=True); set its size to 1"
            )


def _logits_off(parts: Any, whole: Any, batch: dict[str, Tensor], where: SequenceGroup) -> Tensor:
    """Return |difference| / |logits| of this rank's range, where rows are not padding; 0 for a model without logits."""
    expected, found = getattr(whole, "logits", None), getattr(parts, "logits", None)
    if expected is None or found is None:
        return torch.zeros((), dtype=torch.float64)
    num_rows, length = batch["input_ids"].shape
    own = slice(where.place * found.shape[1], min((where.place + 1) * found.shape[1], length))
    read = batch["labels"][:, own].to(expected.device) != IGNORED
    expected = expected[:, own][read].float()
    found = found[:num_rows, : read.shape[1]][read].float()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-6)).double()
