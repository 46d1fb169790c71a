"""--push_to_hub: a run's deltas go to the Hub when it ends, as `piece_ds delta push RUN hf://user/name` sends them."""

from pathlib import Path

from transformers import TrainingArguments

from piece_ds.cli.delta_hub import PushOptions, publish
from piece_ds.deltas.hub import own_name
from piece_ds.deltas.remote import Remote, parse_remote
from piece_ds.methods.registry import find_method
from piece_ds.runtime.distributed import broadcast_object, is_main
from piece_ds.runtime.errors import MachineError, UserError


def remote_of_run(arguments: TrainingArguments, method: str) -> Remote | None:
    """Return where a run is pushed to, once the Hub knows the token; None without --push_to_hub. A collective.

    Args:
        arguments: of the run. --hub_model_id without a user means the token's owner; its default is the output
            folder's name.
        method: of the run.
    Raises:
        UserError: the method has no deltas, the name is none, or there is no valid token.
    """
    if not arguments.push_to_hub:
        return None
    if not find_method(method).has_mask:
        raise UserError(f"--push_to_hub publishes task deltas, and --method {method} has none: leave it out")

    # One rank asks; a problem ends all.
    asked: tuple[str, Remote | None] = broadcast_object(_asked(arguments) if is_main() else None)
    if asked[0]:
        raise UserError(asked[0])
    return asked[1]


def push_run(folder: Path, remote: Remote, *, private: bool) -> str:
    """Push a finished run; return a line that says what was pushed.

    Raises:
        MachineError: the Hub does not take it. The run itself is complete.
    """
    try:
        return publish(folder, remote, PushOptions(private=private))
    except UserError as error:
        raise MachineError(
            f"the run in {folder} is complete, but {error}; then: piece_ds delta push {folder} hf://{remote.repo_id}"
        ) from error


def _asked(arguments: TrainingArguments) -> tuple[str, Remote | None]:
    """Return (what is wrong, or '', and the remote)."""
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        # A name of its own namespace is checked once the namespace is known.
        whole = name if "/" in name else f"user/{name}"
        remote = parse_remote(f"hf://{whole}", arguments.hub_revision, arguments.hub_token)
        owner = own_name(remote)
        return "", remote if "/" in name else parse_remote(f"hf://{owner}/{name}", remote.revision, remote.token)
    except UserError as error:
        return str(error), None
