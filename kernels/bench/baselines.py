"""What the ops are compared with: the reference code's chain of torch calls, the best known chain, and both compiled.

`authors` computes as the code of arXiv 2511.15375 does, minus its copies to the host. `best` is the fastest eager torch
with the same result on finite input.
"""

import torch
from torch import Tensor


def authors_accumulate(grad: Tensor, grad_sum: Tensor, square_sum: Tensor) -> None:
    value = torch.nan_to_num(grad, nan=0.0).float()
    grad_sum.add_(value)
    square_sum.addcmul_(value, value)


def best_accumulate(grad: Tensor, grad_sum: Tensor, square_sum: Tensor) -> None:
    value = grad.float()  # no copy in fp32; no look for NaN
    grad_sum.add_(value)
    square_sum.addcmul_(value, value)


def authors_score(grad_sum: Tensor, square_sum: Tensor) -> Tensor:
    return grad_sum.abs() / torch.sqrt(square_sum + 1.0)


def best_score(grad_sum: Tensor, square_sum: Tensor) -> Tensor:
    return square_sum.add(1.0).rsqrt_().mul_(grad_sum).abs_()


def authors_select(grad_sum: Tensor, square_sum: Tensor, k: int) -> Tensor:
    """Return a boolean mask. Packing it is left out."""
    score = authors_score(grad_sum, square_sum)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[torch.topk(score, k).indices] = True
    return mask


def topk_alone(score: Tensor, k: int) -> Tensor:
    return torch.topk(score, k).indices


def authors_apply_mask(grad: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return grad * mask, as in a hook, then unscaled, and its norm, as an optimizer wrapper does."""
    grad = grad * mask
    grad.mul_(scale)
    return grad, torch.linalg.vector_norm(grad, dtype=torch.float32)


def best_apply_mask(grad: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    grad.mul_(mask).mul_(scale)
    return grad, torch.linalg.vector_norm(grad, dtype=torch.float32)


def boolean_filter(grad_sum: Tensor, square_sum: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    score = best_score(grad_sum, square_sum)
    index = (score >= bound).nonzero().squeeze(1)
    return score[index], index


def histogram(grad_sum: Tensor, square_sum: Tensor) -> Tensor:
    return torch.bincount(best_score(grad_sum, square_sum).view(torch.int32) >> 20, minlength=2048)


def gather_add(grad: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    total.add_(grad[index], alpha=scale)


def fused_adamw(grad: Tensor, value: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> None:
    """Step one tensor like torch.optim.AdamW(fused=True), without the optimizer's own overhead."""
    torch._fused_adamw_(
        [value],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=1e-5,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def compact_adamw(
    grad: Tensor, value: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, weight: Tensor, index: Tensor
) -> None:
    """Step the compacted vector with fused AdamW, then scatter it."""
    fused_adamw(grad, value, exp_avg, exp_avg_sq, step)
    weight.index_copy_(0, index, value.to(weight.dtype))


def changed_adamw(
    grad: Tensor, value: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, weight: Tensor, index: Tensor
) -> None:
    """Step the compacted vector with fused AdamW, then scatter only values whose rounding changed."""
    before = value.to(weight.dtype)
    fused_adamw(grad, value, exp_avg, exp_avg_sq, step)
    after = value.to(weight.dtype)
    changed = (after != before).nonzero().squeeze(1)
    weight.index_copy_(0, index[changed], after[changed])
