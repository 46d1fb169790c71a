"""Find ranks that were started with different things, before anything is written and not after a day.

Each rank reports short fingerprints of what it has. What is not the same everywhere is named, with the ranks.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from piece_ds.data.rows_digest import digest_of_rows
from piece_ds.models.fingerprint import weights_digests
from piece_ds.models.pretrained import model_source
from piece_ds.preflight.inputs import Inputs
from piece_ds.runtime.distributed import all_gather_objects, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.versions import versions

_OF_THE_MACHINE = {"device", "python"}  # they may differ between machines


def require_rank_consistency(inputs: Inputs) -> None:
    """Raise UserError, on all ranks, unless all of them have the same packages, settings, weights, mask and rows.

    A collective.

    Cost: a pass over the tokens, and 4 MiB of each file of weights.
    """
    if world_size() > 1:
        difference = first_difference(all_gather_objects(_fingerprints(inputs)))  # type: ignore[arg-type]
        if difference:
            raise UserError(
                f"the ranks were not started alike: {difference}. Give all of them the same packages, command and files"
            )


def first_difference(of_ranks: list[dict[str, str]]) -> str | None:
    """Return the first thing that is not the same on all ranks, in words; None if everything is.

    Args:
        of_ranks: each rank's thing -> its value or fingerprint.
    """
    for thing in dict.fromkeys(thing for found in of_ranks for thing in found):
        ranks_with: dict[str, list[int]] = {}
        for rank, found in enumerate(of_ranks):
            ranks_with.setdefault(found.get(thing, "absent"), []).append(rank)
        if len(ranks_with) > 1:
            # Most ranks are right: name the ones that differ from them.
            usual = max(ranks_with, key=lambda value: (len(ranks_with[value]), -ranks_with[value][0]))
            other, ranks = next((value, ranks) for value, ranks in ranks_with.items() if value != usual)
            return (
                f"{thing}: {other} on rank {', '.join(map(str, ranks))}, "
                f"{usual} on rank {', '.join(map(str, ranks_with[usual]))}"
            )
    return None


def _fingerprints(inputs: Inputs) -> dict[str, str]:
    found = {f"version of {name}": value for name, value in versions().items() if name not in _OF_THE_MACHINE}

    # The program and its settings.
    found["piece_ds's source"] = _digest_of_files(sorted(Path(__file__).parents[1].rglob("*.py")))
    settings = inputs.settings
    for values in settings.resolved().values():
        found |= {f"--{name}": str(value) for name, value in values.items() if not _is_a_place(name)}
    found["TrainingArguments"] = _digest(json.dumps(_flags(inputs), sort_keys=True).encode())
    found["the DeepSpeed configuration"] = _digest(
        json.dumps(inputs.arguments.hf_deepspeed_config.config, sort_keys=True, default=str).encode()
    )
    found["the model's configuration"] = _digest(inputs.config.to_json_string().encode())

    # The files.
    digests = weights_digests(model_source(str(settings.model.model_name_or_path)))
    found |= {f"the weights in {name}": digest for name, digest in digests.items()}
    if settings.method.mask_file is not None:
        found["the mask"] = _digest_of_files([Path(settings.method.mask_file)])

    # The rows.
    for task in inputs.tasks:
        for split in ("train", "eval", "test"):
            found[f"the {split} rows of task {task.name}"] = digest_of_rows(getattr(task, split))
    for name, rows in (("general text", inputs.general), ("text of --general_text", inputs.general_importance)):
        if rows is not None:
            found[f"the {name}"] = digest_of_rows(rows)
    return found


def _is_a_place(name: str) -> bool:
    """Return whether a setting names a place.

    Machines may keep the same files in different folders: contents are compared.
    """
    return name.endswith(("_file", "_dir", "_path", "_statistics"))


def _flags(inputs: Inputs) -> dict[str, Any]:
    """Return TrainingArguments without what names a rank, a place or a time."""
    known = inputs.arguments.to_dict()
    own = ("local_rank", "output_dir", "logging_dir", "deepspeed", "run_name", "hub_token", "use_cpu")
    return {name: str(value) for name, value in known.items() if name not in own and not name.startswith("_")}


def _digest_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.name) + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
