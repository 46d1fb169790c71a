"""Define the flags of the methods: how weights are chosen and updated, and what the methods without a mask need."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from piece_ds.config.piece import FieldError, PieceConfig, split_patterns
from piece_ds.config.ranges import MAX_SHARE, has_good_share, require_not_negative, require_positive
from piece_ds.runtime.errors import UserError

# The only place of defaults: flags, callback and library calls share them.
_DEFAULT = PieceConfig()
# Fields of PieceConfig whose flags have another name.
_FLAG_OF = {"ratio": "mask_ratio"}


@dataclass
class MethodArguments:
    """How the weights to train are chosen and updated: PieceConfig as flags, and files."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "set several flags to what was measured to keep most: mask (1 %% of the weights), wide (10 %%, at "
            "random), full (all of them) or paper (PIECE-S, 0.1 %%); other flags win over it"
        },
    )
    method: str = field(
        default=_DEFAULT.method, metadata={"help": "how weights are chosen, or a method without a mask"}
    )
    mask_ratio: float = field(
        default=_DEFAULT.ratio, metadata={"help": "selected elements / elements of the model, in (0, 1]"}
    )
    mask_file: str | None = field(default=None, metadata={"help": "use this mask instead of estimating one"})
    update_mode: str = field(
        default=_DEFAULT.update_mode,
        metadata={"help": "compact: optimise only the selected values; masked: every weight, and mask the gradient"},
    )
    selected_gradient: str = field(
        default=_DEFAULT.selected_gradient,
        metadata={
            "help": "compact mode: auto: linear layers form only their selected gradients; dense: autograd forms all"
        },
    )
    budget: str = field(default=_DEFAULT.budget, metadata={"help": "what shares one top-k: model, layer or tensor"})
    unit: str = field(
        default=_DEFAULT.unit,
        metadata={
            "help": "what competes: element; row or column: whole output rows or input columns of matrices, by the "
            "mean score of their elements"
        },
    )
    importance_batch_size: int = field(
        default=_DEFAULT.importance_batch_size, metadata={"help": "rows in a micro-batch of the statistics pass"}
    )
    importance_rows: int | None = field(
        default=None,
        metadata={
            "help": "the statistics pass reads only the first N rows of the task's file, which should not be sorted; "
            "32 chose as good a mask as 256 (docs/cost.md)"
        },
    )
    importance_lambda: float = field(
        default=_DEFAULT.importance_lambda, metadata={"help": "lambda in |sum g| / sqrt(sum g^2 + lambda)"}
    )
    statistics_device: str = field(
        default=_DEFAULT.statistics_device, metadata={"help": "auto (the accelerator) or cpu"}
    )
    statistics_file: str | None = field(
        default=None, metadata={"help": "folder of saved statistics: read when it exists, else written"}
    )
    statistics_save_steps: int = field(
        default=0,
        metadata={"help": "keep the sums every N rounds of micro-batches, to resume from; 0: only upon a signal"},
    )

    step_scale: str = field(
        default=_DEFAULT.step_scale,
        metadata={
            "help": "none, or general: weight i moves by sqrt(d / (F + d)) of its step, F its mean squared gradient on "
            "general text and d the median of F; every method that trains the model's own weights"
        },
    )
    damping_quantile: float = field(
        default=_DEFAULT.damping_quantile,
        metadata={
            "help": "quantile of general text's importance that damps divisions by it, in piece-ratio, piece-gain, "
            "piece-ratio-activation and --step_scale general; 0.5: the median"
        },
    )
    general_replay: float = field(
        default=0.0,
        metadata={
            "help": "S in [0, 1]: round(S * rows) rows of general text, at least one, join each micro-batch; the loss "
            "is the task's mean plus S times theirs; 0: none"
        },
    )
    general_kl: float = field(
        default=0.0,
        metadata={
            "help": "BETA: the loss gains BETA times the mean KL(base model || model) over the tokens of general text "
            "beside each micro-batch: the rows of --general_replay, or without it a quarter of the micro-batch's; "
            "--general_share takes more; 0: none"
        },
    )
    general_share: float | None = field(
        default=None,
        metadata={
            "help": "round(this * rows) rows of general text, at least one, join each micro-batch for --general_replay "
            "and --general_kl; more rows keep more and cost as much time; without it S, or 0.25 without replay"
        },
    )
    lift_rank: int | None = field(
        default=None, metadata={"help": "lift: rank of the approximation; without it 1/32 of a matrix's shorter side"}
    )
    general_statistics: str | None = field(
        default=None,
        metadata={
            "help": "piece-ratio: folder of the base model's statistics of --general_text, kept there "
            "for other runs; without it OUTPUT_DIR/general_statistics"
        },
    )

    forgetting_budget: float | None = field(
        default=None,
        metadata={
            "help": "nats: scale each task's change down until the loss on one half of --general_file, or "
            "of a held out part of --general_text, rises no more, its standard error over rows included; results.json "
            "reports both halves"
        },
    )

    def __post_init__(self) -> None:
        budget = self.forgetting_budget
        if budget is not None and not (isfinite(budget) and budget >= 0):
            raise UserError(f"--forgetting_budget must be 0 or more nats, got {budget}")

        # PieceConfig checks the ranges that it knows; its message then names the flag instead of the field.
        try:
            self.config()
        except FieldError as error:
            raise UserError(f"--{_FLAG_OF.get(error.field, error.field)} {error.reason}") from None
        if not 0.0 <= self.general_replay <= 1.0:
            raise UserError(f"--general_replay must be in [0, 1], got {self.general_replay}")
        if not (isfinite(self.general_kl) and self.general_kl >= 0):
            raise UserError(f"--general_kl must be 0 or more, got {self.general_kl}")
        if not has_good_share(self.general_share):
            raise UserError(f"--general_share must be above 0 and at most {MAX_SHARE:g}, got {self.general_share}")
        if self.statistics_save_steps < 0:
            raise UserError(f"--statistics_save_steps must be 0 or more, got {self.statistics_save_steps}")

    def config(self, seed: int = 42, exclude: str | None = None, save_full: bool = False) -> PieceConfig:
        """Return what these flags, together with those of other groups, say of the method.

        Args:
            seed, exclude, save_full: from the other groups.
        """
        return PieceConfig(
            method=self.method,
            ratio=self.mask_ratio,
            budget=self.budget,
            unit=self.unit,
            importance_batch_size=self.importance_batch_size,
            importance_rows=self.importance_rows,
            importance_lambda=self.importance_lambda,
            statistics_device=self.statistics_device,
            lift_rank=self.lift_rank,
            exclude=split_patterns(exclude),
            update_mode=self.update_mode,
            selected_gradient=self.selected_gradient,
            step_scale=self.step_scale,
            damping_quantile=self.damping_quantile,
            save_full=save_full,
            seed=seed,
        )


