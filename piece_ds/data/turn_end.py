"""The token that a chat template ends an assistant's turn with: there an answer ends, whatever EOS is."""

from transformers import PreTrainedTokenizerBase

from piece_ds.data.chat import ChatTemplate
from piece_ds.runtime.errors import UserError

_ANSWER = "an answer"


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that stands behind an answer in the tokenizer's chat template.

    Returns:
        Its id; None if there is no template, it cannot render a plain answer, or no special token follows.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return None
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        tail = ChatTemplate(tokenizer).text(turns, "a plain answer").rpartition(_ANSWER)[2].lstrip()
    except UserError:
        return None
    first: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"][:1] if tail else []
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return first[0] if first and first[0] in special | set(tokenizer.all_special_ids) else None
