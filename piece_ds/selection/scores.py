"""Yield the scores of this rank's elements, run by run, in the form that ops take.

Nothing is computed before its use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from piece_ds.selection.estimators import Estimator, Fragment
from piece_ds.state.partition import Layout, ParameterInfo, Partition
from piece_ds.state.statistics import GradientStats

CHUNK = 1 << 22  # computed scores alive at a time: 16 MiB

WeightReader = Callable[[str, int, int], Tensor]


class Scores(NamedTuple):
    """Scores as ops take them: |grad_sum| / sqrt(square_sum + lam), or square_sum itself if grad_sum is None."""

    grad_sum: Tensor | None
    square_sum: Tensor
    lam: float = 1.0

    def part(self, begin: int, end: int | None = None) -> "Scores":
        """Return views of elements [begin, end)."""
        grad_sum = None if self.grad_sum is None else self.grad_sum[begin:end]
        return Scores(grad_sum, self.square_sum[begin:end], self.lam)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.square_sum.numel()


@dataclass(frozen=True)
class Run:
    """Elements of one parameter on this rank.

    Attributes:
        name: of the parameter.
        group: the budget that its elements compete for.
        scores: of the elements.
        offset: where the first element lies in this rank's flat buffer (Layout.owned()).
        position: flat index in the whole parameter of each element (int64), or of the first one if they are
            consecutive.
    """

    name: str
    group: int
    scores: Scores
    offset: int
    position: Tensor | int

    def positions(self, element: Tensor) -> Tensor:
        """Return flat indices in the whole parameter (int64, CPU) of elements of the run."""
        found = element + self.position if isinstance(self.position, int) else self.position[element]
        return found.cpu()


Runs = Callable[[], Iterator[Run]]


@dataclass(frozen=True)
class ScoreSource:
    """Everything that a method's scores come from. Calling it yields the runs, in ascending order of offset.

    Attributes:
        layout: of the model.
        group_of: parameter name -> budget group; parameters without one have no scores.
        scorer: the method.
        stats, weight_of, lam, seed: what it may read.
        device: on which scores are wanted.
    """

    layout: Layout
    group_of: dict[str, int]
    scorer: Estimator
    stats: GradientStats | None
    weight_of: WeightReader | None
    device: torch.device
    lam: float
    seed: int

    def __call__(self) -> Iterator[Run]:
        parameter_index = {info.name: i for i, info in enumerate(self.layout.parameters)}
        for info, part, offset in self.layout.owned():
            if info.name in self.group_of:
                runs = self._sums if self.scorer.from_sums else self._computed
                yield from runs(info, part, offset, parameter_index[info.name])

    def spans(self) -> Iterator[Run]:
        """Yield the same scores in as few runs as possible, for readers that need no names.

        Each run costs a launch. Parameters of one group whose sums lie side by side become one run, under the first
        one's name.
        """
        if not self.scorer.from_sums:
            yield from self()
            return
        assert self.stats is not None

        # Join neighbours of one group.
        pieces: list[tuple[str, int, int, int]] = []  # name, group, first element, past the last
        for info, part, offset in self.layout.owned():
            group = self.group_of.get(info.name)
            if group is None or part.numel == 0:
                continue
            if pieces and pieces[-1][1] == group and pieces[-1][3] == offset:
                name, _, begin, _ = pieces.pop()
                pieces.append((name, group, begin, offset + part.numel))
            else:
                pieces.append((info.name, group, offset, offset + part.numel))
        for name, group, begin, end in pieces:
            grad_sum, square_sum = self.stats.fragment(begin, end - begin)
            yield Run(name, group, self._scores(grad_sum, square_sum), begin, begin)

    def _scores(self, grad_sum: Tensor | None, square_sum: Tensor) -> Scores:
        return Scores(grad_sum if self.scorer.needs_sum else None, square_sum, self.lam)

    def _sums(self, info: ParameterInfo, part: Partition, offset: int, _: int) -> Iterator[Run]:
        assert self.stats is not None
        grad_sum, square_sum = self.stats.fragment(offset, part.numel)
        yield Run(info.name, self.group_of[info.name], self._scores(grad_sum, square_sum), offset, part.start)

    def _computed(self, info: ParameterInfo, part: Partition, offset: int, parameter_index: int) -> Iterator[Run]:
        # A part at a time, so that computed scores take little memory.
        for begin in range(0, part.numel, CHUNK):
            numel, start = min(CHUNK, part.numel - begin), part.start + begin
            grad_sum, square_sum = self.stats.fragment(offset + begin, numel) if self.stats else (None, None)
            fragment = Fragment(
                parameter_index=parameter_index,
                start=start,
                numel=numel,
                device=self.device,
                square_sum=square_sum,
                grad_sum=grad_sum,
                weight=partial(self._weight, info.name, start, numel),
                lam=self.lam,
                seed=self.seed,
            )
            yield Run(
                info.name,
                self.group_of[info.name],
                Scores(None, self.scorer.score(fragment)),
                offset + begin,
                start,
            )

    def _weight(self, name: str, start: int, numel: int) -> Tensor:
        if self.weight_of is None:
            raise ValueError(f"this method scores weights, but no reader of {name!r} was given: pass weight_of")
        return self.weight_of(name, start, numel).to(torch.float32)
