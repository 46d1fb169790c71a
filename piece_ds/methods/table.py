"""The table of methods: one entry each, with what it is, what it needs and where it comes from.

A method that is not here cannot be named by --method. registry.py looks entries up and lets users add estimators.
"""

from functools import partial

from torch import nn

from piece_ds.config.piece import PieceConfig
from piece_ds.methods.activations import select_activation_ratio, select_ssu
from piece_ds.methods.any_peft import AnyPeft
from piece_ds.methods.baseline import Baseline
from piece_ds.methods.ewc import EWC
from piece_ds.methods.gem import GEM
from piece_ds.methods.hft import count_whole, half_names, norm_names, select_whole
from piece_ds.methods.lift import select_lift, select_lift_complement
from piece_ds.methods.linear import linear_weights
from piece_ds.methods.lora import LoRA, OLoRA
from piece_ds.methods.lwf import LwF
from piece_ds.methods.method import BASELINE, GENERAL, GENERAL_TEXT, SELECTION, Method, estimated
from piece_ds.methods.migu import select_migu
from piece_ds.methods.piece_variants import select_disjoint, select_gain, select_ratio
from piece_ds.methods.replay import Replay, ReplayOnline
from piece_ds.methods.request import restricted
from piece_ds.methods.shira import select_shira, shira_counts
from piece_ds.selection.budget import num_selected
from piece_ds.selection.estimators import (
    MAGNITUDE,
    PIECE_F,
    PIECE_S,
    RANDOM,
    TAYLOR,
)
from piece_ds.state.partition import Layout


