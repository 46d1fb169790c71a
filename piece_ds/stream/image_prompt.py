"""A prompt with its image in the processor's chat template: the same text in training and in generation."""

from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin

from piece_ds.errors import UserError


@dataclass(frozen=True)
class ImagePrompt:
    """Puts a question, and an image before it, into the user's turn.

    Attributes:
        processor: of a model that reads images, with a chat template.
    """

    processor: ProcessorMixin

    def __post_init__(self) -> None:
        if not self.processor.chat_template:
            raise UserError("the model's processor has no chat template, so where the image stands in a prompt is not "
                            "known; add a chat_template.jinja to the model's files")  # fmt: skip

    def text(self, prompt: str, with_image: bool) -> str:
        """The turn as text, ending where the answer begins; the image is one token, which the processor unfolds."""
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if with_image:
            content.insert(0, {"type": "image"})
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        """Token ids of text() with the image still one token."""
        return self.processor.tokenizer(text, **self.options(text))["input_ids"]

    def options(self, text: str) -> dict[str, bool]:
        """For the tokenizer: what begins a sequence is added unless the template has done it."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}
