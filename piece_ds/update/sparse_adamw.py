"""SparseAdamW: compact mode for a training loop of one process, without DeepSpeed."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from piece_ds import ops
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.state.partition import is_partitioned
from piece_ds.update.gradients import GradientCollection
from piece_ds.update.step_scale import StepScale
from piece_ds.zero.scaled_update import scaled
from piece_ds.zero.weights import SelectedWeights


class SparseAdamW(torch.optim.Optimizer):
    """AdamW of a model's selected weights: fp32 values and moments for them, no gradient tensor for the others.

        optimizer = SparseAdamW(model, mask, lr=1e-4)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([optimizer.values], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    Attributes:
        values: fp32, the selected weights in order of (parameter, flat index). `values.grad` sums their gradients over
            the backward passes since zero_grad().
    """

    values: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        gradient: str = "auto",
        step_scale: StepScale | None = None,
    ) -> None:
        """Freeze the model for autograd and begin to collect gradients of the selected weights.

        Args:
            model: whole on this device; all its parameters are frozen for autograd until close().
            mask: of this model.
            lr, betas, eps, weight_decay: as in torch.optim.AdamW; decay acts only on selected weights.
            gradient: as in GradientCollection.
            step_scale: a factor on the update of each weight (general_step_scale()); it is not part of a state dict.
        Raises:
            UserError: there are several ranks, or the model is partitioned: attach() serves these.
        Cost: 16 bytes per selected weight for values, gradient and moments, 8 for its position.
        """
        # Check, and freeze the model.
        params = dict(model.named_parameters())
        if world_size() > 1 or is_partitioned(*params.values()):
            raise UserError("SparseAdamW expected one process and a whole model: use attach() with a DeepSpeed engine")
        self._trainable = [name for name, param in params.items() if param.requires_grad]
        self._model = model.requires_grad_(False)

        # The values and their gradient, one flat tensor each.
        self._weights = {name: SelectedWeights(params[name], index) for name, index in mask.whole().items()}
        parts = [weight.read(weight.param.detach()).float() for weight in self._weights.values()]
        self._sizes = [part.numel() for part in parts]
        self.values = nn.Parameter(torch.cat(parts))
        self.values.grad = torch.zeros_like(self.values)
        super().__init__([self.values], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        # What fills the gradient, and what each step writes.
        grads = zip(self._weights, self.values.grad.split(self._sizes), strict=True)
        self._collection = GradientCollection(model, self._weights, grads, gradient)
        self._batches = list(_batches(self._weights, self.values.device))
        self._written: dict[str, tuple[int, int]] = {}
        self._factor: Tensor | None = None
        if step_scale is not None:
            factors = step_scale.selected(mask)
            self._factor = torch.cat([factors[name] for name in self._weights]).to(self.values.device)

    def close(self) -> None:
        """Restore the model as it was found, with its trained weights."""
        self._collection.close()
        for name, param in self._model.named_parameters():
            param.requires_grad_(name in self._trainable)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the summed gradients. They stay allocated, since backward adds to them in place."""
        assert self.values.grad is not None
        self.values.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one AdamW step of the selected weights; nothing else of the model is written. Return closure's loss.

        After the first step, only weights whose rounded value changes are written. If other code has written a weight
        since, in place or by replacing its tensor, all values are written again. A write through `.data` is not
        noticed.
        """
        # The loss, if a closure gives it.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # First step: moments of zero, and a look at which weights had a gradient.
        assert self.values.grad is not None
        state, group = self.state[self.values], self.param_groups[0]
        if not state:
            zeros = torch.zeros_like(self.values)
            state.update(step=0, value=self.values.data, exp_avg=zeros, exp_avg_sq=zeros.clone())
            self._collection.check()
        state["step"] += 1

        # With factors, decay comes apart from the step.
        before, weight_decay = None, group["weight_decay"]
        if self._factor is not None:  # decay is not scaled: it comes first, by hand
            before = self.values.data.mul_(1.0 - float(group["lr"]) * weight_decay).clone()
            weight_decay = 0.0

        # One call for each dtype: it steps the values and writes the weights.
        flat: tuple[Tensor, ...] = (self.values.grad, self.values.data, state["exp_avg"], state["exp_avg_sq"])
        for batch in self._batches:
            stamps = {name: _stamp(self._weights[name].param) for name in batch.names}
            grad, value, exp_avg, exp_avg_sq = (tensor[batch.begin : batch.end] for tensor in flat)
            ops.sparse_adamw_list_(
                grad,
                value,
                exp_avg,
                exp_avg_sq,
                [self._weights[name].param.data.view(-1) for name in batch.names],
                batch.index,
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=weight_decay,
                step=state["step"],
                weight_holds_value=all(self._written.get(name) == stamp for name, stamp in stamps.items()),
            )
            self._written.update(stamps)
        if before is not None:
            self._rescale_(before)
        return loss

    def _rescale_(self, before: Tensor) -> None:
        """Undo the part of the step that the factors leave out, and write the values into the model."""
        assert self._factor is not None
        self.values.data.copy_(scaled(before, self.values.data, self._factor))
        self._written.clear()  # the step has written unscaled values
        for weight, part in zip(self._weights.values(), self.values.data.split(self._sizes), strict=True):
            weight.write_(part.to(weight.param.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and fp32 values. The next step writes all values into the model."""
        super().load_state_dict(state_dict)
        self._written.clear()
        state = self.state[self.values]
        if "value" in state:
            self.values.data.copy_(state["value"])
            state["value"] = self.values.data


class _Batch(NamedTuple):
    """Weights of one dtype whose values lie side by side, stepped in one call.

    Attributes:
        names: of the parameters.
        begin, end: range of their values among all.
        index: int64, on the device: ascending positions of the selected elements in the concatenated weights.
    """

    names: list[str]
    begin: int
    end: int
    index: Tensor


def _batches(weights: dict[str, SelectedWeights], device: torch.device) -> Iterator[_Batch]:
    begin = 0
    for _, group in groupby(weights.items(), key=lambda item: item[1].param.dtype):
        names, parts, offset = [], [], 0

        # Positions count on through the weights of a batch, as if they were concatenated.
        for name, weight in group:
            names.append(name)
            parts.append(weight.index + offset)
            offset += weight.param.numel()
        index = torch.cat(parts)
        yield _Batch(names, begin, begin + index.numel(), index.to(device))
        begin += index.numel()


def _stamp(param: nn.Parameter) -> tuple[int, int]:
    """Return what changes when other code writes a weight: in place, or by replacing its tensor.

    A step itself does not change it, since it writes past torch's version counter, as all writes through `.data` do.
    """
    return param._version, param.data_ptr()
