"""Bytes that one rank holds, term by term, at three moments of a task. For ds_configs/ as they are; DeepSpeed 0.19.8.

Legend: N elements of the model, T elements that DeepSpeed optimises, E eligible elements, K selected elements, B bytes
of a parameter's element, W ranks, w = W from stage 1 (else 1), p = W at stage 3 (else 1).

tests/distributed/test_plan_engines.py compares the formulas of masked and compact mode with engines of two ranks. They
agree to 5 % of the sum over all terms that are not marked as estimates.
"""

from dataclasses import dataclass

from piece_ds.ops.sampling_rule import DTYPES, max_density_on_gpus
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import ModelShape

# In time: the statistics pass that selects, a backward pass, the optimizer step. A run needs the most of the three.
MOMENTS = ("statistics", "backward", "step")

# DeepSpeed's defaults for stage 3: elements that may be gathered at a time, and elements of a sub-group.
MAX_LIVE, SUB_GROUP = 10**9, 10**9
# Elements of one exchange in the statistics pass; bytes of a selection candidate, and the fewest slots for them.
EXCHANGE_BUCKET, CANDIDATE_BYTES, CANDIDATE_FLOOR = 1 << 25, 12, 1 << 16


@dataclass(frozen=True)
class Term:
    """One thing in memory.

    Attributes:
        name: what it is.
        formula: in the letters of the legend.
        size: bytes on this rank.
        moments: when it is there.
        on_host: in the CPU's memory instead of the accelerator's.
        is_estimate: an upper bound or a rule of thumb, not a sum of tensors.
    """

    name: str
    formula: str
    size: float
    moments: tuple[str, ...] = MOMENTS
    on_host: bool = False
    is_estimate: bool = False


def memory_terms(shape: ModelShape, setting: Setting) -> list[Term]:
    """Return every term for one rank that is not zero."""
    terms = [
        *_state(shape, setting),
        *_gradients(shape, setting),
        *_selection(shape, setting),
        *_working(shape, setting),
    ]
    return [term for term in terms if term.size]


def peak(terms: list[Term], on_host: bool = False) -> tuple[float, str]:
    """Return the most bytes that one rank needs, and the moment at which it needs them."""
    sizes = {moment: total(terms, moment, on_host) for moment in MOMENTS}
    moment = max(sizes, key=lambda name: sizes[name])
    return sizes[moment], moment


def total(terms: list[Term], moment: str, on_host: bool = False) -> float:
    """Return the bytes of all terms that are there at one moment."""
    return sum(term.size for term in terms if moment in term.moments and term.on_host == on_host)


def _state(shape: ModelShape, setting: Setting) -> list[Term]:
    """Return the terms of parameters, fp32 masters and Adam's two moments.

    Stage 0 in fp32 steps the parameters themselves. Everything else keeps masters, even in fp32. Moments appear with
    the first step, after the statistics, except at stage 0 in 16 bits.
    """
    optimised, ranks, size = setting.optimised(shape), setting.optimizer_ranks, setting.itemsize
    # Only plain fp32 training at stage 0 needs no copy of the weights.
    has_masters = setting.zero > 0 or size < 4
    early = MOMENTS if setting.zero == 0 and size < 4 else MOMENTS[1:]
    host = setting.offload_optimizer
    return [
        Term("parameters", "B N / p", size * shape.total / setting.parameter_ranks, on_host=setting.offload_param),
        Term(
            "parameters added",
            "B T / p",
            size * setting.added(shape) / setting.parameter_ranks,
            on_host=setting.offload_param,
        ),
        Term("fp32 masters", "4 T / w", 4 * optimised / ranks if has_masters else 0, on_host=host),
        Term("Adam moments", "8 T / w", 8 * optimised / ranks, early, on_host=host),
    ]


