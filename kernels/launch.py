"""What every Triton launcher needs: argument checks, the grid, and options that keep arithmetic as it is written."""

from typing import Any

import torch
import triton
from torch import Tensor

# Elements per program. With 4 warps that is 8 elements a thread: two 16-byte loads of fp32, or one of bf16.
BLOCK = 1024

# Fused multiply-adds round once, reference.py rounds twice. Newer versions of Triton do not fuse by themselves, but
# results depend on it, so it is said.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
# Positions are checked on the device. Overflow checks, which come with assertions, would cost time and find nothing.
CHECKED_OPTIONS: dict[str, Any] = {**OPTIONS, "debug": True, "sanitize_overflow": False}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def num_blocks(n: int, block: int = BLOCK) -> int:
    """Return how many programs of `block` elements n elements need."""
    return -(-n // block)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"piece_ds: {message}")


def require_vector(name: str, tensor: Tensor | None, n: int, *dtypes: torch.dtype) -> None:
    """Raise RuntimeError unless tensor is None or has n contiguous elements of one of dtypes."""
    # Optional arguments are checked by the same call.
    if tensor is None:
        return
    require(tensor.dtype in dtypes, f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    require(tensor.is_contiguous(), f"{name} must be contiguous: pass .contiguous() or a view of a flat buffer")
    require(tensor.numel() == n, f"{name} must have {n} elements, got {tensor.numel()}")


def require_sums(grad_sum: Tensor | None, square_sum: Tensor) -> None:
    n = square_sum.numel()
    require_vector("grad_sum", grad_sum, n, torch.float32)
    require_vector("square_sum", square_sum, n, torch.float32)


def require_candidates(score: Tensor, index: Tensor, num_found: Tensor) -> None:
    require_vector("candidate_score", score, index.numel(), torch.float32)
    require_vector("candidate_index", index, score.numel(), torch.int64)
    require_vector("num_candidates", num_found, 1, torch.int64)


def grid(n: int, block: int = BLOCK) -> tuple[int]:
    """Return the grid with one program for every `block` elements; n > 0."""
    return (triton.cdiv(n, block),)
