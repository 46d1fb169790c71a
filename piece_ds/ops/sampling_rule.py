"""Find the largest density at which a weight's gradient is sampled: a rule over a table of measurements.

The table is a file of the package, so the same code, provider and kind of device always choose the same way.
kernels/bench/gradient_table.py measures its rows. A row says how many times faster the sampled gradient was than the
dense product, at one shape and density. Its time falls at most in proportion to the number of elements. So a row with
ratio r at density d proves every density up to d r, and a row with a ratio below 1 forbids everything from d on.

At one density the ratio grows with the weight: a dense product costs tokens x out x in, the transpositions before a
sampled one only tokens x (out + in), and a small weight is bound by launches. So a weight follows the largest measured
size that it reaches, and the smallest measured one if it reaches none.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from piece_ds import ops
from piece_ds.ops.backends import providers

TABLE = Path(__file__).parent / "sampled_gradients.csv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        device: kind of device, such as 'nvidia-h200' or 'cpu'.
        provider: of the op.
        dtype: of the layer's input and weight, a key of DTYPES.
        tokens, out, in_: sizes of the layer and its input.
        density: selected / all elements of the weight.
        ratio: dense product's time / sampled gradient's time.
    """

    device: str
    provider: str
    dtype: str
    tokens: int
    out: int
    in_: int
    density: float
    ratio: float


def max_density(device: torch.device | str, dtype: torch.dtype, num_elements: int) -> float:
    """Return the density up to which a weight of dtype on device gets its gradient sampled; 0 means never.

    Args:
        num_elements: of the weight; of one expert if experts are stacked.

    A kind of GPU that was not measured follows the rows of all that were. fp16 follows bf16, which moves as many bytes.

    Raises:
        UserError: there are no ops for this type of device.
    """
    device = torch.device(device)
    provider = ops.provider("sampled_gradient_", device.type)
    kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").lower()
    rows = rows_for(read_table(TABLE), kind, provider, dtype)
    return largest_proven(of_size(rows, num_elements))


def max_density_on_gpus(dtype: torch.dtype, num_elements: int) -> float:
    """Return max_density() on a GPU that was not measured, with the default provider. No GPU is needed."""
    return largest_proven(of_size(rows_for(read_table(TABLE), "", providers("cuda")[0], dtype), num_elements))


def of_size(rows: Sequence[Row], num_elements: int) -> list[Row]:
    """Return the rows of the largest measured weight with at most num_elements; of the smallest if there is none."""
    sizes = {row.out * row.in_ for row in rows}
    size = max((size for size in sizes if size <= num_elements), default=min(sizes, default=0))
    return [row for row in rows if row.out * row.in_ == size]


def rows_for(rows: Iterable[Row], kind: str, provider: str, dtype: torch.dtype) -> list[Row]:
    """Return the rows of a kind of device, for provider and dtype. If it was not measured: those of every GPU."""
    same = [row for row in rows if row.provider == provider and (row.device == "cpu") == (kind == "cpu")]

    # fp16 falls back to bf16, a GPU that was not measured to all that were.
    for wanted in (dtype, torch.bfloat16) if dtype == torch.float16 else (dtype,):
        of_dtype = [row for row in same if DTYPES[row.dtype] == wanted]
        if of_dtype:
            return [row for row in of_dtype if row.device == kind] or of_dtype
    return []


def largest_proven(rows: Iterable[Row]) -> float:
    """Return the largest density at which every measured shape is proven to be faster sampled; 0 without a row."""
    rows = list(rows)

    # The best proof for each shape; the worst shape decides.
    forbidden = min((row.density for row in rows if row.ratio < 1), default=float("inf"))
    limits: dict[tuple[str, int, int, int], float] = {}
    for row in rows:
        shape = (row.device, row.tokens, row.out, row.in_)
        proven = row.density * row.ratio if row.density < forbidden else 0.0
        limits[shape] = max(limits.get(shape, 0.0), proven)
    return min(*limits.values(), math.nextafter(forbidden, 0.0)) if limits else 0.0


@cache
def read_table(path: Path) -> tuple[Row, ...]:
    """Return the rows of a table of measurements."""
    with open(path, newline="", encoding="utf-8") as file:
        return tuple(
            Row(
                device=line["device"],
                provider=line["provider"],
                dtype=line["dtype"],
                tokens=int(line["tokens"]),
                out=int(line["out"]),
                in_=int(line["in"]),
                density=float(line["density"]),
                ratio=float(line["ratio"]),
            )
            for line in csv.DictReader(file)
        )
