"""Engines on which training with a statistics pass in between must equal training without it."""

from support.engines import FP32_ACCUMULATION, Setup
from support.statistics_cases import OFFLOADS

UNDISTURBED = {f"stage{s}": Setup(s) for s in range(4)} | OFFLOADS
UNDISTURBED |= {f"bf16-stage{s}": Setup(s, "bf16") for s in range(4)}
UNDISTURBED |= {
    "bf16-stage1-bf16-optimizer": Setup(1, "bf16", config=FP32_ACCUMULATION),
    "bf16-stage2-fp32-accumulation": Setup(2, "bf16", config=FP32_ACCUMULATION),
    "bf16-stage3-fp32-accumulation": Setup(3, "bf16", config=FP32_ACCUMULATION),
    "bf16-stage2-offload": Setup(2, "bf16", "optimizer"),
    "bf16-stage3-offload-all": Setup(3, "bf16", "all"),
    "stage2-overlap": Setup(2, zero={"overlap_comm": True, "reduce_bucket_size": 3000}),
    "stage3-overlap": Setup(3, zero={"overlap_comm": True, "reduce_bucket_size": 3000}),
    "stage2-not-contiguous": Setup(2, zero={"contiguous_gradients": False}),
    "stage3-hpz": Setup(3, zero={"zero_hpz_partition_size": 2}),
}
UNDISTURBED |= {f"fp16-stage{s}": Setup(s, "fp16") for s in (1, 2, 3)}
