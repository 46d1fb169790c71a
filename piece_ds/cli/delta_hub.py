"""The work of `piece_ds delta push | pull`: gather what is published, or fetch it, and print what was done."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from piece_ds.cli.delta import open_model
from piece_ds.deltas.card import FIGURES_FOLDER, CardFacts, card_figure, card_text
from piece_ds.deltas.delta import DELTA_NAME, Delta, find_deltas
from piece_ds.deltas.hub import known_base, pull_deltas, push_deltas, require_empty, require_token
from piece_ds.deltas.published import CARD_NAME, Base, Published, collect
from piece_ds.deltas.remote import Remote, parse_remote
from piece_ds.deltas.verify import Step, verify
from piece_ds.models.pretrained import PRETRAINED
from piece_ds.report.results import read_results
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import read_json
from piece_ds.runtime.text import counted, printable

RESULTS_NAME, RUN_NAME = "results.json", "run.json"


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How deltas are published.

    Attributes:
        with_masks: the mask beside each delta too.
        with_statistics: the run's statistics of general text too.
        private, create_pr: see push_deltas().
        base_model, base_revision: of the base on the Hub; None takes the run's own.
        datasets: Hub ids of the data; empty means the tasks' names.
    """

    with_masks: bool = False
    with_statistics: bool = False
    private: bool = False
    create_pr: bool = False
    base_model: str | None = None
    base_revision: str | None = None
    datasets: Sequence[str] = ()


def push(arguments: argparse.Namespace) -> None:
    """Publish the deltas of a run, of a task or of a file."""
    _quiet()
    if arguments.base_revision and not arguments.base_model:
        raise UserError("--base_revision needs --base_model: the repository that has the revision")
    options = PushOptions(
        with_masks=arguments.with_masks,
        with_statistics=arguments.with_general_statistics,
        private=arguments.private,
        create_pr=arguments.create_pr,
        base_model=arguments.base_model,
        base_revision=arguments.base_revision,
        datasets=_datasets(arguments),
    )
    print(printable(publish(Path(arguments.source), parse_remote(arguments.repository, arguments.revision), options)))


def publish(source: Path, remote: Remote, options: PushOptions) -> str:
    """Publish the deltas of a run, of a task or of a file; return a line that says what was pushed.

    Raises:
        UserError: see collect() and push_deltas().
    """
    # Read everything that is published before the Hub is asked.
    published = collect(source, _base_of(source), options.with_masks, options.with_statistics)
    results = source / RESULTS_NAME
    run = read_results(results) if results.is_file() else None
    require_token(remote)

    # Write the card, with what the Hub knows of the base.
    published = _with_known_base(published, options)
    figure = card_figure(run) if run is not None else None
    figures = {} if figure is None else {f"{FIGURES_FOLDER}/{figure.file_name}": figure.png}
    facts = CardFacts(
        repo_id=remote.repo_id, revision=remote.revision, run=run, figure=figure, datasets=options.datasets
    )
    card = card_text(published, facts)

    # Send it.
    address = push_deltas(remote, published, card, figures, private=options.private, create_pr=options.create_pr)
    size = sum(path.stat().st_size for path in published.files.values())
    what = f"{counted(len(published.deltas), 'delta')}, {counted(len(published.files), 'file')} of {size} bytes"
    return f"pushed {what}: {address}"


def pull(arguments: argparse.Namespace) -> None:
    """Fetch published deltas into a folder that `piece_ds delta apply` takes."""
    _quiet()
    output, remote = Path(arguments.output), parse_remote(arguments.repository, arguments.revision)

    # Look at the folder and the model first: fetching takes time.
    require_empty(output)
    folder = open_model(arguments) if arguments.model else None

    def belongs(deltas: list[Delta]) -> None:
        if folder is not None:
            verify(folder, [Step(delta) for delta in deltas])

    deltas = pull_deltas(remote, output, belongs)
    for delta in deltas:
        print(printable(f"{delta.path}: {delta.num_selected} values, {delta.path.stat().st_size} bytes"))
    then = f"piece_ds delta apply {arguments.model or 'MODEL'} {output} --output NEW"
    print(printable(f"pulled {counted(len(deltas), 'delta')} into {output}: {then}"))


def _quiet() -> None:
    """Show progress only to a person, and leave reports of failures to the one line that this command prints."""
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _datasets(arguments: argparse.Namespace) -> list[str]:
    return [name.strip() for name in (arguments.datasets or "").split(",") if name.strip()]


def _with_known_base(published: Published, options: PushOptions) -> Published:
    """Return published with a base that the Hub knows, or that piece_ds fetches, or with none named."""
    base = published.base
    if options.base_model:
        named = base.model_copy(update={"name": options.base_model, "revision": options.base_revision})
        base = known_base(named, is_given=True)
    elif base.name is not None and base.name not in PRETRAINED:
        base = known_base(base, is_given=False)
    return Published(published.deltas, published.files, base)


def _base_of(source: Path) -> Base:
    """Return what a run's run.json tells of its base: its name unless it is a folder, and its licence.

    The run is the folder that was given, or the one that holds the task or the delta that was given.
    """
    first = find_deltas([source])[0]
    run = first.parent.parent if first.name == DELTA_NAME else first.parent
    path = next((folder / RUN_NAME for folder in (source, run) if (folder / RUN_NAME).is_file()), None)
    if path is None:
        return Base()
    content = read_json(path, dict[str, Any], "run's configuration", "copy the run's folder again")
    model = content.get("ModelArguments")
    name = model.get("model_name_or_path") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return Base()
    if name in PRETRAINED:
        return Base(name=name, licence=PRETRAINED[name].licence.lower())
    return Base(licence=_licence_in(Path(name) / CARD_NAME)) if _is_folder(name) else Base(name=name)


def _is_folder(name: str) -> bool:
    """Return whether a model's name is a path of this machine, or of the one that trained."""
    try:
        return Path(name).is_absolute() or Path(name).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return True


def _licence_in(card: Path) -> str | None:
    """Return the licence that a model folder's card names; None if it has no card, or one that says nothing."""
    try:
        fields = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = (fields or {}).get("license")
    return licence if isinstance(licence, str) else None
