"""LIFT: in every linear matrix, select the weights that are largest once the matrix is reduced to low rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from piece_ds.methods.activations import reversed_order
from piece_ds.methods.linear import linear_weights
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.state.mask import Mask
from piece_ds.zero.weights import read_whole

RANK_SHARE = 32  # a rank of 128 for a matrix of 4096 rows


def select_lift(request: SelectionRequest) -> Mask:
    """Return the mask of LIFT. Every matrix has its part of k, in proportion to its elements.

    It is taken once, before the task. The paper refreshes its selection during training, which would move weights that
    this project promises to leave alone.

    Cost: an eigendecomposition in fp64 per matrix, of its shorter side, on every rank; under ZeRO-3 a gather each.
    Source: LIFT (Liu et al., arXiv 2506.00772).
    """
    return _select(request, lambda score: score)


def select_lift_complement(request: SelectionRequest) -> Mask:
    """Return the mask of the weights that are smallest once the matrix is reduced to low rank: what LIFT leaves last.

    Cost: as select_lift().
    Source: the complement of LIFT's principal weights, which carry what the model knows (arXiv 2506.00772).
    """
    return _select(request, reversed_order)


def _select(request: SelectionRequest, order: Callable[[Tensor], Tensor]) -> Mask:
    names = {weight.name for weight in linear_weights(request.model)}
    layout = restricted(request.layout, names)
    device = request.device
    params = dict(request.model.named_parameters())
    score_N = torch.zeros(layout.num_owned, dtype=torch.float32, device=device)
    for info, part, offset in layout.owned():
        # The low rank is that of the whole matrix, so every rank computes it and keeps its own range.
        whole = read_whole(params[info.name], request.engine.device).reshape(info.shape)
        rank = request.config.lift_rank or max(1, min(info.shape) // RANK_SHARE)
        score = low_rank(whole, rank).abs_().reshape(-1)
        score_N[offset : offset + part.numel] = score[part.start : part.stop]
    return request.select(order(score_N.nan_to_num_(nan=0.0)), names, "tensor")


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a matrix with the given rank, in fp32 (Eckart and Young).

    It comes from the eigenvectors of the Gram matrix of the shorter side, in fp64. The condition number is squared
    there. Only the vectors of the largest singular values are used, and they are as exact as fp32 can show.
    """
    if min(matrix.shape) <= rank:
        return matrix.to(torch.float32, copy=True)
    exact = matrix.double()
    rows_are_short = exact.shape[0] <= exact.shape[1]
    gram = exact @ exact.T if rows_are_short else exact.T @ exact
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # eigenvalues ascend
    near = vectors @ (vectors.T @ exact) if rows_are_short else (exact @ vectors) @ vectors.T
    return near.float()
