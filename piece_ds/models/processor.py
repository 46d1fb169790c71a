"""Tokenizers, and processors around a tokenizer for models that read images."""

import logging
from typing import Any, TypeAlias

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

logger = logging.getLogger(__name__)

Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def tokenizer_of(processing: Processing) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the one inside a processor."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def load_processor(source: str, config: Any, trust_remote_code: bool = False) -> ProcessorMixin:
    """Return the processor of a model that reads images.

    A processor's video part needs torchvision. Without torchvision only the image part is loaded, and model folders
    written from it describe only images.

    Args:
        source: a local folder or a Hub id.
        config: the model's.
        trust_remote_code: run code that comes with the processor.
    """
    known = PROCESSOR_MAPPING.get(type(config), None)
    if known is None or is_torchvision_available() or "video_processor" not in known.get_attributes():
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    logger.warning("torchvision is not installed: %s is loaded without its part for video", known.__name__)
    return images_only(known).from_pretrained(source)


def images_only(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor class like this one without its video part. It is saved under the same class name."""

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in processor.get_attributes() if "video" not in name]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(get_attributes)})
