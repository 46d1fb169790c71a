"""PieceConfig: how PIECE selects and trains weights, defined once for the flags, PieceCallback and estimate_mask()."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

from piece_ds.runtime.errors import UserError, nearest

UPDATE_MODES = ["compact", "masked"]
SELECTED_GRADIENTS = ["auto", "dense"]
BUDGETS = ["model", "layer", "tensor"]
UNITS = ["element", "row", "column"]
STATISTICS_DEVICES = ["auto", "cpu"]
STEP_SCALES = ["none", "general"]

_CHOICES = {
    "update_mode": UPDATE_MODES,
    "selected_gradient": SELECTED_GRADIENTS,
    "budget": BUDGETS,
    "unit": UNITS,
    "statistics_device": STATISTICS_DEVICES,
    "step_scale": STEP_SCALES,
}
_POSITIVE = ("importance_batch_size", "importance_rows", "importance_lambda", "lift_rank")


class FieldError(UserError):
    """A setting outside its range.

    Attributes:
        field: its name in PieceConfig.
        reason: what was expected and what came, to be read after the name.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True, kw_only=True)
class PieceConfig:
    """Settings of the method. Values are checked when one is made.

    Attributes:
        method: name in methods.registry.METHODS.
        ratio: selected / all elements of the model, in (0, 1].
        budget: what shares one top-k: 'model', 'layer' or 'tensor'.
        unit: what competes: an 'element', or a whole output 'row' or input 'column' of a matrix by the mean score of
            its elements. Units are taken in order while no more than k elements are selected, so there may be fewer.
        importance_batch_size: rows in a micro-batch of the statistics pass.
        importance_rows: the statistics pass reads only the first so many rows of the data; None means all.
        importance_lambda: lambda in |sum g| / sqrt(sum g^2 + lambda).
        statistics_device: 'auto' (the accelerator) or 'cpu'.
        lift_rank: rank of LIFT's approximation; None means 1/32 of a matrix's shorter side.
        exclude: fnmatch patterns of parameters that are never selected; a text with commas is split.
        update_mode: 'compact' (DeepSpeed optimises only the selected values) or 'masked' (it optimises every weight,
            and the gradient is masked).
        selected_gradient: in compact mode, 'auto' (linear layers form only their selected gradients) or 'dense'.
        step_scale: 'none', or 'general': the update of weight i is multiplied by sqrt(d / (F_i + d)), where F is the
            mean squared gradient of general text and d its quantile.
        damping_quantile: the quantile of general text's importance that damps divisions by it, in [0, 1].
        save_full: in compact mode, training checkpoints hold the whole model.
        seed: of everything that is drawn.
    Raises:
        FieldError: a value is outside its range; the error names the field.
    """

    method: str = "piece-s"
    ratio: float = 0.001
    budget: str = "model"
    unit: str = "element"
    importance_batch_size: int = 4
    importance_rows: int | None = None
    importance_lambda: float = 1.0
    statistics_device: str = "auto"
    lift_rank: int | None = None
    exclude: tuple[str, ...] = ()
    update_mode: str = "compact"
    selected_gradient: str = "auto"
    step_scale: str = "none"
    damping_quantile: float = 0.5
    save_full: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", split_patterns(self.exclude))

        # Ranges; `not x > 0` also refuses NaN.
        if not 0.0 < self.ratio <= 1.0:
            raise FieldError("ratio", f"must be in (0, 1], got {self.ratio}")
        if not 0.0 <= self.damping_quantile <= 1.0:
            raise FieldError("damping_quantile", f"must be in [0, 1], got {self.damping_quantile}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise FieldError(name, f"must be positive, got {value}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = f"known: {', '.join(choices)}.{nearest(str(value), choices)}"
                raise FieldError(name, f"{value!r} is unknown; {known}")


def config_of(config: PieceConfig | None, settings: Mapping[str, Any]) -> PieceConfig:
    """Return config with settings in place of its fields; if it is None, the defaults with settings.

    Raises:
        TypeError: a setting does not exist.
        FieldError: a setting is outside its range.
    """
    # A TypeError, as for a keyword that a function does not have.
    known = [field.name for field in fields(PieceConfig)]
    for name in settings:
        if name not in known:
            raise TypeError(f"{name!r} is no setting of PIECE.{nearest(name, known)}")
    return replace(config or PieceConfig(), **settings)


def split_patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return patterns as a tuple. A text is split at its commas, and blanks are removed."""
    if patterns is None:
        return ()
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    return tuple(part.strip() for part in parts if part.strip())