def _gradients(shape: ModelShape, setting: Setting) -> list[Term]:
    """Return the terms of gradients kept until the step, and of the fp32 copy that the step makes.

    Stage 0 keeps whole gradients. Stage 1 reduces at the last micro-batch of a step, and keeps them whole until then.
    Stages 2 and 3 add up the reduced partition in fp32. Compact mode keeps K fp32 sums on every rank besides its
    partition.
    """
    if setting.update_mode == "compact":
        k = setting.selected(shape)
        whole = _formed_whole(shape, setting)
        return [
            Term("gradient of the selected", "4 K", 4 * k, MOMENTS[1:]),
            Term(
                "... their partition",
                "4 K / w",
                4 * k / setting.optimizer_ranks,
                MOMENTS[1:],
                on_host=setting.offload_optimizer,
            ),
            Term("a gradient formed whole", "B largest", setting.itemsize * whole, ("backward",), is_estimate=True),
        ]

    # Every other mode, by stage.
    optimised, ranks, size, zero = setting.optimised(shape), setting.optimizer_ranks, setting.itemsize, setting.zero
    part, backward, step = optimised / ranks, ("backward",), ("step",)
    if zero == 0:
        return [
            Term("gradients", "B T", size * optimised, MOMENTS[1:]),
            Term("fp32 gradients", "4 T", 4 * optimised if size < 4 else 0, step),
        ]

    # Offloading keeps the reduced partition on the CPU.
    if setting.offload_optimizer:
        return _offloaded_gradients(shape, setting, part)
    if zero == 1:
        whole = setting.accumulation > 1
        return [
            Term("gradients", "B T" if whole else "B T / w", size * (optimised if whole else part), backward),
            Term("fp32 gradients", "4 T / w", 4 * part, step),
        ]
    if zero == 2:
        return [Term("fp32 gradients", "4 T / w", 4 * part, MOMENTS[1:])]
    return [
        Term("fp32 gradients", "4 T / w", 4 * part),
        Term("fp32 gradients of a sub-group", "4 min(T / w, 1e9)", 4 * min(part, SUB_GROUP), step),
    ]


def _formed_whole(shape: ModelShape, setting: Setting) -> int:
    """Return the elements of the largest gradient that compact mode forms whole, on GPUs and if selected evenly."""
    if setting.selected_gradient == "dense":
        return shape.largest
    dtype, density = DTYPES[setting.dtype], setting.selected(shape) / max(1, shape.eligible)
    dense = (numel for numel, matrix in shape.products if density > max_density_on_gpus(dtype, matrix))
    return max(shape.formed_whole, *dense, 0)


def _offloaded_gradients(shape: ModelShape, setting: Setting, part: float) -> list[Term]:
    """Return the terms of gradients with the optimizer on the CPU.

    Stages 1 and 2 keep on the CPU: the masters' gradients, a copy of the updated parameters, sums over micro-batches if
    there are several, and a buffer of the largest parameter, which the device has too. Stage 3 keeps its flat buffer
    and the masters' gradients.
    """
    size = setting.itemsize
    if setting.zero == 3:
        return [
            Term("fp32 gradients", "4 T / w", 4 * part, on_host=True),
            Term("fp32 gradients of the masters", "4 T / w", 4 * part, on_host=True),
        ]
    accumulated = (4 if setting.zero == 2 else size) * part if setting.accumulation > 1 else 0
    return [
        Term("fp32 gradients of the masters", "4 T / w", 4 * part, on_host=True),
        Term("gradients of earlier micro-batches", "4 T / w", accumulated, MOMENTS[1:], on_host=True),
        Term("updated parameters, before their copy", "B T / w", size * part, on_host=True),
        Term("buffer of the largest parameter", "B largest", size * shape.largest, on_host=True),
        Term("buffer of the largest parameter", "B largest", size * shape.largest),
    ]


