"""Which run of the grid may begin now, if several are made side by side and some of them read what others write."""

from collections.abc import Callable, Collection, Sequence

from bench.continual.real.grid import SEEDS, TASKS, Setting, settings_in_order

# Made on every new device before anything else, and held against the rows of the first one: (sweep, task, rate).
CHECKS = tuple(
    (name, task, rate)
    for task in ("FOMC", "NumGLUE-ds")
    for name, rate in (
        ("full", 1e-4),
        ("LoRA", 1e-3),
        ("ratio 1 %, scaled steps", 3e-3),
        ("ratio 1 %, scaled steps + KL", 3e-3),
    )
)
# What the study's claims are about.
CURVES = (
    "full",
    "LoRA",
    "full, scaled steps",
    "ratio 1 %, scaled steps",
    "PIECE-S 0.1 %",
    "ratio 1 %, scaled steps + KL",
    "full + replay",
    "LoRA + replay",
    "full + KL",
    "LoRA + KL",
    "ratio 1 %, scaled steps + KL, as many rows",
)


def claims_first(
    tasks: Sequence[str] = TASKS, seeds: Sequence[int] = SEEDS, elsewhere: Collection[tuple[str, ...]] = ()
) -> list[Setting]:
    """Return runs of the grid so that any stop leaves whole curves of the sweeps that the claims are about.

    First CHECKS with the first seed; then every sweep of CURVES with the seeds after it over all tasks; then the rest
    in the order of settings_in_order(), without what was made elsewhere.

    Args:
        tasks, seeds: of the runs.
        elsewhere: keys of settings that another device has made.
    """
    all_runs = settings_in_order(tuple(tasks), tuple(seeds))
    checks = [s for s in all_runs if s.seed == seeds[0] and (s.sweep.name, s.task, s.rate) in CHECKS]
    curves = [s for name in CURVES for s in all_runs if s.sweep.name == name and s.seed in seeds[1:]]
    rest = [s for s in all_runs if s.key not in elsewhere]
    return list({setting.key: setting for setting in [*checks, *curves, *rest]}.values())


class Agenda:
    """Runs in their order. A run that needs what another one is about to write waits for it.

    Attributes:
        left: runs that have not begun.
    """

    def __init__(
        self, wanted: Sequence[Setting], needs: Callable[[Setting], set[str]], is_there: Callable[[str], bool]
    ) -> None:
        """Plan runs.

        Args:
            wanted: runs, the first one first.
            needs: run -> names of what it reads, and writes if it is not there.
            is_there: whether a name has been written, as far as that can be seen.
        """
        self.left = list(wanted)
        self._needs, self._is_there = needs, is_there
        self._done: set[str] = set()
        self._writing: dict[Setting, set[str]] = {}

    def begin(self) -> Setting | None:
        """Return the first run that may begin, and count it as begun; None if none may, or none is left."""
        busy = {name for names in self._writing.values() for name in names if not self._has(name)}
        for setting in self.left:
            missing = {name for name in self._needs(setting) if not self._has(name)}
            if not missing & busy:
                self.left.remove(setting)
                self._writing[setting] = missing
                return setting
        return None

    def end(self, setting: Setting, is_made: bool) -> None:
        """Count a run as over. What a failed one should have written is written by the next that needs it."""
        written = self._writing.pop(setting)
        if is_made:
            self._done |= written

    def _has(self, name: str) -> bool:
        return name in self._done or self._is_there(name)
