"""The embedded example with images: drawings, questions about them, and two small vision-language models.

Everything is made from a seed and written as ordinary files, like the rest of the embedded example.
"""

from piece_ds.demo.vision.models import FAMILIES, write_model
from piece_ds.demo.vision.tasks import BASE, TASKS, words, write_task

__all__ = ["BASE", "FAMILIES", "TASKS", "words", "write_model", "write_task"]
