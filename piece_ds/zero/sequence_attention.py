"""Let attention exchange heads for tokens among the ranks that share rows, while a model trains and only then.

DeepSpeed's register_with_transformers() does so for a whole process and for good: a second engine would exchange twice,
its groups cannot be made again, and the mask of padded prompts is dropped in evaluation too. A run has an engine for
each task and evaluates between them. So here the same exchange is put into transformers' table for one training, and
plain attention answers in evaluation mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import deepspeed
from torch import nn

from piece_ds.runtime.errors import UserError

# Names of transformers' attention functions that need no mask of four dimensions, which an exchange cannot cut.
WITHOUT_MASK = ("sdpa", "flash_attention_2", "flash_attention_3")

# Whether every rank's rows are whole and its own, although their model is in training mode.
_HAS_WHOLE_ROWS: ContextVar[bool] = ContextVar("has_whole_rows", default=False)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside exchanging_attention(), let the model take whole rows of this rank's own."""
    before = _HAS_WHOLE_ROWS.set(True)
    try:
        yield
    finally:
        _HAS_WHOLE_ROWS.reset(before)


def sequence_groups(size: int) -> Any:
    """Return DeepSpeed's groups of `size` consecutive ranks that share rows. A collective at the first call.

    Raises:
        UserError: this process has groups of another size already.
    """
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as groups

    # DeepSpeed makes them once in a process.
    try:
        groups.get_sequence_parallel_group()
    except AssertionError:
        groups.initialize_sequence_parallel(size)
    if groups.get_sequence_parallel_world_size() != size:
        raise UserError(
            f"sequence parallelism over {size} ranks: this process has groups of "
            f"{groups.get_sequence_parallel_world_size()} already, and DeepSpeed makes them once"
        )
    return groups


@contextmanager
def exchanging_attention(model: nn.Module, size: int, num_rows: int) -> Iterator[None]:
    """Inside, let the model's attention in training mode take ranges of rows. A collective.

    Args:
        model: of transformers.
        size: ranks that share a row.
        num_rows: rows of every micro-batch in training mode.
    Raises:
        UserError: the attention that the model uses needs a mask, or the model's heads do not divide.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config
    name, text = config._attn_implementation, config.get_text_config()
    if name not in WITHOUT_MASK:
        raise UserError(
            f"sequence parallelism with attention {name!r}: it needs the mask of whole rows; use --attn_implementation "
            f"{' or '.join(WITHOUT_MASK)}"
        )

    # DeepSpeed's exchange around the plain function.
    plain = ALL_ATTENTION_FUNCTIONS[name]
    num_heads = text.num_attention_heads
    try:
        exchange = UlyssesSPAttentionHF(
            attn=plain,
            batch_size=num_rows,
            attn_head_count=num_heads,
            attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
            kv_head_count=text.num_key_value_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=sequence_groups(size).get_sequence_parallel_group(),
            seq_length_is_variable=True,
        )
    except ValueError as error:
        raise UserError(f"sequence parallelism: {error}") from error
    exchange.core_attn_implementation = name

    def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        if not module.training or _HAS_WHOLE_ROWS.get():
            return plain(module, query, key, value, mask, *args, **kwargs)
        if kwargs.get("position_ids") is None:
            raise UserError(
                f"sequence parallelism: {type(module).__name__} does not hand position_ids to its attention, by which "
                "ranks know where their tokens belong; use --sequence_parallel_size 1"
            )
        # The mask is that of a range. Rows are padded on the right, so that no token sees padding.
        return exchange(module, query, key, value, None, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = plain


@contextmanager
def sharing_engines(size: int) -> Iterator[None]:
    """Inside, deepspeed.initialize() makes engines whose ranks share rows: accelerate has no argument for that."""
    plain = deepspeed.initialize
    deepspeed.initialize = partial(_initialize, plain, size)
    try:
        yield
    finally:
        deepspeed.initialize = plain


def _initialize(initialize: Any, size: int, **options: Any) -> Any:
    # DeepSpeed counts a step's rows anew: it has fewer micro-batches at a time, of more ranks each.
    config = {key: value for key, value in options["config_params"].items() if key != "train_batch_size"}
    return initialize(**{**options, "config_params": config, "mpu": sequence_groups(size)})
