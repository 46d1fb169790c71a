"""Every run of the experiment in one table: method, ratio, learning rates; and the order they are made in."""

from dataclasses import dataclass

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        method: a value of --method.
        ratio: of --mask_ratio; 1.0 for methods that it means nothing to.
        rate: AdamW's, at its peak.
        seed: of --seed.
        flags: further flags of the method.
    """

    method: str
    ratio: float
    rate: float
    seed: int
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from other runs of the same recipe, as runs.csv has it."""
        return self.method, f"{self.ratio:g}", f"{self.rate:g}", str(self.seed)


@dataclass(frozen=True)
class Sweep:
    """A method at one ratio, over learning rates: one curve of the figure."""

    method: str
    ratio: float
    rates: tuple[float, ...]
    flags: tuple[str, ...] = ()


MAIN_RATIO = 0.01

# A weight that trains alone has to move further for the same change of the loss, and one that was chosen for its
# gradient less far than one that was not: each sweep spans its method's own bend between learning little and damage.
FULL = (1e-4, 1.7e-4, 3e-4, 1e-3)
ADAPTER = (3e-4, 1e-3, 3e-3, 5.5e-3, 1e-2)
_BY_GRADIENT = {0.1: (3e-4, 1e-3, 1.7e-3, 3e-3), 0.01: (1e-3, 3e-3, 5.5e-3, 1e-2), 0.001: (3e-3, 1e-2, 3e-2, 5.5e-2)}
_OTHERWISE = {0.1: (1e-3, 3e-3, 5.5e-3, 1e-2), 0.01: (3e-3, 1e-2, 1.7e-2, 3e-2), 0.001: (1e-2, 3e-2, 1e-1, 3e-1)}


def _masks(ratio: float) -> tuple[Sweep, ...]:
    """What is compared at equal k."""
    chosen = {"piece-s": _BY_GRADIENT, "piece-f": _BY_GRADIENT, "random": _OTHERWISE, "magnitude": _OTHERWISE}
    return tuple(Sweep(method, ratio, rates[ratio]) for method, rates in chosen.items())


MAIN = (*_masks(MAIN_RATIO), Sweep("seqft", 1.0, FULL), Sweep("lora", 1.0, ADAPTER))
LARGE_RATIO = _masks(0.1)
SMALL_RATIO = (*_masks(0.001), Sweep("piece-ratio", 0.001, _BY_GRADIENT[0.001]))
OTHERS = (
    *(Sweep(method, MAIN_RATIO, _BY_GRADIENT[MAIN_RATIO]) for method in ("piece-ratio", "piece-s-disjoint")),
    Sweep("piece-ratio", 0.1, _BY_GRADIENT[0.1]),
    *(Sweep(method, MAIN_RATIO, _OTHERWISE[MAIN_RATIO]) for method in ("lift", "shira", "migu")),
    Sweep("hft", 1.0, FULL),
    Sweep("layernorm", 1.0, (3e-3, 1e-2, 3e-2, 1e-1)),
    *(Sweep(method, 1.0, FULL) for method in ("replay-online", "ewc", "lwf", "gem")),
    # After an epoch of new rows, which is what every method has, come the kept ones: a few steps more.
    Sweep("replay", 1.0, FULL, ("--max_steps", "-1", "--num_train_epochs", "1")),
    Sweep("o-lora", 1.0, ADAPTER),
)
SWEEPS = (*MAIN, *LARGE_RATIO, *OTHERS, *SMALL_RATIO)


def settings_in_order(seeds: tuple[int, ...] = SEEDS) -> list[Setting]:
    """All runs, each once, so that any stop leaves a picture, and the longer it went on the surer it is.

    One seed of the main question and of the larger ratio, the main question's other seeds, one seed of all else, the
    seeds of the smaller ratio, of the other methods, of the larger ratio.
    """
    first = seeds[:1]
    parts = [
        (MAIN, first),
        (LARGE_RATIO, first),
        (MAIN, seeds),
        (SWEEPS, first),
        (SMALL_RATIO, seeds),
        (OTHERS, seeds),
        (SWEEPS, seeds),
    ]
    wanted = [
        Setting(sweep.method, sweep.ratio, rate, seed, sweep.flags)
        for sweeps, some_seeds in parts
        for seed in some_seeds
        for sweep in sweeps
        for rate in sweep.rates
    ]
    return list(dict.fromkeys(wanted))
