"""Evaluation mode that leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() and no_grad inside; afterwards every submodule is in the mode it was in, also after an error.

    A plain model.train() would switch on the dropout of a submodule that its user had put in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
