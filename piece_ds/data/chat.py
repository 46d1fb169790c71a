"""Conversations as token ids, with loss on the assistant's turns only.

The ids are those of transformers' apply_chat_template(). A template may mark what the assistant generates ({%
generation %}); then those tokens give loss. Otherwise the conversation is rendered turn by turn. A turn begins where
the template's generation prompt ends, and ends where the conversation up to and including it ends.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from piece_ds.data.conversations import Messages
from piece_ds.data.rows import IGNORED_LABEL, has_counted_label
from piece_ds.data.template_limits import rendered
from piece_ds.runtime.errors import UserError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: a fast tokenizer; offsets of tokens are needed.
        source: text of the template; None means the tokenizer's own.
    Raises:
        UserError: the tokenizer is not a fast one.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError("chat templates need a fast tokenizer (tokenizer.json); convert the model's tokenizer")

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself says which tokens the assistant generates."""
        # A tokenizer may have several templates by name.
        own = self.tokenizer.chat_template
        template = self.source or (own.get("default", "") if isinstance(own, dict) else own or "")
        return _GENERATION.search(template) is not None

    def text(self, messages: Messages, where: str, generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Args:
            messages: turns of role and content.
            where: file and row, for the message.
            generation_prompt: end with what begins the assistant's next turn.
        Raises:
            UserError: the template is broken, needs a variable, refuses the conversation, or has no end.
        """

        def render() -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=generation_prompt
            )
            text.encode()  # half of a surrogate pair is no text to a tokenizer
            return text

        return rendered(render, where)

    def prompt_ids(self, messages: Messages, where: str) -> list[int]:
        """Return the token ids that come before the assistant's next turn."""
        return self._encoded(self.text(messages, where, generation_prompt=True))["input_ids"]

    def encode(self, messages: Messages, where: str, num_context: int = 0) -> dict[str, list[int]]:
        """Return input_ids and labels of a conversation; labels are IGNORED_LABEL outside the assistant's turns.

        Args:
            messages: turns of role and content.
            where: file and row, for messages.
            num_context: turns at the beginning that give no loss.
        Raises:
            UserError: the template fails, drops an answer, or leaves no token of an assistant's turn to learn.
        """
        text = self.text(messages, where)
        _require_all_said(messages, text, self.tokenizer, where)

        # Find the assistant's characters, then the tokens that hold any of them.
        encoding = self._encoded(text)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        spans = self._marked(messages, where) if self.marks_generation else self._turns(messages, text, where)
        counted = _covered(offsets, spans)

        # Leave out turns that only serve as context. The generation prompt behind them is still context.
        if num_context:
            begin = _common_length(self.text(messages[:num_context], where, generation_prompt=True), text)
            counted = [is_counted and stop > begin for is_counted, (_, stop) in zip(counted, offsets, strict=True)]

        # What is left is learned.
        labels = [token if is_counted else IGNORED_LABEL for token, is_counted in zip(ids, counted, strict=True)]
        if not has_counted_label(labels):
            raise UserError(f"{where}: the chat template leaves no token of the assistant's turns to learn")
        return {"input_ids": ids, "labels": labels}

    def _encoded(self, text: str) -> dict[str, Any]:
        # The template brings the special tokens, as in apply_chat_template(tokenize=True).
        encoding: dict[str, Any] = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoding

    def _marked(self, messages: Messages, where: str) -> list[Span]:
        """Return the spans of characters that the template marks as generated.

        transformers' own mask of tokens is not used: it misses the last tokens of a turn that ends inside a character
        of several tokens.
        """

        def render() -> list[Span]:
            _, marked = render_jinja_template(
                [messages],
                chat_template=self.tokenizer.get_chat_template(self.source),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            spans: list[Span] = marked[0]
            return spans

        return rendered(render, where)

    def _turns(self, messages: Messages, text: str, where: str) -> list[Span]:
        """Return the spans of characters that are the assistant's turns, each with what ends it."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = len(self._prefix(messages[:index], text, where, index))
            until = self.text(messages[: index + 1], where)
            ends = (until, until.removesuffix(self.tokenizer.eos_token or ""))  # some end a whole conversation with EOS
            until = next((end for end in ends if text.startswith(end)), ends[1])
            if text.startswith(until):
                if index == len(messages) - 1:
                    self._require_end(messages, text[:begin], until, where)
                spans.append((begin, len(until)))
                continue
            # The template writes a last turn differently from an earlier one (say, with empty thoughts before it). Find
            # the content itself, and after it what the shorter conversation ends with.
            content = _answer(message)
            tail = until.rpartition(content)[2]
            stop = text.find(content, begin) + len(content) + len(tail)
            if not text[begin:].lstrip().startswith(content) or text[stop - len(tail) : stop] != tail:
                raise _not_by_turns(where, index)
            spans.append((begin, stop))
        return spans

    def _require_end(self, messages: Messages, before: str, whole: str, where: str) -> None:
        """Raise UserError if what follows the last answer is the beginning of another one, which nobody asked for.

        Such a template writes its generation prompt whether it is asked for or not. The prompt would be learned.

        Args:
            messages: the conversation.
            before, whole: its text up to its last turn, and all of it.
            where: file and row, for the message.
        """
        asked = self.text(messages[:-1], where, generation_prompt=True) if len(messages) > 1 else None
        if asked is None or asked != self.text(messages[:-1], where):
            return
        try:
            longer = self.text([*messages, {"role": "user", "content": "and"}], where)
        except UserError:  # a template may refuse turns in this order
            return
        left_over = whole[_common_length(whole, longer) :].removesuffix(self.tokenizer.eos_token or "").strip()
        if left_over and before.strip().endswith(left_over):
            raise UserError(
                f"{where}: the chat template ends a conversation with what begins another answer ({left_over[:40]!r}), "
                "asked or not, which would be learned; mend it with {% if add_generation_prompt %}"
            )

    def _prefix(self, before: Messages, text: str, where: str, index: int) -> str:
        """Return the text before an assistant's turn: what the model is given when it is to write that turn."""
        if not before:
            return ""  # its turn begins the conversation
        without, prompt = (self.text(before, where, asked) for asked in (False, True))
        if text.startswith(prompt):
            return prompt
        if text.startswith(without):  # the prompt may open thoughts that the row closes at once: stop where they differ
            return text[: _common_length(prompt, text)]
        raise _not_by_turns(where, index)


def _require_all_said(messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UserError if a rendered conversation lacks what a turn says, or has its first or last token twice."""
    squeezed = "".join(text.split())  # templates may trim, and fold blanks
    for index, message in enumerate(messages, start=1):
        # Templates for images ignore plain text, some ignore the system's turn: such a row would teach something else.
        if "".join(_answer(message).split()) not in squeezed:
            raise UserError(
                f"{where}: the chat template leaves out what turn {index} says, the {message['role']}'s (one for "
                "images may expect parts in place of text); use a template for text, or write it into another turn"
            )
        for token in {tokenizer.bos_token, tokenizer.eos_token} - {None}:
            if token in message["content"] and token * 2 in text:
                raise UserError(
                    f"{where}: turn {index} holds {token!r}, which the chat template writes too; take it out"
                )


def _answer(message: dict[str, str]) -> str:
    """Return what an assistant says, without the thoughts before it. Templates drop the thoughts of earlier turns."""
    return message["content"].rpartition("</think>")[2].strip()


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return, for each token, whether any span holds a character of it."""
    return [any(start < stop_of and stop > start_of for start_of, stop_of in spans) for start, stop in offsets]


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _not_by_turns(where: str, index: int) -> UserError:
    return UserError(
        f"{where}: the chat template rewrites what stands before or in turn {index + 1} once later turns follow, so "
        "its tokens cannot be told; give each answer a row of its own, or mark {% generation %} in the template"
    )
