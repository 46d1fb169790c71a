"""What the method means, written a second time in plain PyTorch and numpy for one process; nothing of piece_ds."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


def gradient_sums(
    model: nn.Module, batches: list[dict[str, Tensor]], embedding: str | None, loss_scale: float = 1.0
) -> tuple[Arrays, Arrays]:
    """(G, F): float64 sums over micro-batches of g and g^2 per eligible parameter, flat. Non-finite entries are 0."""
    sums: Arrays = {}
    squares: Arrays = {}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        (model(**batch).loss * loss_scale).backward()
        for name, param in model.named_parameters():
            if name == embedding or not param.requires_grad:
                continue
            grad = np.zeros(param.numel()) if param.grad is None else param.grad.double().numpy().reshape(-1)
            grad = np.where(np.isfinite(grad), grad, 0.0) / loss_scale
            sums[name] = sums.get(name, 0.0) + grad
            squares[name] = squares.get(name, 0.0) + grad * grad
    return sums, squares


def score(method: str, sums: Arrays, squares: Arrays, lam: float = 1.0) -> Arrays:
    """PIECE-F: F. PIECE-S: |G| / sqrt(F + lambda). In the arrays' own precision."""
    if method == "piece-f":
        return squares
    one = next(iter(squares.values())).dtype.type(lam)
    return {name: np.abs(sums[name]) / np.sqrt(squares[name] + one) for name in squares}


def top_k(scores: Arrays, k: int) -> set[tuple[str, int]]:
    """The k highest of all scores; ties to the smaller (parameter order, flat index): a stable descending sort."""
    names = list(scores)
    order = np.argsort(-np.concatenate([scores[name] for name in names]), kind="stable")[:k]
    starts = np.cumsum([0] + [scores[name].size for name in names])
    which = np.searchsorted(starts, order, side="right") - 1
    return {(names[p], int(i - starts[p])) for p, i in zip(which, order, strict=True)}


class SelectedAdamW:
    """AdamW on nothing but the selected entries of a model, which are copied out, stepped by torch, and copied back."""

    def __init__(
        self,
        model: nn.Module,
        index: dict[str, Tensor],
        lr: float,
        weight_decay: Callable[[str], float],
        clip: float,
        scale: dict[str, Tensor] | None = None,
    ) -> None:
        """scale: parameter -> a factor on the update of each of its elements (flat), decay left out of it."""
        self.model, self.index, self.clip, self.scale = model, index, clip, scale
        params = dict(model.named_parameters())
        self.values = {n: nn.Parameter(params[n].detach().float().view(-1)[i]) for n, i in index.items()}
        groups = [{"params": [value], "weight_decay": weight_decay(name)} for name, value in self.values.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)

    def step(self, batches: list[dict[str, Tensor]]) -> float:
        """One step on the mean loss over micro-batches; returns the norm of the masked gradient before clipping."""
        self.model.zero_grad(set_to_none=True)
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.values.items()}
        for batch in batches:
            self.model.zero_grad(set_to_none=True)
            self.model(**batch).loss.backward()
            for name, param in self.model.named_parameters():
                if name in sums and param.grad is not None:  # None: no token came to this expert
                    sums[name] += param.grad.double().view(-1)[self.index[name]] / len(batches)
        norm = torch.cat(list(sums.values())).norm().item()
        factor = min(1.0, self.clip / (norm + 1e-6))
        params = dict(self.model.named_parameters())
        for name, value in self.values.items():
            value.grad = (sums[name] * factor).float()
        before = {name: value.detach().clone() for name, value in self.values.items()}
        self.optimizer.step()
        if self.scale is not None:
            self._scale(before, self.scale)
        for name, value in self.values.items():
            param = params[name]
            param.data.view(-1)[self.index[name]] = value.detach().to(param.dtype)
        return norm

    def _scale(self, before: dict[str, Tensor], scale: dict[str, Tensor]) -> None:
        for group in self.optimizer.param_groups:
            for value in group["params"]:
                (name,) = (name for name, other in self.values.items() if other is value)
                start = before[name].double() * (1.0 - group["lr"] * group["weight_decay"])
                factor = scale[name][self.index[name]].double()
                value.data.copy_(start + factor * (value.detach().double() - start))


def step_factors(squares: Arrays) -> dict[str, Tensor]:
    """sqrt(d / (F + d)) per parameter, flat; d: the lower median of all, of those above 0 if it would be 0."""
    every = np.sort(np.concatenate(list(squares.values())))
    d = every[len(every) - 1 - len(every) // 2]
    if d == 0:
        every = every[every > 0]
        d = every[len(every) - 1 - len(every) // 2]
    return {name: torch.from_numpy(np.sqrt(d / (array + d))) for name, array in squares.items()}
