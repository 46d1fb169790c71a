"""The metadata of this package's safetensors files: one schema for all, and how it is filled in."""

import hashlib
import json
from collections.abc import Iterable
from math import isnan, prod
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, Json

from piece_ds.runtime.schema import Count
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout


def _digits(value: object) -> object:
    """Return a whole number's text, if it is plain digits.

    pydantic takes '7.0', '+7' and '1_000' too. Other readers of the same text do not.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        raise ValueError("expected digits alone")
    return value


# A whole number, and a fingerprint of weights, as texts.
Digits = Annotated[Count, BeforeValidator(_digits)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Metadata(BaseModel):
    """The metadata of a mask, delta, statistics or selected-state file. Absent entries are None; unknown ones are kept.

    Attributes:
        format, version, checksum: see artifact.py.
        method, ratio: how the selection was made.
        selected, total: its size and the model's, in elements.
        shapes: parameter name -> shape, for the parameters in the file.
        model_fingerprint: see model_fingerprint().
        base_fingerprint, result_fingerprint: of all weights before and after a delta. A mask has the first: of the
            weights that it was selected on.
        scale: factor of a delta's changes.
        zeros: parameter name -> dtype of the values that a delta leaves out because all are zero.
        packed: parts of a delta that stand in one packed tensor a parameter.
        parent, link: of a delta, see chain_metadata().
        step: of the optimizer. In a delta, how many steps the task had taken; in a best step's file, its own.
        counters: of the engine, in selected-state files.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    format: str
    version: str
    checksum: str | None = None
    method: str = "unknown"
    ratio: float = float("nan")
    selected: Digits | None = None
    total: Digits | None = None
    shapes: Json[dict[str, list[Count]]] | None = None
    model_fingerprint: str | None = None
    base_fingerprint: Fingerprint | None = None
    result_fingerprint: Fingerprint | None = None
    scale: FiniteFloat = 1.0
    zeros: Json[dict[str, str]] | None = None
    packed: Json[list[str]] | None = None
    parent: str | None = None
    link: Digits | None = None
    step: Digits | None = None
    counters: Json[dict[str, float]] | None = None

    def numel(self, name: str) -> int | None:
        """Return the number of elements of a parameter; None if the file does not give its shape."""
        shape = (self.shapes or {}).get(name)
        return None if shape is None else prod(shape)

    def contradiction(self) -> str | None:
        """Return in what the entries contradict each other; None if they do not.

        The ratio is what was asked for, and may differ from what is selected: see load_mask().
        """
        if not (isnan(self.ratio) or 0 < self.ratio <= 1):
            return f"ratio is {self.ratio:g}, expected a share in (0, 1]"
        if self.total is None:
            return None
        described = sum(prod(shape) for shape in (self.shapes or {}).values())
        if max(described, self.selected or 0, 1) > self.total:
            found = f"{described} in its shapes" if described > self.total else f"{self.selected} selected"
            return f"total is {self.total} elements, and there are {found}"
        return None


def model_fingerprint(layout: Layout) -> str:
    """Return the sha256 of every parameter's name and shape, in order.

    It is equal for equal architectures, whatever the weights are.
    """
    structure = [[info.name, list(info.shape)] for info in layout.parameters]
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()


def describe(mask: Mask, names: Iterable[str]) -> dict[str, str]:
    """Return the metadata of a file made for mask, as strings.

    Args:
        mask: of the whole model.
        names: parameters that have something in the file.
    """
    present = set(names)
    shapes = {name: list(shape) for name, shape in mask.layout.shapes().items() if name in present}
    return {
        "method": mask.method,
        "ratio": repr(mask.ratio),
        "selected": str(mask.num_selected),
        "total": str(mask.layout.total),
        "shapes": json.dumps(shapes),
        "model_fingerprint": model_fingerprint(mask.layout),
    }
