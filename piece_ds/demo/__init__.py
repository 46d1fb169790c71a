"""The embedded default: a small model and a small task stream that the project makes itself.

It exists so that a newcomer sees learning and forgetting within minutes, with no network and no data set. Everything
is derived from a seed and from the Python installation, and it is written as ordinary files (a transformers folder,
JSON rows), so that the launch scripts treat it exactly like a real model with real data.
"""

from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.write import EmbeddedPaths, write_embedded

__all__ = ["EmbeddedPaths", "EmbeddedRecipe", "write_embedded"]
