"""The task stream: data files become checked rows, rows become token ids, and tasks follow one another."""

from piece_ds.data.collate import Collator, MicroBatches, pad_id
from piece_ds.data.files import load_rows
from piece_ds.data.general_rows import load_general
from piece_ds.data.image_collate import ImageCollator, check_processor, make_collator
from piece_ds.data.tasks import Task, load_task_stream
from piece_ds.data.tokenize import Encoder, split_prompt, tokenize_rows
from piece_ds.models.processor import Processing, load_processor, tokenizer_of

__all__ = [
    "Collator",
    "Encoder",
    "ImageCollator",
    "MicroBatches",
    "Processing",
    "Task",
    "check_processor",
    "load_general",
    "load_processor",
    "load_rows",
    "load_task_stream",
    "make_collator",
    "pad_id",
    "split_prompt",
    "tokenize_rows",
    "tokenizer_of",
]
