"""List every op of namespace piece_ds, with its schema and its fake tensor rule.

Providers implement them per device (backends.py chooses one per device and process). Tensors are 1-D and contiguous
unless said otherwise. Counts, positions and offsets are int64. A name ending in `_` writes the arguments marked (a!),
(b!). An op on scores takes (grad_sum, square_sum, lam) and computes them as `score` does, so that none is ever stored;
(None, x, lam) stands for the scores x themselves. reference.py gives each op's exact meaning.
"""

import torch
from torch import Tensor

NAMESPACE = "piece_ds"

SCHEMAS = {
    # sum += g, square_sum += g * g, with g = float32(grad) * scale and non-finite entries counted and taken as 0
    "accumulate_": "(Tensor grad, Tensor(a!)? grad_sum, Tensor(b!) square_sum, float scale, Tensor(c!) num_nonfinite)"
    " -> ()",
    # accumulate_ and, in the same pass, filter_ of the new sums
    "accumulate_filter_": "(Tensor grad, Tensor(a!)? grad_sum, Tensor(b!) square_sum, float scale,"
    " Tensor(c!) num_nonfinite, float lam, float bound, int offset, Tensor(d!) candidate_score,"
    " Tensor(e!) candidate_index, Tensor(f!) num_candidates) -> ()",
    # |sum| / sqrt(square_sum + lam), or square_sum itself if grad_sum is None
    "score": "(Tensor? grad_sum, Tensor square_sum, float lam) -> Tensor",
    # counts[d] += number of scores whose key has the given leading bits and d as its next `bits` bits, among the
    # elements i with i % stride < run
    "score_histogram_": "(Tensor(a!) counts, Tensor? grad_sum, Tensor square_sum, float lam, int shift, int bits,"
    " int prefix, int run, int stride) -> ()",
    # append (score, offset + i) of every element with score >= bound, in any order, counting also what has no room
    "filter_": "(Tensor? grad_sum, Tensor square_sum, float lam, float bound, int offset,"
    " Tensor(a!) candidate_score, Tensor(b!) candidate_index, Tensor(c!) num_candidates) -> ()",
    # ascending positions with a greater key, and the first num_ties positions with exactly this one
    "select_above": "(Tensor? grad_sum, Tensor square_sum, float lam, int key, int num_ties) -> Tensor",
    # bit j of byte i = element 8 i + j
    "index_to_mask": "(Tensor index, SymInt n) -> Tensor",
    "mask_to_index": "(Tensor bits) -> Tensor",
    # grad becomes 0 outside index and grad * scale at index; the norm and the finite check come with it
    "apply_mask_": "(Tensor(a!) grad, Tensor index, float scale, Tensor(b!)? square_norm, Tensor(c!)? num_nonfinite)"
    " -> ()",
    # apply_mask_ of the concatenation of grads: index ascends through all of them; one dtype
    "apply_mask_list_": "(Tensor(a!)[] grads, Tensor index, float scale, Tensor(b!)? square_norm,"
    " Tensor(c!)? num_nonfinite) -> ()",
    # the concatenation of weights gets values at index, which ascends; one dtype, values' too
    "scatter_list_": "(Tensor(a!)[] weights, Tensor index, Tensor values) -> ()",
    # total[j] += float32(grad[index[j]]) * scale
    "gather_add_": "(Tensor grad, Tensor index, float scale, Tensor(a!) total) -> ()",
    # total[j] += scale * sum over t of grad_output[t, index[j] // in] * input[t, index[j] % in]; both 2-D, tokens first
    "sampled_gradient_": "(Tensor grad_output, Tensor input, Tensor index, float scale, Tensor(a!) total) -> ()",
    # one AdamW step of the compacted fp32 values; values go to weight[index] in its dtype
    "sparse_adamw_": "(Tensor grad, Tensor(a!) value, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) weight,"
    " Tensor index, float grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step,"
    " bool weight_holds_value) -> ()",
    # sparse_adamw_ of the concatenation of weights: index ascends through all of them; one dtype
    "sparse_adamw_list_": "(Tensor grad, Tensor(a!) value, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)[] weights, Tensor index, float grad_scale, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, int step, bool weight_holds_value) -> ()",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)


def _writes_only(*arguments: object) -> None:
    """Return nothing: the fake rule of every op that only writes its arguments."""


for _name, _schema in SCHEMAS.items():
    if _schema.endswith("-> ()"):
        torch.library.register_fake(f"{NAMESPACE}::{_name}", _writes_only)


@torch.library.register_fake(f"{NAMESPACE}::score")
def _score_fake(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Tensor:
    return torch.empty_like(square_sum)


@torch.library.register_fake(f"{NAMESPACE}::select_above")
def _select_above_fake(grad_sum: Tensor | None, square_sum: Tensor, lam: float, key: int, num_ties: int) -> Tensor:
    num_selected = torch.library.get_ctx().new_dynamic_size()  # depends on the data
    return square_sum.new_empty((num_selected,), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::index_to_mask")
def _index_to_mask_fake(index: Tensor, n: torch.SymInt) -> Tensor:
    return index.new_empty(((n + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::mask_to_index")
def _mask_to_index_fake(bits: Tensor) -> Tensor:
    num_selected = torch.library.get_ctx().new_dynamic_size()
    return bits.new_empty((num_selected,), dtype=torch.int64)