# Setting of the methods without a mask -> the methods that read it.
READERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("ewc_lambda", "ewc_decay"), ("ewc",)),
    "memory_ratio": ("gem", "replay", "replay-online"),
    "gem_margin": ("gem",),
    **dict.fromkeys(("lwf_weight", "lwf_temperature"), ("lwf",)),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), ("lora", "o-lora")),
    "peft_config": ("peft",),
    "o_lora_lambda": ("o-lora",),
}


def _read(name: str, default: Any, meaning: str) -> Any:
    """Return the field of a setting, whose help begins with the methods that read it."""
    return field(default=default, metadata={"help": f"{', '.join(READERS[name])}: {meaning}"})


@dataclass
class BaselineArguments:
    """What the methods without a mask need; each reads its own."""

    ewc_lambda: float = _read("ewc_lambda", 400.0, "weight of the quadratic penalty")
    ewc_decay: float = _read("ewc_decay", 1.0, "what is left of earlier tasks' Fisher, in (0, 1]")
    memory_ratio: float = _read("memory_ratio", 0.1, "share of each earlier task's rows that is kept")
    gem_margin: float = _read("gem_margin", 0.5, "least weight of a violated task's gradient")
    lwf_weight: float = _read("lwf_weight", 1.0, "weight of the distillation loss")
    lwf_temperature: float = _read("lwf_temperature", 2.0, "temperature of both distributions")
    lora_r: int = _read("lora_r", 8, "rank")
    lora_alpha: int = _read("lora_alpha", 32, "scaling is lora_alpha / lora_r")
    lora_dropout: float = _read("lora_dropout", 0.1, "dropout before the first factor")
    lora_target_modules: str = _read(
        "lora_target_modules", "all-linear", "comma-separated names as in peft, or all-linear"
    )
    peft_config: str | None = _read(
        "peft_config", None, "JSON or YAML file of a PEFT method, as PEFT's adapter_config.json"
    )
    o_lora_lambda: float = _read("o_lora_lambda", 0.5, "weight of the orthogonality penalty")

    def __post_init__(self) -> None:
        for name in ("lwf_temperature", "lora_r", "lora_alpha", "ewc_decay", "memory_ratio"):
            require_positive(name, getattr(self, name))
        for name in ("ewc_decay", "memory_ratio"):
            if getattr(self, name) > 1:
                raise UserError(f"--{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("ewc_lambda", "gem_margin", "lwf_weight", "o_lora_lambda"):
            require_not_negative(name, getattr(self, name))
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")
