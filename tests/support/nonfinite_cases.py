"""Engines that meet a gradient with NaN in it: each mode, stage, precision and offload."""

from dataclasses import dataclass

from support.engines import Setup
from support.update_cases import config


@dataclass(frozen=True)
class Poisoned:
    """Three steps, the second with NaN from the second rank's last micro-batch.

    Attributes:
        setup: of DeepSpeed.
        mode: masked, compact, or plain (no mask).
        overflows: the loss scale is too large for the first steps, and nothing is NaN.
        scaled: steps by general importance.
    """

    setup: Setup
    mode: str
    overflows: bool = False
    scaled: bool = False


SETUPS = {f"stage{stage}": Setup(stage) for stage in range(4)}
SETUPS |= {f"bf16-stage{stage}": Setup(stage, "bf16") for stage in range(4)}
SETUPS |= {
    "stage2-offload": Setup(2, offload="optimizer"),
    "bf16-stage1-bf16-optimizer": config(1, "bf16"),
    "bf16-stage2-offload": Setup(2, "bf16", "optimizer"),
    "bf16-stage3-fp32-accumulation": config(3, "bf16"),
    "stage3-offload": Setup(3, offload="optimizer"),
    "bf16-stage3-offload": Setup(3, "bf16", "optimizer"),
    "stage2-no-norm": Setup(2, zero={"compute_grad_norm": False}, config={"gradient_clipping": 0.0}),
}
SETUPS |= {f"fp16-stage{stage}": Setup(stage, "fp16") for stage in (1, 2, 3)}
_TOO_LARGE = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}

CASES = {f"{mode}-{name}": Poisoned(setup, mode) for mode in ("masked", "compact") for name, setup in SETUPS.items()}
CASES |= {f"plain-stage{stage}": Poisoned(Setup(stage), "plain") for stage in (0, 2)}
CASES |= {
    f"{mode}-fp16-stage{stage}-overflow": Poisoned(Setup(stage, "fp16", config=_TOO_LARGE), mode, overflows=True)
    for mode in ("masked", "compact")
    for stage in (1, 2, 3)
}
CASES |= {
    f"{mode}-{name}-scaled": Poisoned(SETUPS[name], mode, scaled=True)
    for mode in ("masked", "compact")
    for name in ("stage0", "bf16-stage2", "stage3-offload")
}

FAST = (
    "masked-stage0",
    "masked-bf16-stage2-scaled",
    "masked-stage3",
    "masked-fp16-stage3-overflow",
    "compact-bf16-stage1",
    "compact-bf16-stage3",
    "compact-stage3-offload-scaled",
    "plain-stage0",
)
