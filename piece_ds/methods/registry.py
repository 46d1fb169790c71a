"""METHODS: every method by name, with what it is, what it needs and where it comes from. One entry each.

No other module knows a method by its name: what a method may be used with follows from its entry. A user's estimator
joins the table by register_estimator(). An installed package can also name an Estimator in an entry point of the group
`piece_ds.estimators`.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

from torch import Tensor, nn

from piece_ds.config.piece import PieceConfig
from piece_ds.methods.any_peft import AnyPeft
from piece_ds.methods.baseline import Baseline
from piece_ds.methods.ewc import EWC
from piece_ds.methods.gem import GEM
from piece_ds.methods.hft import count_whole, half_names, norm_names, select_whole
from piece_ds.methods.lift import select_lift
from piece_ds.methods.linear import linear_weights
from piece_ds.methods.lora import LoRA, OLoRA
from piece_ds.methods.lwf import LwF
from piece_ds.methods.method import BASELINE, GENERAL, SELECTION, Method, estimated
from piece_ds.methods.migu import select_migu
from piece_ds.methods.piece_variants import select_disjoint, select_ratio
from piece_ds.methods.replay import Replay, ReplayOnline
from piece_ds.methods.request import restricted
from piece_ds.methods.shira import select_shira, shira_counts
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.selection.budget import num_selected
from piece_ds.selection.estimators import (
    MAGNITUDE,
    PIECE_F,
    PIECE_S,
    RANDOM,
    Estimator,
    Fragment,
    checked,
)
from piece_ds.state.partition import Layout

GROUP = "piece_ds.estimators"


def _in_linear(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return num_selected(restricted(layout, {weight.name for weight in linear_weights(model)}), config.ratio)


def _shira(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return sum(shira_counts(model, layout, config.ratio).values())


def _norms(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return count_whole(norm_names, model, layout, config.seed, task)


def _half(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    return count_whole(half_names, model, layout, config.seed, task)


_PAPER = "arXiv 2511.15375"

_TABLE = (
    # One top-k of scores.
    estimated(PIECE_S, "|sum of g| / sqrt(sum of g^2 + lambda)", f"{_PAPER}, PIECE-S: second-order normalization"),
    estimated(PIECE_F, "sum of g^2", f"{_PAPER}, PIECE-F: diagonal empirical Fisher information"),
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
    ),
    Method(
        name="shira",
        help="positions drawn in every linear layer",
        source="SHiRA, arXiv 2406.13175; peft's random mask",
        kind=SELECTION,
        select=select_shira,
        count=_shira,
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
        reads_images=False,
    ),
    Method(
        name="peft",
        help="the adapter that --peft_config describes, one through all tasks",
        source="any method of PEFT that merges: OFT, DoRA, PiSSA, OSF, VeRA, IA3 ...",
        kind=BASELINE,
        baseline=AnyPeft,
        reads_images=False,
    ),
    Method(
        name="o-lora",
        help="an adapter per task, orthogonal to those before",
        source="O-LoRA, arXiv 2310.14152",
        kind=BASELINE,
        baseline=OLoRA,
        reads_images=False,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def register_estimator(
    name: str, function: Callable[[Fragment], Tensor], *, needs: str, help: str = "", source: str = "registered"
) -> None:
    """Add an importance estimator to METHODS. `--method NAME`, estimate_mask(method=NAME) and all else then know it.

    Args:
        name: a new one.
        function: Fragment -> scores of its elements: fp32, 1-D, >= 0, never NaN, larger is more important. It must
            depend only on the elements, not on where a fragment begins, so that any number of ranks selects the same.
        needs: what the fragment must hold: 'nothing' (function reads only weights, or draws), 'squares', 'sum' or 'sum
            and squares' of the gradients over the task's micro-batches.
        help, source: what it does and where it comes from, for --help.
    Raises:
        ValueError: the name is taken, or needs is none of these.
    Cost: a pass over the data if needs is not 'nothing'; 4 bytes per owned element, 8 with the sum.
    """
    _add(Estimator(name, function, needs), help, source)


def find_method(name: str) -> Method:
    """Return the method called name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    _add_installed()

    # A misspelt name is answered with the nearest one.
    if name not in METHODS:
        known = list(METHODS)
        raise UserError(f"--method {name!r} is unknown; known: {', '.join(known)}.{nearest(name, known)}")
    return METHODS[name]


def find_estimator(name: str) -> Estimator:
    """Return the estimator of a method that is one top-k of scores.

    Raises:
        UserError: the method is unknown or has no estimator.
    """
    estimator = find_method(name).estimator
    if estimator is None:
        known = [method.name for method in METHODS.values() if method.estimator is not None]
        raise UserError(f"method {name!r} is no importance estimator; known: {', '.join(known)}")
    return estimator


def names_of(kind: str) -> list[str]:
    """Return the names of all methods of a kind, in the table's order."""
    _add_installed()
    return [method.name for method in METHODS.values() if method.kind == kind]


def methods_help() -> str:
    """Return the table as text for --help."""
    _add_installed()
    return "; ".join(f"{method.name}: {method.help or method.source}" for method in METHODS.values())


def _add(estimator: Estimator, help: str, source: str) -> None:
    if estimator.name in METHODS:
        raise ValueError(f"method {estimator.name!r} is there already: register yours under another name")
    METHODS[estimator.name] = estimated(checked(estimator), help, source)


_installed: set[str] = set()  # entry points that have been read


def _add_installed() -> None:
    """Add the estimators of installed packages, each once.

    Raises:
        UserError: an entry point cannot be imported, is no Estimator, or has a name that is taken.
    """
    # Read late, when a method is looked up: importing this package must not import others.
    for point in entry_points(group=GROUP):
        if point.value in _installed:
            continue
        _installed.add(point.value)
        try:
            estimator = point.load()
            if not isinstance(estimator, Estimator):
                raise TypeError(f"expected a piece_ds.Estimator, got {type(estimator).__name__}")
            _add(estimator, "", point.value)
        except Exception as error:  # another package's code: whatever it raises, its name must be said
            raise UserError(f"entry point {point.name} = {point.value} of {GROUP} cannot be used: {error}") from error
