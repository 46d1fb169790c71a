"""Work on only the selected elements: mask a gradient, gather it, sample it, step and scatter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from piece_ds.ops.backends import load_for

# Found once: looking it up costs microseconds in every call, more with cold caches, as between two steps.
_sparse_adamw_ = torch.ops.piece_ds.sparse_adamw_.default
_sparse_adamw_list_ = torch.ops.piece_ds.sparse_adamw_list_.default
_scatter_list_ = torch.ops.piece_ds.scatter_list_.default


def apply_mask_(
    grad: Tensor,
    index: Tensor,
    scale: float = 1.0,
    square_norm: Tensor | None = None,
    num_nonfinite: Tensor | None = None,
) -> None:
    """Zero a 1-D gradient outside index and multiply it by scale inside.

    Optionally take its norm and count non-finites.

    Entries are selected, not multiplied by 0, so inf and NaN outside do not leak.

    Args:
        grad: bf16, fp16 or fp32, 1-D, contiguous. Written.
        index: int64, unique positions in grad.
        scale: factor applied in fp32 to the selected entries, the inverse of a loss scale; 1 keeps their bits.
        square_norm: fp64, one element. The sum of squares of the selected entries as written is added to it. The
            provider chooses the order of additions, the same in every call.
        num_nonfinite: int64, one element. The number of selected entries that are NaN or infinite is added to it.
    Cost: one write of grad; reads only the selected entries.
    """
    load_for(grad)
    torch.ops.piece_ds.apply_mask_(grad, index, scale, square_norm, num_nonfinite)


def apply_mask_list_(
    grads: Sequence[Tensor],
    index: Tensor,
    scale: float = 1.0,
    square_norm: Tensor | None = None,
    num_nonfinite: Tensor | None = None,
) -> None:
    """Mask many gradients in one call, as apply_mask_() would mask their concatenation.

    Args:
        grads: of one dtype, each 1-D and contiguous; may be empty. Written.
        index: int64, ascending unique positions in their concatenation.
        scale, square_norm, num_nonfinite: as in apply_mask_().
    Cost: as apply_mask_(). Tensors that lie side by side in memory cost as much as one; of others a GPU takes 160 at a
    launch.
    """
    load_for(index)
    torch.ops.piece_ds.apply_mask_list_(grads, index, scale, square_norm, num_nonfinite)


def scatter_list_(weights: Sequence[Tensor], index: Tensor, values: Tensor) -> None:
    """Write values at positions of many tensors in one call, as if they were concatenated.

    Args:
        weights: of one dtype, each 1-D and contiguous. Written at index, nowhere else.
        index: int64, ascending unique positions in their concatenation.
        values: the weights' dtype, as long as index, contiguous.
    """
    load_for(index)
    _scatter_list_(weights, index, values)


def gather_add_(grad: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add float32(grad[index[j]]) * scale to total[j].

    Args:
        grad: bf16, fp16 or fp32, 1-D, contiguous.
        index: int64 positions in grad.
        scale: factor applied in fp32.
        total: fp32, as long as index. Written.
    """
    load_for(grad)
    torch.ops.piece_ds.gather_add_(grad, index, scale, total)


def sampled_gradient_(grad_output: Tensor, input: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add the selected entries of a linear layer's weight gradient, grad_output^T input, without forming the rest.

    Args:
        grad_output: bf16, fp16 or fp32, [tokens, out], contiguous: gradient of the layer's output.
        input: same dtype, [tokens, in], contiguous.
        index: int64, ascending flat row-major positions in the weight [out, in].
        scale: factor applied in fp32 to each entry.
        total: fp32, as long as index. Written. Products and sums are fp32; the provider chooses their order.
    Raises:
        ValueError: the shapes do not fit.
    Cost: 2 tokens len(index) operations where the dense gradient has 2 tokens out in, and a read of both tensors.
    Source: sampled dense-dense matrix multiplication (SDDMM), Nisa et al. 2018.
    """
    if grad_output.dim() != 2 or input.dim() != 2 or grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"sampled_gradient_ expected [tokens, out] and [tokens, in], got {tuple(grad_output.shape)} "
            f"and {tuple(input.shape)}: flatten the batch"
        )
    load_for(input)
    torch.ops.piece_ds.sampled_gradient_(grad_output, input, index, scale, total)


def sparse_adamw_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    weight_holds_value: bool = False,
) -> None:
    """Take one AdamW step of the selected elements and write their new values into the weight, in one pass.

    Args:
        grad: fp32, K elements: gradient of the selected elements.
        value, exp_avg, exp_avg_sq: fp32, K elements: master values and moments. Written.
        weight: bf16, fp16 or fp32, 1-D. weight[index] = value, rounded to nearest even. Nothing else is written.
        index: int64, K unique positions in weight.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        step: 1 for the first step.
        grad_scale: factor applied in fp32 to grad first: unscaling and clipping.
        weight_holds_value: weight[index] already equals value, rounded, before the step, as every step leaves it. Then
            only weights whose rounded bits change are written. The result is the same.
    Cost: 24 bytes read and 12 written per selected element. Each written weight also costs a read and a write of its
    cache line. Of bf16 weights with deviation 0.02, some 7 % are written in a step of 2.5e-6 on average.
    Source: decoupled weight decay, arXiv 1711.05101, in the order of torch.optim.AdamW.
    """
    # In the schema's order: ops take positional arguments.
    load_for(grad)
    _sparse_adamw_(
        grad,
        value,
        exp_avg,
        exp_avg_sq,
        weight,
        index,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        weight_holds_value,
    )


def sparse_adamw_list_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Sequence[Tensor],
    index: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    weight_holds_value: bool = False,
) -> None:
    """Step many weights in one call, as sparse_adamw_() would step their concatenation.

    Args:
        grad, value, exp_avg, exp_avg_sq: fp32, K elements, those of the first weight first.
        weights: of one dtype, each 1-D and contiguous.
        index: int64, K ascending unique positions in their concatenation.
        others: as in sparse_adamw_().
    """
    # In the schema's order: ops take positional arguments.
    load_for(grad)
    _sparse_adamw_list_(
        grad,
        value,
        exp_avg,
        exp_avg_sq,
        weights,
        index,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        weight_holds_value,
    )
