"""What a file's checksum and a model's fingerprint are made of."""

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from piece_ds.state.partition import Layout


def model_fingerprint(layout: Layout) -> str:
    """sha256 of every parameter's name and shape, in order: equal for equal architectures, whatever the weights."""
    structure = [[info.name, list(info.shape)] for info in layout.parameters]
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes of CPU tensors, in name order."""
    return checksum_of(tensors, tensors.__getitem__)


def checksum_of(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """The same of tensors that read() gives one by one. Memory: one tensor."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
