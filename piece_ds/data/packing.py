"""Micro-batches without padding: rows are laid end to end, and attention never crosses from one row to another.

transformers tells the rows apart by position ids that restart at 0, if neither an attention mask nor a cache is given.
It then blocks attention between rows (sdpa, eager and flash attention; sliding windows too). Layers that carry anything
else from token to token (state-space layers, convolutions, positions counted from a mask) would let rows see each
other. So packing is limited to the families that tests/unit/test_packing.py proves: loss and every gradient equal those
of the padded batch within rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithFlattening

from piece_ds.data.image_collate import make_collator
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.models.processor import Processing
from piece_ds.runtime.errors import UserError

# model_type, in transformers' configurations, of the families that are proven.
PACKS = frozenset(
    (
        *("apertus", "arcee", "bitnet", "cohere", "cohere2", "diffllama", "doge", "ernie4_5", "exaone4", "flex_olmo"),
        *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox"),
        *("granite", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "llama", "llama4_text", "ministral"),
        *("mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
    )
)
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class PackedCollator:
    """Lays the rows of a micro-batch end to end; a callable for DataLoader and Trainer, in place of Collator."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the model's inputs for rows.

        Args:
            rows: at least one mapping with input_ids and labels of equal length; other keys are ignored.
        Returns:
            input_ids, labels and position_ids, int64, (1, tokens of all rows), on the CPU. A row's first label is never
            counted: no token of the row comes before it. Also use_cache=False, since with a cache transformers would
            not look for rows.
        """
        flatten = DataCollatorWithFlattening(separator_id=IGNORED_LABEL, return_tensors="pt")
        lists = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows]
        return {**flatten(lists), "use_cache": False}


def training_collator(processing: Processing, packing: bool) -> Callable[[Any], Any]:
    """Return what makes batches for training and statistics. Evaluation always pads, even for packed training."""
    return PackedCollator() if packing else make_collator(processing)


def check_packing(config: Any, attention: str | None) -> None:
    """Raise UserError unless rows of a model can be packed.

    Args:
        config: the model's.
        attention: --attn_implementation; None means transformers' choice.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in PACKS:
        raise UserError(
            f"--packing is not proven for models of type {kind!r}: rows laid end to end might see each other there "
            "(state-space layers, positions counted from a mask, images); train without it"
        )
    if attention is not None and attention not in ATTENTION:
        raise UserError(f"--packing with --attn_implementation {attention} is not proven; use {' or '.join(ATTENTION)}")
