"""A stand-in for a missing tokenizer, for rows that are token ids already. Its text is the numbers themselves."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Names of any tokenizer's files. If none is there, transformers gives some tokenizer classes an empty vocabulary.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken*", "*.tokenizer")


def has_tokenizer_files(folder: Path) -> bool:
    """Return whether a model folder holds any file of a tokenizer."""
    return any(True for kind in _TOKENIZER_FILES for _ in folder.glob(kind))


class TokenIds(PreTrainedTokenizerFast):
    """Tokenizer that writes token ids as numbers separated by spaces. It is never saved: the model has no tokenizer."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return ()


def token_ids_tokenizer(config: Any) -> TokenIds:
    """Return the stand-in for a model with this configuration.

    EOS and padding are the model's own if its configuration names them. Otherwise the last id is EOS and the first id
    is padding, which is masked.
    """
    text = config.get_text_config()
    vocabulary = {str(token): token for token in range(text.vocab_size)}

    def named(value: Any, otherwise: int) -> str:
        first = value[0] if isinstance(value, list) and value else value
        return str(first if isinstance(first, int) and 0 <= first < text.vocab_size else otherwise)

    numbers = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbers.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins with spaces
    eos = named(getattr(text, "eos_token_id", None), text.vocab_size - 1)
    pad = named(getattr(text, "pad_token_id", None), 0)
    return TokenIds(tokenizer_object=numbers, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False)
