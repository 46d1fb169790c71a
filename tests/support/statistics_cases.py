"""The cases of the statistics pass, and what each must give."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from unittest import mock

from torch import Tensor, nn

from support import vision
from support.engines import DTYPES, FP32_ACCUMULATION, Setup
from support.models import FAMILIES, cast_parameters, embedding_name, make_micro_batches, make_model
from support.oracle import Arrays, gradient_sums

RATIOS = (0.05, 0.002)
METHODS = ("piece-f", "piece-s")
STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One statistics pass.

    Attributes:
        family: of the model.
        setup: of DeepSpeed.
        checkpointing: '', 'reentrant' or 'non-reentrant'.
        freeze: freeze the embeddings, as training does.
        dropout: rate that the model would use in training.
        poison: make some gradient entries NaN, through an infinite input.
        in_eval_mode: the engine is in evaluation mode when the pass begins.
        num_batches: micro-batches.
        eligible: what --eligible would say of a vision-language model.
        bucket_elements: gradients exchanged at a time; 0 means the package's own, which holds all of a tiny model.
        nondeterministic: 'forward' or 'backward': torch refuses an operation in the middle of it, as it may on CUDA.
    """

    family: str
    setup: Setup
    checkpointing: str = ""
    freeze: bool = False
    dropout: float = 0.0
    poison: bool = False
    in_eval_mode: bool = False
    num_batches: int = 7
    eligible: str = ""
    bucket_elements: int = 0
    nondeterministic: str = ""

    def batches(self) -> list[dict[str, Tensor]]:
        batches = make_micro_batches(self.family, self.num_batches)
        if self.poison:
            batches[2]["x"][0, 1] = float("inf")
            batches[5]["x"][2, 4] = float("nan")
        return batches


# Every family at every stage, on one, two and three ranks.
PLAIN = {f"{family}-stage{s}": Case(family, Setup(s)) for family in FAMILIES for s in STAGES}
PLAIN |= {f"branches-stage{s}": Case("branches", Setup(s)) for s in STAGES}

# Vision-language models: conv patch and position embeddings, grids of varying size, micro-batches without an image.
VISION = {f"{family}-stage{s}": Case(family, Setup(s), freeze=True) for family in vision.FAMILIES for s in (0, 2, 3)}

OFFLOADS = {
    "stage1-offload": Setup(1, offload="optimizer"),
    "stage2-offload": Setup(2, offload="optimizer"),
    "stage3-offload": Setup(3, offload="optimizer"),
    "stage3-offload-all": Setup(3, offload="all"),
}

# On two ranks.
SPECIAL = {name: Case("llama", setup) for name, setup in OFFLOADS.items()}
SPECIAL |= {f"bf16-stage{s}": Case("llama", Setup(s, "bf16")) for s in STAGES}
SPECIAL |= {
    "bf16-stage1-bf16-optimizer": Case("llama", Setup(1, "bf16", config=FP32_ACCUMULATION)),
    "bf16-stage2-offload": Case("llama", Setup(2, "bf16", "optimizer")),
    "bf16-stage3-offload-all": Case("gemma2", Setup(3, "bf16", "all")),
}
SPECIAL |= {f"fp16-stage{s}": Case("llama", Setup(s, "fp16")) for s in (1, 2, 3)}
SPECIAL |= {
    f"{how}-checkpointing-stage{s}": Case(family, Setup(s), checkpointing=how, freeze=True)
    for how in ("reentrant", "non-reentrant")
    for s, family in ((0, "llama"), (2, "qwen3"), (3, "llama"))
}
SPECIAL |= {
    "dropout-stage0": Case("neox", Setup(0), dropout=0.3),
    "dropout-stage3": Case("llama", Setup(3), dropout=0.3, in_eval_mode=True),
    "poison-stage0": Case("branches", Setup(0), poison=True),
    "poison-stage3": Case("branches", Setup(3), poison=True),
    "one-micro-batch-stage3": Case("llama", Setup(3), num_batches=1),
    "eight-micro-batches-stage2": Case("llama", Setup(2), num_batches=8),
    "small-buckets-stage0": Case("neox", Setup(0), bucket_elements=100),
    "small-buckets-stage2": Case("qwen3", Setup(2), bucket_elements=1000),
    "small-buckets-stage3": Case("llama", Setup(3), bucket_elements=300),
    "small-buckets-branches-stage0": Case("branches", Setup(0), bucket_elements=5),
    "small-buckets-branches-stage3": Case("branches", Setup(3), bucket_elements=5),
    "frozen-embedding-stage3": Case("neox", Setup(3), freeze=True),
}
NONDETERMINISTIC = {
    f"nondeterministic-{where}-stage{s}": Case("llama", Setup(s), nondeterministic=where)
    for s in (0, 2, 3)
    for where in ("forward", "backward")
}
SPECIAL |= NONDETERMINISTIC