def _selection(shape: ModelShape, setting: Setting) -> list[Term]:
    """Return the terms of statistics, candidates, and positions of the selected elements.

    Masked mode keeps int64 positions in gradients and in masters, on the device and on the CPU, besides the mask's own.
    Compact mode keeps on the device int32 positions in the weights and int64 positions in the masters. On the CPU it
    keeps all of them and the mask's.
    """
    k = setting.selected(shape)
    if not k:
        return []

    # What a rank owns, and how much room candidates get.
    owned, statistics = shape.eligible / setting.world, MOMENTS[:1]
    sums, letters = (2, "8 E / W") if setting.method == "piece-s" else (1, "4 E / W")
    # A rank cannot have more candidates than elements.
    room = min(owned, 4 * k + CANDIDATE_FLOOR)
    bucket = min(EXCHANGE_BUCKET, shape.eligible)

    # Where positions are kept depends on the update mode.
    part = k / setting.optimizer_ranks
    compact = setting.update_mode == "compact"
    return [
        Term("statistics", letters, 4 * sums * owned, statistics),
        Term(
            "gradients in exchange",
            "B (largest + 2 min(2^25, E))",
            setting.itemsize * (shape.together + 2 * bucket),
            statistics,
            is_estimate=True,
        ),
        Term("candidates", "12 min(4 K, E / W)", CANDIDATE_BYTES * room, statistics, is_estimate=True),
        Term(
            "positions",
            ("16 K / p + 8 K / w" if setting.zero == 3 else "8 K + 8 K / w") if compact else "16 K / w",
            # Where the selected weights lie, 8 bytes each; under ZeRO-3 also which values go to this rank.
            (16 * k / setting.parameter_ranks if setting.zero == 3 else 8 * k) + 8 * part if compact else 16 * part,
            MOMENTS[1:],
        ),
        Term(
            "positions, on the CPU",
            "8 K + 4 K / p + 8 K / W" if compact else "8 K / W + 8 K / w",
            8 * k / setting.world + (8 * k + 4 * k / setting.parameter_ranks if compact else 8 * part),
            MOMENTS[1:],
            on_host=True,
        ),
    ]


def _working(shape: ModelShape, setting: Setting) -> list[Term]:
    """Return the terms of buckets, gathered parameters and activations.

    transformers sets the bucket to hidden^2 elements. Stages 1 and 2 have two buckets, made when backward begins. Stage
    3 may hold 1e9 gathered elements at a time, or all experts of a layer if they are more. Activations are those of
    gradient checkpointing: the input of each layer, the inside of one layer, and the logits in the model's dtype, in
    fp32, and their gradient. General text beside a micro-batch adds its layers' inputs and its logits to the same
    graph. The divergence from the base model holds five fp32 values for each of its tokens and words (measured).

    Source: the inside of a layer is 34 bytes per token and unit of hidden at 16 bits, without the attention matrix
        (Korthikanti et al. 2022).
    """
    size, tokens, hidden = setting.itemsize, setting.tokens, shape.hidden
    inside = 17 * size * tokens * hidden
    layers = size * tokens * hidden * shape.layers + inside
    reduces = setting.update_mode != "compact" or setting.zero == 3  # stage 3 makes its bucket whatever it optimises
    bucket = {1: 2 * size, 2: 2 * size, 3: 4}.get(setting.zero, 0) * hidden**2
    # One rank, or a lower stage, holds whole parameters anyway.
    live = min(shape.total, max(MAX_LIVE, shape.together))
    gathered = size * live if setting.zero == 3 and setting.world > 1 else 0
    experts = shape.experts
    # Each token's row goes in and out of its experts, and has three inner rows in each.
    routed = size * tokens * experts.per_token * (2 * hidden + 3 * experts.width) if experts else 0
    forward = MOMENTS[:2]
    return [
        Term(
            "reduce buckets",
            "2 B hidden^2" if setting.zero < 3 else "4 hidden^2",
            bucket * reduces,
            MOMENTS if setting.zero == 3 else ("backward",),
        ),
        Term("gathered parameters, at most", "B min(N, max(1e9, layer))", gathered, forward, is_estimate=True),
        Term("activations", "B tokens hidden (layers + 17)", layers, forward, is_estimate=True),
        Term("rows of experts", "B tokens top (2 hidden + 3 width)", routed, forward, is_estimate=True),
        Term("logits", "(B + 8) tokens vocab", (size + 8) * tokens * shape.vocab, forward, is_estimate=True),
        Term(
            "general text beside a micro-batch",
            "(B hidden layers + (B + 28) vocab) general",
            (size * hidden * shape.layers + (size + 28) * shape.vocab) * setting.general_tokens,
            MOMENTS[1:2],
            is_estimate=True,
        ),
    ]