def _in_linear(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return num_selected(restricted(layout, {weight.name for weight in linear_weights(model)}), config.ratio)


def _shira(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return sum(shira_counts(model, layout, config.ratio).values())


def _norms(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return count_whole(norm_names, model, layout, config.seed, task)


def _half(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return count_whole(half_names, model, layout, config.seed, task)


_PAPER = "arXiv 2511.15375"

TABLE = (
    # One top-k of scores.
    estimated(PIECE_S, "|sum of g| / sqrt(sum of g^2 + lambda)", f"{_PAPER}, PIECE-S: second-order normalization"),
    estimated(PIECE_F, "sum of g^2", f"{_PAPER}, PIECE-F: diagonal empirical Fisher information"),
    estimated(
        TAYLOR,
        "weight * sum of g: the first-order gain of setting a weight to zero",
        "Taylor; Deletion Tuning, arXiv 2611.10866, sets such weights to zero; here they train",
    ),
    estimated(RANDOM, "weights drawn uniformly", "control: uniform, seeded"),
    estimated(MAGNITUDE, "the largest absolute weights", "control: magnitude"),
    # Selections with rules of their own.
    Method(
        name="lift",
        help="in linear layers, the largest weights after low-rank approximation",
        source="LIFT, arXiv 2506.00772",
        kind=SELECTION,
        select=select_lift,
        count=_in_linear,
        only_linear=True,
    ),
    Method(
        name="lift-complement",
        help="in linear layers, the smallest weights after low-rank approximation",
        source="the complement of LIFT, arXiv 2506.00772",
        kind=SELECTION,
        select=select_lift_complement,
        count=_in_linear,
    ),
    Method(
        name="hft",
        help="half of the tensors, drawn for each task",
        source="HFT, arXiv 2404.18466",
        kind=SELECTION,
        select=partial(select_whole, half_names),
        count=_half,
        ignores_ratio=True,
    ),
    Method(
        name="layernorm",
        help="only the norms",
        source="LayerNorm tuning, arXiv 2312.11420",
        kind=SELECTION,
        select=partial(select_whole, norm_names),
        count=_norms,
        ignores_ratio=True,
    ),
    Method(
        name="migu",
        help="in linear layers, the weights of outputs of large magnitude",
        source="MIGU, arXiv 2406.17245",
        kind=SELECTION,
        select=select_migu,
        count=_in_linear,
        only_linear=True,
    ),
    Method(
        name="shira",
        help="positions drawn in every linear layer",
        source="SHiRA, arXiv 2406.13175; peft's random mask",
        kind=SELECTION,
        select=select_shira,
        count=_shira,
        only_linear=True,
    ),
    Method(
        name="piece-ratio",
        help="g^2 of the task over g^2 of general text",
        source="this project: task importance over general importance",
        kind=SELECTION,
        needs=GENERAL,
        select=select_ratio,
        scores_elements=True,
    ),
    Method(
        name="piece-gain",
        help="(mean of g)^2 of the task over g^2 of general text",
        source="this project: a diagonal model's gain at the best step of each weight",
        kind=SELECTION,
        needs=GENERAL,
        select=select_gain,
        scores_elements=True,
    ),
    Method(
        name="piece-ratio-activation",
        help="in linear layers, g^2 of the task over the mean square of the input on general text",
        source="this project; the cost as in arXiv 2610.11076",
        kind=SELECTION,
        needs=GENERAL_TEXT,
        select=select_activation_ratio,
        count=_in_linear,
        reads_images=False,
        scores_elements=True,
    ),
    Method(
        name="ssu",
        help="in linear layers, the input columns that general text needs least",
        source="SSU, arXiv 2512.04844",
        kind=SELECTION,
        needs=GENERAL_TEXT,
        select=select_ssu,
        count=_in_linear,
        reads_images=False,
    ),
    Method(
        name="piece-s-disjoint",
        help="piece-s outside the masks of earlier tasks",
        source="this project",
        kind=SELECTION,
        needs="sum and squares",
        select=select_disjoint,
        needs_earlier_tasks=True,
    ),
    # Methods without a mask.
    Method(
        name="seqft",
        help="every weight, task after task",
        source="sequential fine-tuning",
        kind=BASELINE,
        baseline=Baseline,
        packs=True,
    ),
    Method(
        name="ewc",
        help="a penalty holds weights by earlier tasks' Fisher information",
        source="arXiv 1612.00796, online: arXiv 1805.06370",
        kind=BASELINE,
        baseline=EWC,
        needs="squares",
        reads_images=False,
    ),
    Method(
        name="gem",
        help="steps that would raise an earlier task's loss are turned",
        source="arXiv 1706.08840",
        kind=BASELINE,
        baseline=GEM,
        extra="statistics",
        needs="sum",
        reads_images=False,
    ),
    Method(
        name="lwf",
        help="held to what the model said before the task",
        source="arXiv 1606.09282",
        kind=BASELINE,
        baseline=LwF,
        reads_images=False,
    ),
    Method(
        name="replay",
        help="rows of earlier tasks after each epoch of new ones",
        source="experience replay",
        kind=BASELINE,
        baseline=Replay,
        reads_images=False,
    ),
    Method(
        name="replay-online",
        help="rows of earlier tasks among the new ones",
        source="TRACE, arXiv 2310.06762",
        kind=BASELINE,
        baseline=ReplayOnline,
        reads_images=False,
    ),
    Method(
        name="lora",
        help="one adapter through all tasks",
        source="LoRA, arXiv 2106.09685, by peft",
        kind=BASELINE,
        baseline=LoRA,
        extra="peft",
        reads_images=False,
        only_linear=True,
    ),
    Method(
        name="peft",
        help="the adapter that --peft_config describes, one through all tasks",
        source="any method of PEFT that merges: OFT, DoRA, PiSSA, OSF, VeRA, IA3 ...",
        kind=BASELINE,
        baseline=AnyPeft,
        extra="peft",
        reads_images=False,
    ),
    Method(
        name="o-lora",
        help="an adapter per task, orthogonal to those before",
        source="O-LoRA, arXiv 2310.14152",
        kind=BASELINE,
        baseline=OLoRA,
        extra="peft",
        reads_images=False,
        only_linear=True,
    ),
)
