"""Sample the gradients of experts that are stacked into one parameter of three dimensions.

transformers multiplies by such a parameter in several ways: one grouped product, one product of a batch, or a product
for each expert that has a token. All are seen where torch's functions are called. A way that is not known here forms
the whole gradient, whose selected entries are taken.

Legend: E experts, S rows (a token once for each of its experts), n_e rows of expert e.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from piece_ds import ops
from piece_ds.update.sampled_backward import adds_to_weights
from piece_ds.zero.weights import SelectedWeights

# Names of torch's functions (and of transformers' substitute where torch has no kernel) that multiply rows by experts.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # rows [S, in], all experts, ends of their rows
_BATCHED = ("bmm", "matmul")  # rows [E, n, in], all experts
_ALONE = ("linear", "matmul", "mm")  # rows [n_e, in], one expert

Product = Callable[[Tensor, Tensor, Tensor], None]


class SampledExperts:
    """Take the selected entries of a stacked parameter's gradient when backward passes the products with it.

    Inside these products autograd does not see the parameter, so no dense gradient is formed. Anywhere else it does.

    Attributes:
        name: of the parameter in the whole model.
        was_called: whether a product with gradients has been seen.
        used_elsewhere: whether a gradient has come from another use.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        selected: SelectedWeights,
        out_K: Tensor,
        collect: Callable[[SelectedWeights, Tensor, Callable[[], None]], Callable[[], None]],
    ) -> None:
        """Install the hooks.

        Args:
            module: whose forward multiplies by the experts.
            name: of the parameter in the whole model, of shape [E, a, b].
            selected: the parameter and its positions; gets requires_grad.
            out_K: fp32, one entry per position; added to.
            collect: takes the gradients of other uses: collect_dense().
        Cost: of ops.sampled_gradient_ for each expert with a row, and one wait for the device in each product; the rows
        stay alive until backward has passed.
        """
        self.name = name
        self.was_called = self.used_elsewhere = False
        self._param = selected.param
        num_experts, height, width = getattr(self._param, "ds_shape", self._param.shape)

        # The selection, cut into experts: ranges of the index, and positions within each expert.
        size = height * width
        starts = torch.arange(num_experts + 1) * size
        self._cuts: list[int] = torch.searchsorted(selected.index.cpu(), starts).tolist()
        self._index, self._out = (selected.index % size).to(out_K.device), out_K
        # Outputs must require a gradient even if nothing before the experts does.
        self._anchor = torch.zeros((), device=out_K.device, requires_grad=True)

        # Products are watched from the last hook before forward to the first one after it, also on errors.
        self._modes: list[_Products] = []
        handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, prepend=True, always_call=True),
        ]
        self._remove = [collect(selected, out_K, self._note_use), *(handle.remove for handle in handles)]

    def remove(self) -> None:
        """Restore the module and its parameter."""
        for remove in self._remove:
            remove()

    def _enter(self, *_: Any) -> None:
        self._modes.append(_Products(self._product))
        self._modes[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        self._modes.pop().__exit__(None, None, None)

    def _note_use(self) -> None:
        self.used_elsewhere = True

    def _product(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the product of rows and experts, watched; None if func is no known product with this parameter."""
        name = getattr(func, "__name__", "")
        if len(args) < 2 or not torch.is_grad_enabled() or not isinstance(args[1], Tensor):
            return None
        rows, weight, *others = args
        found = self._find(weight)
        if found is None:
            return None
        expert, is_stored = found
        # linear() multiplies by the transposed weight, all others by the weight.
        rows_first = is_stored != (name == "linear")

        # Which rows belong to which expert.
        ends: Tensor | None = None
        add: Product
        if expert is None and name in _GROUPED and rows.dim() == 2:
            ends = kwargs.get("offs", others[0] if others else None)
            if not isinstance(ends, Tensor):
                return None
            add = self._add_groups
        elif expert is None and name in _BATCHED and rows.dim() == 3:
            ends, add = torch.zeros(0), self._add_batch
        elif expert is not None and name in _ALONE:
            ends, add = torch.tensor(expert), self._add_one
        else:
            return None

        self.was_called = True
        output = self._unseen(func, rows, weight, others, kwargs)

        def take(grad: Tensor, rows: Tensor, ends: Tensor) -> None:
            add(*((rows, grad) if rows_first else (grad, rows)), ends)

        watched: Tensor = _Watched.apply(output, self._anchor, take, rows.detach(), ends)
        return watched

    def _unseen(
        self, func: Callable[..., Tensor], rows: Tensor, weight: Tensor, others: list[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the product, whose backward forms no gradient of the parameter."""
        if weight is not self._param:
            return func(rows, weight.detach(), *others, **kwargs)
        # The parameter itself, not an alias of it: autograd would keep what ZeRO-3 has gathered until backward.
        self._param.requires_grad_(False)
        try:
            return func(rows, weight, *others, **kwargs)
        finally:
            self._param.requires_grad_(True)

    def _find(self, weight: Tensor) -> tuple[int | None, bool] | None:
        """Return which expert a tensor is (None: all), and whether its last dimensions are as stored, not transposed.

        None if it is no view of the parameter that these products use.
        """
        param = self._param
        if weight is not param and weight._base is not param:
            return None
        shape, strides = tuple(param.shape), param.stride()
        own_shape, own_strides = tuple(weight.shape), weight.stride()
        if (own_shape[-2:], own_strides[-2:]) == (shape[-2:], strides[-2:]):
            is_stored = True
        elif (own_shape[-2:], own_strides[-2:]) == (shape[:0:-1], strides[:0:-1]):
            is_stored = False
        else:
            return None
        offset = weight.storage_offset() - param.storage_offset()
        if weight.dim() == 3:
            is_all = offset == 0 and (own_shape[0], own_strides[0]) == (shape[0], strides[0])
            return (None, is_stored) if is_all else None
        expert, rest = divmod(offset, strides[0])
        return (expert, is_stored) if rest == 0 and weight.dim() == 2 else None

    def _add_groups(self, left: Tensor, right: Tensor, ends: Tensor) -> None:
        start = 0
        for expert, end in enumerate(ends.tolist()):
            self._add(expert, left[start:end], right[start:end])
            start = end

    def _add_batch(self, left: Tensor, right: Tensor, _: Tensor) -> None:
        for expert in range(left.shape[0]):
            self._add(expert, left[expert], right[expert])

    def _add_one(self, left: Tensor, right: Tensor, expert: Tensor) -> None:
        self._add(int(expert), left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1]))

    def _add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Add the selected entries of left^T right, one expert's gradient [a, b]."""
        low, high = self._cuts[expert], self._cuts[expert + 1]
        if low < high and left.shape[0]:
            left, right = left.contiguous(), right.contiguous()
            ops.sampled_gradient_(left, right, self._index[low:high], 1.0, self._out[low:high])


class _Products(TorchFunctionMode):
    """Offer every call of a torch function to another one first."""

    def __init__(self, product: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self._product_of = product

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = self._product_of(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if found is None else found


class _Watched(torch.autograd.Function):
    """Return a product unchanged; backward hands its gradient and what was saved to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, take: Product, rows: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends)  # not a closure: activation checkpointing has to see them
        ctx.take = take
        ctx.mark_dirty(output)  # no view: a bias is added to it in place
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, ends = ctx.saved_tensors
        if adds_to_weights(ctx, anchor=1):
            ctx.take(grad_output, rows, ends)
        return grad_output, None, None, None, None
