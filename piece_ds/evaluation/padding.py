"""Find out whether padding changes what a model says, by asking the model. No list knows every class and version.

Rows are padded on the right, which no causal model can see. Prompts to generate from are padded on the left. Models
without relative positions, with recurrences or with convolutions may see that.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from piece_ds.evaluation.batches import evaluating
from piece_ds.evaluation.loss import IGNORED_LABEL, Rows
from piece_ds.runtime.distributed import all_reduce_max_, collective_device, is_main
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

# Largest difference of logits, as a share of their spread, that counts as rounding: in fp32, and in 16 bits. There
# the typical token decides: rounding may send one token to another expert. Over the causal classes of transformers
# 5.23, a model that sees padding is off by 0.1 to 1.
_EXACT = 1e-3
_SAME_SHAPE = 0.01  # two rows of one batch, or one token changed: the same kernels run
# Another length is other kernels: 30 layers in bf16 differ by 0.024, 60 layers with large weights by 0.09.
_OTHER_LENGTH, _NEXT_TOKEN = 0.3, 0.08

_ROW_TOKENS = 11
_NUM_ASKED = 3
_ANSWERS_ALONE = "_piece_ds_answers_alone"


def check_rows(model: Any, token_ids: Sequence[int], pad_id: int, one_row_at_a_time: bool) -> None:
    """Raise UserError unless model is causal and treats a row in a batch like the row by itself. A collective.

    Args:
        model: a causal model of transformers or the DeepSpeed engine around one.
        token_ids: at least one id that stands for no image; repeated as needed.
        pad_id: of padding.
        one_row_at_a_time: every batch of the run is a single row, so padding need not be checked.
    Cost: three forward passes of at most 32 tokens.
    """
    module = getattr(model, "module", model)
    row = (list(token_ids) * _ROW_TOKENS)[:_ROW_TOKENS]
    other = next((token for token in token_ids if token != row[-1]), pad_id if pad_id != row[-1] else row[-1] - 1)

    # The row by itself, the row with another last token, and the row beside a longer one.
    with evaluating(model):
        alone = _logits(model, [row], pad_id)[0]
        changed = _logits(model, [[*row[:-1], abs(other)]], pad_id)[0]
        padded, whole = _logits(model, [row, row + row[:5]], pad_id)[:, :_ROW_TOKENS]

    # A causal model cannot tell from its earlier logits that the last token changed. The longer row begins with the
    # same tokens, and has tokens of its own where the shorter one has padding.
    name = type(module).__name__
    sees_later = _differ(module, alone[:-1], changed[:-1], _SAME_SHAPE)
    sees_padding = not one_row_at_a_time and (
        _differ(module, whole, padded, _SAME_SHAPE) or _differ(module, alone, padded, _OTHER_LENGTH)
    )
    if sees_later or sees_padding:
        with evaluating(model):
            again = _logits(model, [row], pad_id)[0]
        if _differ(module, alone, again, _SAME_SHAPE):
            raise UserError(
                f"{name} says other things of the same row each time: it draws random numbers in evaluation too, so "
                "that neither its losses nor a mask would repeat; make it deterministic in config.json (Reformer: "
                "hash_seed)"
            )
    if sees_later:
        raise UserError(
            f"{name} sees the answers that it shall learn: a change of a row's last token changes what it says of the "
            "tokens before. It is an encoder, or its config.json makes it one (is_decoder false, causal false)"
        )
    if sees_padding:
        raise UserError(
            f"{name} says other things of a padded row than of the row alone: train one row at a time "
            "(--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --importance_batch_size 1, with "
            "--gradient_accumulation_steps for larger steps)"
        )


def answer_tokens(rows: Rows) -> list[int]:
    """Return the first counted labels of rows, for check_rows(). They stand for no image."""
    found: list[int] = []
    for index in range(len(rows)):
        found += [label for label in rows[index]["labels"] if label != IGNORED_LABEL]
        if len(found) >= _ROW_TOKENS:
            break
    return found[:_ROW_TOKENS]


def _logits(model: Any, rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """Return fp32 logits of rows padded on the right, (rows, longest, vocabulary)."""
    longest = max(map(len, rows))
    device = next(iter(getattr(model, "module", model).parameters())).device
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _differ(model: Any, expected: Tensor, got: Tensor, in_16_bits: float) -> bool:
    """Return whether logits, (tokens, vocabulary), differ by more than rounding on any rank. A collective.

    Args:
        model: that gave them. The logits themselves may be fp32 although the model computes in 16 bits.
        expected: logits.
        got: logits.
        in_16_bits: tolerance for the typical token in 16 bits. In fp32 the worst token decides, by _EXACT.
    """
    is_exact = all(param.dtype not in (torch.bfloat16, torch.float16) for param in model.parameters())
    expected, got = expected.float(), got.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp(min=1e-12)
    share = (expected - got).norm(dim=-1) / spread
    differs = share.max() > _EXACT if is_exact else share.median() > in_16_bits
    return bool(all_reduce_max_(differs.to(collective_device(), torch.int32)))


def answers_alone(
    module: nn.Module,
    lengths: Sequence[int],
    inputs_of: Callable[[list[int]], dict[str, Tensor]],
    config: GenerationConfig,
    device: torch.device | str,
    synced: bool,
) -> bool:
    """Return whether prompts must be answered one at a time because padding changes the answers of module.

    A collective. Each model is asked once: up to three of the shortest prompts, each by itself and then all beside the
    longest.

    Args:
        module: the model itself, in evaluation mode.
        lengths: of the prompts, in tokens.
        inputs_of: indices of prompts -> a batch padded on the left.
        config: of the generation.
        device: where the batches go.
        synced: as synced_gpus of generate().
    """

    # Asked already, or nothing to pad.
    known = getattr(module, _ANSWERS_ALONE, None)
    if known is not None or len(set(lengths)) < 2:
        return bool(known)

    # The shortest prompts get the most padding.
    *others, longest = sorted(range(len(lengths)), key=lambda index: lengths[index])
    shortest = [index for index in others[:_NUM_ASKED] if lengths[index] < lengths[longest]]

    # Only the first token's logits are compared: later tokens depend on it.
    first = GenerationConfig(
        max_new_tokens=1,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        num_beams=1,
        use_cache=True,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )

    def next_logits(indices: list[int]) -> Tensor:
        inputs = {name: tensor.to(device) for name, tensor in inputs_of(indices).items()}
        return module.generate(**inputs, generation_config=first, synced_gpus=synced).logits[0][: len(indices)]

    # Compare, and remember the answer on the model.
    try:
        each = torch.cat([next_logits([index]) for index in shortest])
        alone = _differ(module, each, next_logits([*shortest, longest])[:-1], _NEXT_TOKEN)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if synced:  # the other ranks may be waiting in the pass that failed here
            raise
        logger.warning("%s cannot answer prompts of different lengths together (%s)", type(module).__name__, error)
        alone = True
    if alone and is_main():
        logger.warning(
            "%s answers a padded prompt otherwise than the prompt alone: prompts are answered one at a time",
            type(module).__name__,
        )
    setattr(module, _ANSWERS_ALONE, alone)
    return alone
