"""Say which rank owns which element of which parameter: the canonical layout of statistics, scores and masks.

It is ZeRO-3's layout, used at every stage and for every world size. A parameter of n elements over W ranks is sharded
into chunks of c = ceil(n / W), and rank r owns the flat range [r c, min((r + 1) c, n)). Parameters come in the order of
named_parameters(), so (parameter index, flat index) names a position whatever the world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

INT32_MAX = 2**31 - 1


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat positions in numel elements: int32, or int64 if that cannot count them."""
    return torch.int64 if numel > INT32_MAX else torch.int32


def is_partitioned(*params: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has partitioned any of these parameters. Then a rank holds only its chunk of them."""
    return any(hasattr(param, "ds_id") for param in params)


@dataclass(frozen=True)
class Partition:
    """The flat range [start, stop) of one parameter that one rank owns; empty if start == stop."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def partition_of(numel: int, owner: int, num_ranks: int) -> Partition:
    """Return the range that rank `owner` of `num_ranks` owns in a parameter of numel elements."""
    # Rounded up: the last ranks may own less, or nothing.
    chunk = -(-numel // num_ranks)
    return Partition(min(owner * chunk, numel), min((owner + 1) * chunk, numel))


@dataclass(frozen=True)
class ParameterInfo:
    """What selection needs to know of a parameter without holding it.

    Attributes:
        name, shape, numel: of the whole parameter.
        eligible: whether its elements may be selected.
        in_first: whether a matrix is stored as [in, out] (transformers' Conv1D), not as [out, in].
        rows: (first, past the last) row of the first dimension that may be selected; None means all of them.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    eligible: bool
    in_first: bool = False
    rows: tuple[int, int] | None = None

    @property
    def selectable(self) -> Partition:
        """The flat range of elements that may be selected, if the parameter is eligible."""
        if self.rows is None:
            return Partition(0, self.numel)
        width = self.numel // self.shape[0]
        return Partition(self.rows[0] * width, self.rows[1] * width)


def owned_range(info: ParameterInfo, owner: int, num_ranks: int) -> Partition:
    """Return the range of elements that may be selected and that rank `owner` of `num_ranks` owns."""
    whole, allowed = partition_of(info.numel, owner, num_ranks), info.selectable
    start = min(max(whole.start, allowed.start), whole.stop)
    return Partition(start, max(start, min(whole.stop, allowed.stop)))


@dataclass(frozen=True)
class Layout:
    """Every parameter of a model, once, in named_parameters() order, and this rank's share of the eligible ones.

    Attributes:
        parameters: all of them.
        rank: of this process.
        num_ranks: over which elements are sharded.
    """

    parameters: tuple[ParameterInfo, ...]
    rank: int
    num_ranks: int

    @property
    def total(self) -> int:
        """Number of elements of the model: every parameter counted once, embeddings and frozen ones included."""
        return sum(info.numel for info in self.parameters)

    @property
    def num_eligible(self) -> int:
        """Number of elements that may be selected, over all ranks."""
        return sum(info.selectable.numel for info in self.parameters if info.eligible)

    @property
    def num_owned(self) -> int:
        """Number of eligible elements that this rank owns: the length of a statistics buffer."""
        return sum(part.numel for _, part, _ in self.owned())

    def eligible(self) -> tuple[ParameterInfo, ...]:
        """Return the parameters whose elements, or some rows of them, may be selected."""
        return tuple(info for info in self.parameters if info.eligible)

    def partition(self, info: ParameterInfo) -> Partition:
        """Return this rank's range of one parameter."""
        return partition_of(info.numel, self.rank, self.num_ranks)

    def owned(self) -> Iterator[tuple[ParameterInfo, Partition, int]]:
        """Yield (parameter, range, offset of the range in this rank's flat buffer) for each eligible parameter.

        The range holds only what may be selected: of a parameter with some eligible rows, no other rows.
        """
        offset = 0
        for info in self.eligible():
            part = owned_range(info, self.rank, self.num_ranks)
            yield info, part, offset
            offset += part.numel

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, in order."""
        return {info.name: info.shape for info in self.parameters}
