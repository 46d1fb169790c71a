"""The task stream: data files become checked rows, rows become token ids, and tasks come one after another."""

from piece_ds.stream.collate import Collator, pad_id
from piece_ds.stream.encode import Encoder, split_prompt
from piece_ds.stream.files import load_rows
from piece_ds.stream.general import load_general
from piece_ds.stream.image_collate import ImageCollator, check_processor, make_collator
from piece_ds.stream.micro_batches import MicroBatches
from piece_ds.stream.processor import Processing, load_processor, tokenizer_of
from piece_ds.stream.tasks import Task, load_task_stream
from piece_ds.stream.tokenize import tokenize_rows

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