BLOCKS = "*.0.*norm1*"  # of the first block of either tower, and nothing before it
for _family in vision.FAMILIES:
    SPECIAL |= {
        f"small-buckets-{_family}-stage3": Case(_family, Setup(3), freeze=True, bucket_elements=300),
        f"whole-{_family}-stage3": Case(_family, Setup(3), freeze=True, eligible="*vis*", checkpointing="reentrant"),
        f"blocks-{_family}-stage3": Case(_family, Setup(3), freeze=True, eligible=BLOCKS, checkpointing="reentrant"),
    }
SPECIAL |= {
    "whole-llava-stage0": Case("llava", Setup(0), freeze=True, eligible="*vis*"),
    "whole-qwen3-vl-stage2": Case("qwen3-vl", Setup(2), freeze=True, eligible="*vis*"),
    "unfrozen-llava-stage2": Case("llava", Setup(2)),
    "bf16-qwen3-vl-stage3": Case("qwen3-vl", Setup(3, "bf16"), freeze=True),
}


@cache
def oracle_of(case: Case) -> tuple[Arrays, Arrays, int]:
    """(G, F, number of elements of the model) by plain PyTorch, without DeepSpeed, dropout or checkpointing."""
    model = cast_parameters(make_model(case.family), DTYPES[case.setup.dtype])
    sums, squares = _sums_of(case, model)
    return sums, squares, sum(p.numel() for p in model.parameters())


@cache
def fp64_sums_of(case: Case) -> tuple[Arrays, Arrays]:
    """(G, F) of an fp32 case whose linear layers multiply in fp64: as far from plain PyTorch as its own rounding."""
    with mock.patch.object(nn.Linear, "forward", _linear_in_fp64):
        return _sums_of(case, make_model(case.family))


def _linear_in_fp64(self: nn.Linear, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.double()
    return nn.functional.linear(x.double(), self.weight.double(), bias).to(x.dtype)


def _sums_of(case: Case, model: nn.Module) -> tuple[Arrays, Arrays]:
    scale = 1024.0 if case.setup.dtype == "fp16" else 1.0
    batches = case.batches()
    if case.family in vision.FAMILIES:
        if case.setup.dtype == "fp32":  # else roundings of another padding would be all that is compared
            batches = vision.plain_micro_batches(case.family, case.num_batches)
        for name, param in model.named_parameters():
            if vision.is_in_tower(case.family, name) and not (case.eligible and fnmatchcase(name, case.eligible)):
                param.requires_grad_(False)
    return gradient_sums(model, batches, embedding_name(case.family), scale)


Setup.__hash__ = lambda self: hash(repr(self))  # type: ignore[method-assign] - dicts inside, never changed

# On three ranks make test takes a plain and a branching model through every stage, and make test-all the others too.
THREE_RANKS = tuple(name for name in PLAIN if name.startswith(("llama-", "branches-")))
EVERY = "every"  # asks the job for those others
