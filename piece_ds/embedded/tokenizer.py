"""A byte-level tokenizer: every text is representable, nothing has to be learned or downloaded.

It is a byte-pair tokenizer with no merges, hence a standard fast tokenizer that AutoTokenizer loads from its folder.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
# 3 special tokens, then the 256 bytes in the order of their printable stand-ins.
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def make_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose tokens are single bytes, with padding and truncation on the left.

    No token is added around a text: whoever builds rows decides where BOS and EOS stand.

    Args:
        model_max_length: longest sequence of the model it is made for, in tokens.
    Returns:
        A fast tokenizer of VOCAB_SIZE ids; ids 0, 1, 2 are pad, bos, eos.
    """
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        truncation_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
