"""Hold sums over micro-batches of a model's gradient and of its square, for the elements that this rank owns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from piece_ds.state.partition import Layout


@dataclass
class GradientStats:
    """Diagonal gradient statistics of one rank, fp32, laid out by Layout.owned().

    Attributes:
        layout: of the model, and of this rank's share.
        square_sum: sum over micro-batches of g * g, fp32, layout.num_owned elements.
        grad_sum: sum over micro-batches of g, same shape, or None if only squares were asked for.
        num_micro_batches: number of micro-batches in the sums, over all ranks.
        num_nonfinite: NaN and infinite gradient entries that counted as 0, over all ranks.
        first_nonfinite: (micro-batch, parameter name) of the first of them in this pass; None without one.
    """

    layout: Layout
    square_sum: Tensor
    grad_sum: Tensor | None
    num_micro_batches: int = 0
    num_nonfinite: int = 0
    first_nonfinite: tuple[int, str] | None = None

    def fragment(self, offset: int, numel: int) -> tuple[Tensor | None, Tensor]:
        """Return (grad_sum, square_sum) views of numel elements from offset of this rank's flat buffer."""
        part = slice(offset, offset + numel)
        return None if self.grad_sum is None else self.grad_sum[part], self.square_sum[part]


def empty_stats(layout: Layout, needs_sum: bool, device: torch.device | str) -> GradientStats:
    """Return zero statistics: 4 bytes per owned element for the squares, 4 more if needs_sum."""
    square_sum = torch.zeros(layout.num_owned, dtype=torch.float32, device=device)
    return GradientStats(layout, square_sum, torch.zeros_like(square_sum) if needs_sum else None)
