"""Which common accelerators a setting fits, and at which lowest ZeRO stage it fits them."""

from dataclasses import dataclass, replace

from piece_ds.plan.memory import memory_terms, peak
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import ModelShape

GIB = 2**30
# Nominal GB -> cards of that size. It is close to as many GiB: an 80 GB H100 reports 79.6 GiB.
CARDS = {
    16: "T4, V100",
    24: "RTX 4090, L4, A10",
    40: "A100 40GB",
    48: "L40S, RTX A6000",
    80: "A100 80GB, H100",
    141: "H200",
    192: "B200, MI300X",
}
# CUDA's context, its libraries' workspaces and fragmentation take the rest.
USABLE_SHARE = 0.92

YES, PERHAPS, NO = "yes", "perhaps", "no"


@dataclass(frozen=True)
class CardVerdict:
    """Whether a rank fits a card.

    Attributes:
        gigabytes: the card's nominal size.
        usable_bytes: of that size.
        fits: "yes" with all estimates, which are upper bounds; "perhaps" only without them; or "no".
        lowest_stage: lowest ZeRO stage that fits with the same settings; None if none does.
        lowest_stage_offloaded: the same with the optimizer on the CPU; set only if lowest_stage is None.
    """

    gigabytes: int
    usable_bytes: float
    fits: str
    lowest_stage: int | None
    lowest_stage_offloaded: int | None


def card_verdicts(shape: ModelShape, setting: Setting) -> list[CardVerdict]:
    """Return a verdict for each of CARDS, from the peak of device memory over a task."""
    verdicts = []
    for gigabytes in CARDS:
        usable = USABLE_SHARE * gigabytes * GIB
        stage = _lowest_stage(shape, setting, usable)
        offload = replace(setting, offload_optimizer=True, zero=max(setting.zero, 1))  # stage 0 has none to offload
        offloaded = _lowest_stage(shape, offload, usable) if stage is None else None
        verdicts.append(CardVerdict(gigabytes, usable, fits(shape, setting, usable), stage, offloaded))
    return verdicts


def fits(shape: ModelShape, setting: Setting, usable_bytes: float) -> str:
    """Return whether device memory suffices: YES with all estimates, PERHAPS only without them, else NO."""
    terms = memory_terms(shape, setting)
    if peak(terms)[0] <= usable_bytes:
        return YES
    return PERHAPS if peak([term for term in terms if not term.is_estimate])[0] <= usable_bytes else NO


def _lowest_stage(shape: ModelShape, setting: Setting, usable_bytes: float) -> int | None:
    """Return the lowest stage at which setting fits with all estimates; None if none does.

    Offloading the optimizer needs stage 1 or higher, offloading parameters stage 3.
    """
    first = 3 if setting.offload_param else 1 if setting.offload_optimizer else 0
    stages = (zero for zero in range(first, 4) if fits(shape, replace(setting, zero=zero), usable_bytes) == YES)
    return next(stages, None)
