"""What crosses ranks in one optimizer step, term by term. For ds_configs/ as they are; DeepSpeed 0.19.8.

The legend is that of memory.py. Elements are those of the tensor passed to the collective. Bytes are what one rank
receives if the collective runs as a ring: (W - 1) / W of the tensor for a gather or a reduce-scatter, twice as much for
an all-reduce. tests/distributed/test_plan_engines.py counts the elements in engines of two ranks.
"""

from dataclasses import dataclass

from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import ModelShape

# Stage 3 keeps parameters that are used again within stage3_max_reuse_distance = 1e9 elements. Those are the last half
# of that many before forward turns into backward.
KEPT_AT_THE_TURN = 5 * 10**8


@dataclass(frozen=True)
class Transfer:
    """One kind of collective.

    Attributes:
        name: what is sent.
        collective: all-reduce, all-gather, reduce-scatter or all-to-all.
        elements: per optimizer step, of the whole tensors.
        itemsize: bytes of an element on the wire.
        world: ranks.
    """

    name: str
    collective: str
    elements: float
    itemsize: int
    world: int

    @property
    def received(self) -> float:
        """Bytes that one rank receives."""
        passes = 2 if self.collective == "all-reduce" else 1
        return passes * self.elements * self.itemsize * (self.world - 1) / self.world


def transfers(shape: ModelShape, setting: Setting) -> list[Transfer]:
    """Return the collectives of an optimizer step, and of one round of the statistics pass (one micro-batch per rank).

    Gradients are sent in fp32 (communication_data_type). Stages 0 and 1 reduce once per step, stages 2 and 3 at every
    micro-batch. Stages 1 and 2 all-reduce their buckets although each rank keeps a part: DeepSpeed's
    use_multi_rank_bucket_allreduce. Compact mode all-reduces K sums once and gathers K values. At stage 3 it still
    gathers all parameters.
    """
    if setting.world == 1:
        return []
    size, zero, count = setting.itemsize, setting.zero, setting.accumulation
    optimised, k = setting.optimised(shape), setting.selected(shape)

    # Gradients and updated values.
    rows: list[tuple[str, str, float, int]] = []
    if setting.update_mode == "compact":
        rows.append(("gradient of the selected", "all-reduce", k, 4))
        rows.append(("values", "all-gather", k if zero else 0, size))
    else:
        collective = "reduce-scatter" if zero == 3 else "all-reduce"
        rows.append(("gradients", collective, optimised * (count if zero >= 2 else 1), 4))
        rows.append(("updated parameters", "all-gather", optimised if zero in (1, 2) else 0, size))

    # Stage 3 gathers parameters in every forward and backward.
    if zero == 3:
        stored = shape.total + (setting.added(shape) if setting.update_mode == "lora" else 0)
        rows.append(("parameters, forward", "all-gather", stored * count, size))
        rows.append(("parameters, backward", "all-gather", max(0, stored - KEPT_AT_THE_TURN) * count, size))

    # The statistics pass.
    if k:
        rows.append(("statistics, per round", "all-to-all", shape.eligible, size))
    return [Transfer(*row, setting.world) for row in rows if row[2]]
