"""General text that the base model writes itself before it learns anything: rows for statistics, replay and KL.

What a model writes from its first token is a sample of what it knows. So every user has general text, at the cost of a
few hundred rows generated once per base model. They are kept in the user's cache.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from piece_ds.data.general_text import rows_of_tokens
from piece_ds.evaluation.generate import Decoding, generate_texts
from piece_ds.runtime.cache import cache_folder, made
from piece_ds.runtime.distributed import all_gather_objects, is_main
from piece_ds.runtime.files import write_text

logger = logging.getLogger(__name__)

# Shorter rows carry no text: the model ended at once.
MIN_TOKENS = 8


@dataclass(frozen=True)
class SelfWriting:
    """How the text is written.

    Attributes:
        num_rows: rows begun. Rows shorter than MIN_TOKENS are dropped.
        num_tokens: most tokens of a row, its first included.
        seed: of the draw. Any number of ranks writes the same text for the same batch size.
        batch_size: rows written together.
    """

    num_rows: int = 128
    num_tokens: int = 64
    seed: int = 0
    batch_size: int = 64


def write_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, writing: SelfWriting, device: torch.device | str
) -> datasets.Dataset:
    """Return what model writes after its first token, drawn from its own distribution. A collective.

    The temperature is 1 and no token is excluded.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one.
        tokenizer: the model's. Its BOS begins each row, or EOS if it has none.
        writing: how much, and the seed.
        device: where the batches go.
    Returns:
        Dataset of columns input_ids and labels, the same on every rank; loss on every token but the first.
    Cost: num_rows / (batch_size * ranks) rounds of num_tokens passes of batch_size tokens. Measured: 128 rows of 64
        tokens by 135 M parameters in bf16 on one core, 21 s.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The same token begins the rows of training.
    first = eos if bos is None else bos
    written = generate_texts(
        model,
        [[first]] * writing.num_rows,
        tokenizer,
        writing.num_tokens - 1,
        writing.batch_size,
        device,
        Decoding(sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=writing.seed),
        description="writing general text",
    )
    return rows_of_tokens([[first, *ids] for ids in written.token_ids if 1 + len(ids) >= MIN_TOKENS])


def self_written_file(
    digest: str,
    open_model: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    writing: SelfWriting,
    device: torch.device | str,
) -> Path:
    """Return the file of the text that a base model wrote, in the user's cache. The first call writes it. A collective.

    Args:
        digest: of the base model's files, from models.fingerprint.model_digest().
        open_model: returns the base model. It is called on every rank, and only if the file is not there yet.
        tokenizer: as in write_rows().
        writing: as in write_rows().
        device: as in write_rows().
    Returns:
        A JSONL file of rows of input_ids and labels, which every flag for a data file accepts.
    Raises:
        CacheRefused: the cache cannot be written by this user.
    """
    path = self_written_path(digest, writing)
    if not all(all_gather_objects(path.is_file())):
        made(path.parent)  # before the minutes that writing takes
        if is_main():
            logger.warning("the base model writes %d rows of general text into %s", writing.num_rows, path)
        rows = write_rows(open_model(), tokenizer, writing, device)
        # Every rank writes the same file, whole: each machine may have a cache of its own.
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def self_written_path(digest: str, writing: SelfWriting) -> Path:
    """Return where the text of a base model is kept. Another model or other settings make another file."""
    key = hashlib.sha256(json.dumps([digest, asdict(writing)]).encode()).hexdigest()[:16]
    return cache_folder() / "general_text" / f"self-{key}.jsonl"
