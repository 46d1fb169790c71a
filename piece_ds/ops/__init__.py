"""The ops of this project, as checked Python functions over torch.ops.piece_ds.

schema.py lists them, reference.py says exactly what they mean, and backends.py chooses the provider (PIECE_DS_BACKEND).
`python -m piece_ds.ops` prints the choice.
"""

from piece_ds.ops.backends import load, provider
from piece_ds.ops.masks import index_to_mask, mask_to_index
from piece_ds.ops.scores import (
    Candidates,
    accumulate_,
    accumulate_filter_,
    empty_candidates,
    filter_,
    score,
    score_histogram_,
    select_above,
)
from piece_ds.ops.selected import (
    apply_mask_,
    apply_mask_list_,
    gather_add_,
    sampled_gradient_,
    scatter_list_,
    sparse_adamw_,
    sparse_adamw_list_,
)

__all__ = [
    "Candidates",
    "accumulate_",
    "accumulate_filter_",
    "apply_mask_",
    "apply_mask_list_",
    "empty_candidates",
    "filter_",
    "gather_add_",
    "index_to_mask",
    "load",
    "mask_to_index",
    "provider",
    "reference",
    "sampled_gradient_",
    "scatter_list_",
    "schema",
    "score",
    "score_histogram_",
    "select_above",
    "sparse_adamw_",
    "sparse_adamw_list_",
]
