"""What a plan is for: how a model is trained."""

from dataclasses import dataclass

from piece_ds.plan.shapes import ModelShape
from piece_ds.runtime.errors import UserError

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setting:
    """How a model is trained. Attributes are the flags of `piece_ds plan`; DeepSpeed is configured as in ds_configs/.

    Attributes:
        world: ranks.
        zero: ZeRO stage.
        update_mode: masked, compact, full (everything is trained) or lora (on all Linear modules but the head).
        dtype: of the parameters.
        ratio: selected elements / elements of the model.
        method: piece-s keeps two statistics, piece-f one.
        offload_optimizer, offload_param: to the CPU.
        tokens: of a micro-batch on one rank.
        general_tokens: of the general text that --general_kl or --general_replay add to a micro-batch.
        accumulation: micro-batches per optimizer step on one rank.
        lora_rank: of update_mode lora.
        selected_gradient: of update_mode compact: auto samples where that is faster, dense forms every one whole.
    Raises:
        UserError: a value is out of its range, or offloading does not fit the stage.
    """

    world: int = 1
    zero: int = 3
    update_mode: str = "compact"
    dtype: str = "bf16"
    ratio: float = 0.001
    method: str = "piece-s"
    offload_optimizer: bool = False
    offload_param: bool = False
    tokens: int = 2048
    general_tokens: int = 0
    accumulation: int = 1
    lora_rank: int = 32
    selected_gradient: str = "auto"

    def __post_init__(self) -> None:
        for name in ("world", "tokens", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.general_tokens < 0:
            raise UserError(f"--general_tokens must be 0 or more, got {self.general_tokens}")
        if not 0.0 < self.ratio <= 1.0:
            raise UserError(f"--ratio must be in (0, 1], got {self.ratio}")
        if self.offload_param and self.zero != 3:
            raise UserError(f"--offload_param needs --zero 3, where parameters are sharded; got --zero {self.zero}")
        if self.offload_optimizer and self.zero == 0:
            raise UserError("--offload_optimizer needs --zero 1, 2 or 3: stage 0 has no ZeRO optimizer")

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter's element."""
        return BYTES[self.dtype]

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that share masters, moments and reduced gradients: all of them from stage 1."""
        return self.world if self.zero >= 1 else 1

    @property
    def parameter_ranks(self) -> int:
        """Ranks that share the parameters: all of them at stage 3."""
        return self.world if self.zero == 3 else 1

    def selected(self, shape: ModelShape) -> int:
        """Return the number of selected elements; 0 if the update mode selects none."""
        return max(1, int(self.ratio * shape.total)) if self.update_mode in ("masked", "compact") else 0

    def added(self, shape: ModelShape) -> int:
        """Return the elements of parameters that the update mode adds to the model's own."""
        return {"lora": self.lora_rank * shape.linear_edges, "compact": self.selected(shape)}.get(self.update_mode, 0)

    def optimised(self, shape: ModelShape) -> int:
        """Return the elements of the parameters that DeepSpeed optimises."""
        return {"masked": shape.eligible, "full": shape.total}.get(self.update_mode, self.added(shape))
