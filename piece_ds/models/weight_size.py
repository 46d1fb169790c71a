"""How large a model's weights are: what a learning rate has to be in proportion to.

AdamW steps by the rate, whatever a weight's size. The matrices of SmolLM2-135M have a root mean square of 0.19, those
of Gemma-3-270M one of 0.035, near the 0.02 that most models begin with. Rates that teach the former destroy the latter.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from piece_ds.models.fingerprint import files_folder
from piece_ds.state.partition import is_partitioned

# A sample is enough: matrices of one model are alike, and a rate has two digits.
NUM_MATRICES, NUM_ROWS = 64, 32
_FLOATS = {"F64", "F32", "F16", "BF16"}

Matrix = tuple[str, int, Callable[[], Tensor]]  # name, number of elements, some of its rows


def vocabulary_of(model_or_config: Any) -> int | None:
    """Return the number of words of a model or a configuration of transformers; None if it says none."""
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def size_of_files(source: str, vocabulary: int | None) -> float | None:
    """Return the root mean square of a model's matrices, from a sample of its safetensors files.

    Embeddings and the head are not counted: they are sized by other rules, and embeddings are never selected.

    Args:
        source: a model folder, or a Hub id whose files are in the Hub's cache.
        vocabulary: words of the model, by which these are known; None counts all.
    Returns:
        None if there are no such files or they hold no matrices of floats.
    Cost: reads 32 rows of 64 matrices at most.
    """
    folder = files_folder(source)
    if folder is None:
        return None
    try:
        return _size_of(sorted(_in_files(sorted(folder.glob("*.safetensors")), vocabulary), key=lambda one: one[0]))
    except (OSError, SafetensorError):  # what is wrong with the files is said by whoever loads them
        return None


def size_of_model(model: nn.Module, vocabulary: int | None) -> float | None:
    """Return the same of a model in memory; None if its parameters are partitioned (ZeRO-3)."""
    named = dict(model.named_parameters())
    if is_partitioned(*named.values()):
        return None
    return _size_of(
        [
            (name, values.numel(), partial(_middle, values.detach(), tuple(values.shape)))
            for name, values in sorted(named.items())
            if values.is_floating_point() and _is_matrix(tuple(values.shape), vocabulary)
        ]
    )


def _in_files(paths: list[Any], vocabulary: int | None) -> Iterator[Matrix]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                if part.get_dtype() in _FLOATS and _is_matrix(shape, vocabulary):
                    yield name, torch.Size(shape).numel(), partial(_rows_of, path, name, shape)


def _rows_of(path: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    with safe_open(path, framework="pt") as file:
        rows: Tensor = _middle(file.get_slice(name), shape)
        return rows


def _middle(values: Any, shape: tuple[int, ...]) -> Any:
    """Return NUM_ROWS rows from the middle of a matrix, or of the first of a stack of them."""
    start = max(0, (shape[-2] - NUM_ROWS) // 2)
    rows = slice(start, start + NUM_ROWS)
    return values[:1, rows] if len(shape) == 3 else values[rows]


def _is_matrix(shape: tuple[int, ...], vocabulary: int | None) -> bool:
    """Return whether a shape is that of a linear layer, or of a stack of them (experts)."""
    return len(shape) in (2, 3) and min(shape[-2:]) > 1 and vocabulary not in shape


def _size_of(matrices: list[Matrix]) -> float | None:
    """Return the root mean square, each matrix with its number of elements."""
    if not matrices:
        return None
    chosen = [matrices[i * len(matrices) // NUM_MATRICES] for i in range(NUM_MATRICES)]
    if len(matrices) <= NUM_MATRICES:
        chosen = matrices
    total = sum(numel * float(rows().double().square().mean()) for _, numel, rows in chosen)
    found = sqrt(total / sum(numel for _, numel, _ in chosen))
    return found if 0 < found < float("inf") else None
