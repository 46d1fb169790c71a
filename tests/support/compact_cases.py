"""The cases of compact training: beside those of masked training, scoring on the same engine, and resuming."""

from dataclasses import dataclass

from support.engines import FP32_ACCUMULATION, Setup
from support.update_cases import config

RATIO = 0.05


@dataclass(frozen=True)
class Whole:
    """A task on one engine: statistics, selection, three steps; in compact and in masked mode.

    Attributes:
        family: of the model.
        setup: of DeepSpeed.
        checkpointing: '', 'reentrant' or 'non-reentrant'.
        ratio: of selected weights.
        unit: what competes; with rows and columns there is room for more than are selected.
    """

    family: str
    setup: Setup
    checkpointing: str = ""
    ratio: float = RATIO
    unit: str = "element"


def exact(stage: int) -> Setup:
    """bf16 with fp32 gradients where DeepSpeed offers them: then both modes give the same bits."""
    return config(stage, "bf16")


# On one, two and three ranks.
EVERYWHERE = {
    f"{family}-stage{stage}": Whole(family, Setup(stage)) for family in ("llama", "qwen3") for stage in range(4)
}
# One weight: all ranks but one have nothing but padding.
EVERYWHERE |= {f"one-weight-stage{stage}": Whole("qwen3", Setup(stage), ratio=1e-9) for stage in (1, 2, 3)}
EVERYWHERE |= {f"columns-llama-stage{stage}": Whole("llama", Setup(stage), unit="column") for stage in range(4)}
# On two ranks: tied embeddings, biases, gradient checkpointing, offload.
WHOLE = EVERYWHERE | {
    "rows-gpt2-stage3": Whole("gpt2", Setup(3), unit="row"),
    "columns-neox-stage2-offload": Whole("neox", Setup(2, offload="optimizer"), unit="column"),
    "bf16-columns-qwen3-stage3": Whole("qwen3", exact(3), unit="column"),
    "gemma2-stage3": Whole("gemma2", Setup(3)),
    "neox-stage2": Whole("neox", Setup(2)),
    "gpt2-stage3": Whole("gpt2", Setup(3)),
    "qwen3-stage3-offload-all": Whole("qwen3", Setup(3, offload="all")),
    "neox-stage2-offload": Whole("neox", Setup(2, offload="optimizer")),
    "llama-stage3-hpz-all-persistent": Whole(
        "llama",
        Setup(3, zero={"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 10**6}),
    ),
    "llama-stage3-all-persistent": Whole("llama", Setup(3, zero={"stage3_param_persistence_threshold": 10**6})),
    "bf16-llama-stage2": Whole("llama", exact(2)),
    "bf16-qwen3-stage3": Whole("qwen3", exact(3)),
    "bf16-neox-stage1-bf16-optimizer": Whole("neox", exact(1)),
    "bf16-qwen3-stage3-offload-all": Whole("qwen3", Setup(3, "bf16", "all", config=FP32_ACCUMULATION)),
}
WHOLE |= {
    f"{how}-checkpointing-{family}-stage{stage}": Whole(family, Setup(stage), how)
    for how in ("reentrant", "non-reentrant")
    for family, stage in (("llama", 0), ("qwen3", 2), ("llama", 3))
}

# Two steps, a checkpoint, two more steps; and the last two again on a fresh engine.
RESUMED = {f"stage{stage}": Setup(stage) for stage in range(4)}
RESUMED |= {f"bf16-stage{stage}": Setup(stage, "bf16") for stage in range(4)}
RESUMED |= {
    "bf16-stage1-bf16-optimizer": exact(1),
    "bf16-stage3-fp32-accumulation": exact(3),
    "stage2-offload": Setup(2, offload="optimizer"),
    "stage3-offload-all": Setup(3, offload="all"),
    "stage3-hpz": Setup(3, zero={"zero_hpz_partition_size": 2}),
    "fp16-stage2": Setup(2, "fp16"),
    "fp16-stage3": Setup(3, "fp16"),
}
SCALED = ("bf16-stage3-fp32-accumulation", "stage2-offload")  # resumed with steps by general importance, too
FULL = ("stage0", "stage1", "stage2", "stage3", "bf16-stage3-fp32-accumulation", "stage3-offload-all", "stage3-hpz")

# What the fast tests run, of all of the above and of update_cases: every stage, wrapper, offload and precision once.
FAST = {
    "stage0",
    "stage1-offload",
    "stage2",
    "stage2-round-robin",
    "stage2-two-groups",
    "stage3",
    "stage3-hpz",
    "stage3-offload-all",
    "bf16-stage0",
    "bf16-stage1-bf16-optimizer-two-groups",
    "bf16-stage2-fp32-accumulation",
    "bf16-stage3-fp32-accumulation",
    "bf16-stage3-offload-fp32-accumulation",
    "fp16-stage2-offload",
    "fp16-stage2-overflow",
    "fp16-stage3-overflow",
    "stage2-scaled",
    "bf16-stage3-fp32-accumulation-scaled",
    "fp16-stage2-overflow-scaled",
}
FAST_WHOLE = {
    "one-weight-stage3",
    "llama-stage0",
    "columns-neox-stage2-offload",
    "bf16-qwen3-stage3",
    "reentrant-checkpointing-llama-stage3",
    "non-reentrant-checkpointing-qwen3-stage2",
    "bf16-neox-stage1-bf16-optimizer",
}
FAST_SAMPLED = {
    "llama-stage3-all-persistent",
    "gpt2-stage3",
    "bf16-qwen3-stage3",
    "reentrant-checkpointing-llama-stage3",
    "non-reentrant-checkpointing-qwen3-stage2",
    "non-reentrant-checkpointing-llama-stage3",
    "qwen3-stage3-offload-all",
}
FAST_RESUMED = {"stage0", "stage2-offload-scaled", "bf16-stage3-fp32-accumulation"}
RESUMED |= {f"{name}-scaled": RESUMED[name] for name in SCALED}
FAST_FULL = {"stage3-hpz"}
