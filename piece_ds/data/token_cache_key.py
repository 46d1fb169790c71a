"""What decides the token ids of a data file, as one hash: its bytes, the tokenizer, the settings and the code."""

import hashlib
import json
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from piece_ds.data.files import Source
from piece_ds.data.rows import TOKENS
from piece_ds.data.tokenize import Encoder

# Modules of this folder that read, check and encode rows of text.
_CODE = (
    *("chat", "conversations", "encoded_file", "files", "formats", "readers", "rows", "token_cache", "tokenize"),
    *("token_cache_key", "template_limits"),
)
_PACKAGES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
# A template may write today's date (Llama 3's does). It then says other things tomorrow.
_CLOCK = "strftime_now"


def key_of(source: Source, digest: str, encoder: Encoder, *, limit: int | None, columns: dict[str, str]) -> str | None:
    """Return the name of a source's entry in the cache; None if what its tokenizer does cannot be known by a hash.

    Args:
        digest: of the source's content.
        source, encoder, limit, columns: as in token_cache.encode_once().
    """
    facts: dict[str, Any] = {
        "content": digest,
        "features": str(source.features),
        "columns": columns,
        "limit": limit,
        "code": _digest_of_code(),
    }

    # Rows of token ids are used as they are, whatever the tokenizer.
    if source.format.kind != TOKENS:
        tokenizer = _digest_of_tokenizer(encoder.tokenizer)
        if tokenizer is None:
            return None
        facts["tokenizer"] = tokenizer
        facts["encoder"] = [encoder.cutoff, encoder.chat_template, encoder.conversations]
        facts["day"] = date.today().isoformat() if _CLOCK in str(encoder.tokenizer.chat_template) else None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of all that a tokenizer says of a text; None unless it is a fast one of transformers' own.

    A slow tokenizer, or one whose code came with the model, may do what no file of it tells.
    """
    if not (tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")):
        return None
    # A call sets the backend's truncation and padding, which are part of its text.
    tokenizer("", truncation=False, verbose=False)
    facts = {
        "class": type(tokenizer).__qualname__,
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _digest_of_code() -> str:
    """Return a hash of the code that encodes rows, and of the versions of the packages that it uses."""
    digest = hashlib.sha256(json.dumps({name: version(name) for name in _PACKAGES}).encode())
    for name in _CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()
