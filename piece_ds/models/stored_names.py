"""Say under which names, and in which parts, a checkpoint's files hold a model's parameters.

transformers changes names while it loads, and stacks the experts of a layer into one parameter. Its own conversion,
inverted, says what the files hold. It is run on the parameters themselves and cuts views, so no weight is read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint that holds some elements of a parameter.

    Element (i, j, ...) of the tensor is the parameter's element offset + i * strides[0] + j * strides[1] + ...

    Attributes:
        parameter: its name in named_parameters().
        shape: of the tensor.
        offset: flat position of the tensor's first element in the parameter.
        strides: of the tensor's dimensions, in elements of the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def is_run(self) -> bool:
        """Whether the elements lie side by side in the parameter, in the tensor's own order."""
        sizes = [prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        return all(own == run or n == 1 for own, run, n in zip(self.strides, sizes, self.shape, strict=True))

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find elements of the parameter in the tensor.

        Args:
            index: ascending flat positions in the parameter, int64.
        Returns:
            Places in index of the elements that the tensor holds, and their flat positions in the tensor.
        """
        # Only what lies between the tensor's first and last element is looked at.
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        low, high = torch.searchsorted(index, torch.tensor([self.offset, last + 1])).tolist()
        rest = index[low:high] - self.offset
        inside, position = torch.ones_like(rest, dtype=torch.bool), torch.zeros_like(rest)
        # From the widest stride down, as digits of a number. A narrower view leaves digits that are too large.
        sizes = {d: prod(self.shape[d + 1 :]) for d in range(len(self.shape)) if self.shape[d] > 1}
        for d in sorted(sizes, key=lambda d: -self.strides[d]):
            digit = rest // self.strides[d]
            inside &= digit < self.shape[d]
            position += digit * sizes[d]
            rest = rest % self.strides[d]
        places = (inside & (rest == 0)).nonzero().view(-1)
        return places + low, position[places]

    def positions(self, start: int, stop: int) -> Tensor:
        """Return the flat positions in the parameter (int64) of elements [start, stop) of the tensor."""
        rest = torch.arange(start, stop)
        found = torch.full_like(rest, self.offset)
        for d, stride in enumerate(self.strides):
            size = prod(self.shape[d + 1 :])
            found += rest // size * stride
            rest = rest % size
        return found

    def of(self, whole: Tensor) -> Tensor:
        """Return the tensor's elements in the whole parameter (1-D, contiguous), in the tensor's shape; a view."""
        return whole.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class StoredNames:
    """What files may call a model's parameters.

    Attributes:
        whole: every name of a whole parameter -> its name in named_parameters().
        parts: every name of a part of a parameter -> the part.
    """

    whole: Mapping[str, str]
    parts: Mapping[str, Part]


def stored_names(model: nn.Module) -> StoredNames:
    """Return every name that a checkpoint may give a parameter or a part of one.

    A whole parameter has several names in two cases: tied weights, which a checkpoint may hold under either name or
    both, and weights that transformers renames while loading (GPT-NeoX's embed_out). Experts that it stacks have one
    name, and each of their parts another. What it puts together in a way that is no view (interleaved rows, sums) has
    no names here.

    Args:
        model: of transformers; may be on the meta device.
    """
    # Tied weights are one object under several names.
    parameter_of = {id(param): name for name, param in model.named_parameters()}
    stored: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    with torch.no_grad(), _Views():
        stored += revert_weight_conversion(model, dict(model.state_dict(keep_vars=True))).items()
    whole = {name: parameter_of[id(tensor)] for name, tensor in stored if id(tensor) in parameter_of}
    parts = dict(_parts(stored, parameter_of))
    return StoredNames(whole, parts)


def _parts(stored: list[tuple[str, Tensor]], parameter_of: dict[int, str]) -> Iterator[tuple[str, Part]]:
    for name, tensor in stored:
        parameter = parameter_of.get(id(tensor._base))
        # A stride of 0 would be one element several times.
        if parameter is not None and tensor.numel() and all(tensor.stride()):
            yield name, Part(parameter, tuple(tensor.shape), tensor.storage_offset(), tensor.stride())


class _Views(TorchFunctionMode):
    """Let contiguous() return its tensor, so that what conversions cut out of a parameter stays a view of it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
