"""Where Python would wait for a GPU, counted on CPU tensors.

A GPU works behind the host's back until somebody reads a number, takes a result whose length depends on numbers, or
moves memory in a way that returns when it is done. On the CPU the same calls are made, so they can be counted.
"""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Methods that read a tensor's numbers, whatever they are called through.
READS = ("item", "tolist", "cpu", "__int__", "__float__", "__bool__", "__index__", "__contains__")
# Operators whose result has a length that only the device knows.
UNKNOWN_LENGTH = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
    "piece_ds::select_above",
    "piece_ds::mask_to_index",
}


class HostWaits(TorchDispatchMode):
    """While it is entered, notes every place where the host would wait.

    Attributes:
        places: 'what: file:line' of each wait, outermost call first; a wait inside of another one is the same wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._inside = False
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "HostWaits":
        for name in READS:
            self._replace(torch.Tensor, name, lambda *_, **__: True)
        self._replace(torch.Tensor, "to", _blocks)
        self._replace(torch, "tensor", lambda *_, device=None, **__: device is not None)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for owner, name, original in reversed(self._saved):
            setattr(owner, name, original)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        by_condition = name == "aten::index.Tensor" or name == "aten::index"
        if name in UNKNOWN_LENGTH or (by_condition and any(_is_condition(i) for i in args[1])):
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _replace(self, owner: Any, name: str, waits: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not waits(*args, **kwargs):
                return original(*args, **kwargs)
            self._note(name)
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        self._saved.append((owner, name, original))
        setattr(owner, name, noted)

    def _note(self, what: str) -> None:
        if not self._inside:
            frames = [f for f in traceback.extract_stack() if "piece_ds/" in f.filename or "tests/unit" in f.filename]
            self.places.append(f"{what}: {frames[-1].filename}:{frames[-1].lineno}")


def _blocks(_: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether this is a move to a device that returns only when it is done."""
    device = kwargs.get("device", args[0] if args else None)
    return isinstance(device, (str, torch.device)) and not kwargs.get("non_blocking", False)


def _is_condition(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool
