"""Sort runs of one stream into groups for a comparison. Runs that differ only in their seeds are one group."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError

MAX_SETTINGS = 4  # that differ; more get a table of their own
SEEDS = ("seed", "data_seed", "sample_seed")
# Settings that do not set runs apart: where a run is stored, what it logs, and what RunResults holds by itself.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "run_name",
    "disable_tqdm",
    "save_model",
    "save_full",
    "delta_every",
    "delta_coding",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "local_rank",
    "statistics_file",
    "config",
    "recipe",
    "method",
    "mask_ratio",
}


@dataclass(frozen=True)
class Group:
    """Runs that are repetitions of each other.

    Attributes:
        name: of its runs, such as "piece-s 0.1 %".
        label: unique among the groups: the name, and what sets it apart from others of that name.
        runs: one per seed.
        folders: of the runs, as they were given.
        settings: what differs between the groups, with this group's values; None for a setting it does not have.
    """

    name: str
    label: str
    runs: tuple[RunResults, ...]
    folders: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> RunResults:
        """Any of the runs, for what all of them share."""
        return self.runs[0]

    @property
    def num_finished(self) -> int:
        """Number of finished tasks."""
        return len(self.first.matrix.loss.after)


def group_runs(runs: Sequence[tuple[str, RunResults]]) -> list[Group]:
    """Return groups, sorted by name in the order of their first runs, then by settings.

    Two runs are repetitions if they agree in method, ratio, number of finished tasks and every setting except seeds and
    places. Runs with the same seeds repeat nothing: if a group has two of them, each of its runs becomes a group.

    Args:
        runs: (name of its folder, results with all its settings), each folder once.
    Raises:
        UserError: no run, or runs of different streams.
    """
    _require_one_stream(runs)
    differing = _differing([run for _, run in runs])

    # Put runs together that agree in all but seeds.
    found: dict[tuple[object, ...], list[tuple[str, RunResults]]] = {}
    for folder, run in runs:
        finished = len(run.matrix.loss.after)
        key = (run.name, run.method, run.ratio, finished, *(repr(run.settings.get(name)) for name in differing))
        found.setdefault(key, []).append((folder, run))

    # Split groups whose seeds repeat.
    parts: list[tuple[list[tuple[str, RunResults]], bool]] = []
    for members in found.values():
        # Equal seeds mean the same run twice, not a repetition.
        alike = len({_seeds(run) for _, run in members}) < len(members)
        parts += [([member], True) for member in members] if alike else [(members, False)]

    # Name and sort them.
    groups = [
        Group(
            name=f"{members[0][1].name} ({members[0][0]})" if alone else members[0][1].name,
            label="",
            runs=tuple(run for _, run in members),
            folders=tuple(folder for folder, _ in members),
            settings={name: members[0][1].settings.get(name) for name in differing},
        )
        for members, alone in parts
    ]
    names = list(dict.fromkeys(group.name for group in groups))
    return _labelled(sorted(groups, key=lambda group: (names.index(group.name), _sortable(group.settings))))


def _require_one_stream(runs: Sequence[tuple[str, RunResults]]) -> None:
    if not runs:
        raise UserError("a comparison needs at least one run")
    (first_folder, first), *others = runs
    for folder, run in others:
        for what, ours, theirs in (
            ("tasks", first.tasks, run.tasks),
            ("metrics", first.matrix.metrics, run.matrix.metrics),
        ):
            if ours != theirs:
                raise UserError(
                    f"only runs of the same stream can be compared: the {what} of {first_folder} are "
                    f"{', '.join(ours)}; those of {folder} are {', '.join(theirs)}"
                )


def _differing(runs: Sequence[RunResults]) -> list[str]:
    """Return the names of settings that all runs record but that differ, without seeds and places."""
    # A setting that only some runs record (another version) cannot be compared.
    names = [name for name in runs[0].settings if all(name in run.settings for run in runs)]
    kept = [name for name in names if name not in FREE and name not in SEEDS]
    return [name for name in kept if len({repr(run.settings.get(name)) for run in runs}) > 1]


def _seeds(run: RunResults) -> tuple[str, ...]:
    return tuple(repr(run.settings.get(name)) for name in SEEDS)


def _sortable(settings: dict[str, Any]) -> list[tuple[float, str]]:
    return [(value, "") if isinstance(value, int | float) else (0.0, repr(value)) for value in settings.values()]


def _labelled(groups: list[Group]) -> list[Group]:
    """Return groups with labels: just the name if it is unique, else with the settings that differ among its namesakes.

    If a legend has no room for those, a number takes their place, and a table says what it means.
    """
    if groups and len(groups[0].settings) > MAX_SETTINGS:
        return [replace(group, label=f"{number}. {group.name}") for number, group in enumerate(groups, 1)]
    labelled = []
    for group in groups:
        namesakes = [other for other in groups if other.name == group.name]
        # Only what differs among groups of the same name is needed to tell them apart.
        apart = [
            f"{name} {shown(value)}"
            for name, value in group.settings.items()
            if len({repr(other.settings[name]) for other in namesakes}) > 1
        ]
        if len({other.num_finished for other in namesakes}) > 1:
            apart.append(f"{group.num_finished} of {len(group.first.tasks)} tasks")
        labelled.append(replace(group, label=", ".join([group.name, *apart])))
    return labelled


def shown(value: object) -> str:
    """Return a setting's value as short text."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
