"""The methods without a mask, by name. One line each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from piece_ds.methods.baseline import Baseline
from piece_ds.methods.ewc import EWC
from piece_ds.methods.gem import GEM
from piece_ds.methods.hft import count_whole, half_names, norm_names, select_whole
from piece_ds.methods.lift import select_lift
from piece_ds.methods.linear import linear_weights
from piece_ds.methods.lora import LoRA, OLoRA
from piece_ds.methods.lwf import LwF
from piece_ds.methods.migu import select_migu
from piece_ds.methods.piece_variants import select_disjoint, select_ratio
from piece_ds.methods.replay import Replay, ReplayOnline
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.methods.shira import select_shira, shira_counts
from piece_ds.selection.budget import num_selected
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout

# (model, layout, ratio, seed, task) -> how many elements will be selected; known before anything is scored.
Count = Callable[[nn.Module, Layout, float, int, str], int]


@dataclass(frozen=True)
class Selection:
    """How a method makes its mask.

    Attributes:
        select: the work; a collective.
        count: how many elements the mask will have.
        ignores_ratio: the method says itself how much it selects.
        source: where the idea comes from.
    """

    select: Callable[[SelectionRequest], Mask]
    count: Count
    ignores_ratio: bool
    source: str


def _by_ratio(model: nn.Module, layout: Layout, ratio: float, seed: int, task: str) -> int:
    return num_selected(layout, ratio)


def _in_linear(model: nn.Module, layout: Layout, ratio: float, seed: int, task: str) -> int:
    return num_selected(restricted(layout, {weight.name for weight in linear_weights(model)}), ratio)


def _shira(model: nn.Module, layout: Layout, ratio: float, seed: int, task: str) -> int:
    return sum(shira_counts(model, layout, ratio).values())


def _norms(model: nn.Module, layout: Layout, ratio: float, seed: int, task: str) -> int:
    return count_whole(norm_names, model, layout, seed, task)


def _half(model: nn.Module, layout: Layout, ratio: float, seed: int, task: str) -> int:
    return count_whole(half_names, model, layout, seed, task)


SELECTIONS = {
    "lift": Selection(select_lift, _in_linear, False, "arXiv 2506.00772: largest after low-rank approximation"),
    "hft": Selection(partial(select_whole, half_names), _half, True, "arXiv 2404.18466: half of the tensors"),
    "layernorm": Selection(partial(select_whole, norm_names), _norms, True, "arXiv 2312.11420: the norms alone"),
    "migu": Selection(select_migu, _in_linear, False, "arXiv 2406.17245: outputs of large magnitude"),
    "shira": Selection(select_shira, _shira, False, "arXiv 2406.13175, peft's random mask"),
    "piece-ratio": Selection(select_ratio, _by_ratio, False, "Fisher of the task over Fisher of general text"),
    "piece-s-disjoint": Selection(select_disjoint, _by_ratio, False, "PIECE-S outside earlier tasks' masks"),
}

BASELINES: dict[str, type[Baseline]] = {
    "seqft": Baseline,
    "ewc": EWC,
    "gem": GEM,
    "lwf": LwF,
    "replay": Replay,
    "replay-online": ReplayOnline,
    "lora": LoRA,
    "o-lora": OLoRA,
}
