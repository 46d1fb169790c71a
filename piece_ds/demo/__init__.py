"""The embedded default: a small model and a small task stream that the project makes itself.

It lets a newcomer see learning and forgetting within minutes, without a network or a data set. Everything is derived
from a seed and from the Python installation. It is written as ordinary files (a transformers folder, JSON rows), so the
launch scripts treat it exactly like a real model with real data.
"""

from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.write import EmbeddedPaths, write_embedded

__all__ = ["EmbeddedPaths", "EmbeddedRecipe", "write_embedded"]
