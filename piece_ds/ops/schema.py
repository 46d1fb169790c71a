"""The table of contents of the extension: every op of namespace piece_ds, its schema and its fake tensor rule.

Providers fill these in per device (reference.py for every device; compiled ones register over it). All tensors are
1-D and contiguous; counts and positions are int64; a name ending in `_` writes the arguments marked (a!), (b!).
"""

import torch
from torch import Tensor

NAMESPACE = "piece_ds"

SCHEMAS = {
    # sum += g, square_sum += g * g, with g = float32(grad) * scale and non-finite entries counted and taken as 0
    "accumulate_": "(Tensor grad, Tensor(a!)? grad_sum, Tensor(b!) square_sum, float scale, Tensor(c!) num_nonfinite)"
    " -> ()",
    # |sum| / sqrt(square_sum + lam), or square_sum itself where grad_sum is None
    "score": "(Tensor? grad_sum, Tensor square_sum, float lam) -> Tensor",
    # counts[d] += number of scores whose key has the given leading bits and d as its next `bits` bits
    "digit_histogram_": "(Tensor(a!) counts, Tensor score, int shift, int bits, int prefix) -> ()",
    # bit j of byte i = element 8 i + j
    "index_to_mask": "(Tensor index, SymInt n) -> Tensor",
    "mask_to_index": "(Tensor bits) -> Tensor",
    # grad becomes 0 outside index; values at index keep their bits
    "apply_mask_": "(Tensor(a!) grad, Tensor index) -> ()",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)


@torch.library.register_fake(f"{NAMESPACE}::accumulate_")
def _accumulate_fake(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, count: Tensor) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::score")
def _score_fake(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Tensor:
    return torch.empty_like(square_sum)


@torch.library.register_fake(f"{NAMESPACE}::digit_histogram_")
def _digit_histogram_fake(counts: Tensor, score: Tensor, shift: int, bits: int, prefix: int) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::index_to_mask")
def _index_to_mask_fake(index: Tensor, n: torch.SymInt) -> Tensor:
    return index.new_empty(((n + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::mask_to_index")
def _mask_to_index_fake(bits: Tensor) -> Tensor:
    num_selected = torch.library.get_ctx().new_dynamic_size()  # depends on the data
    return bits.new_empty((num_selected,), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::apply_mask_")
def _apply_mask_fake(grad: Tensor, index: Tensor) -> None:
    return None
