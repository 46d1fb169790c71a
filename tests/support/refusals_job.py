"""Runs many command lines that must be refused, in one process group; see test_refusals.

Each is run as its script would run it, short of printing: what a rank raises is what it saves.
"""

import json
import os
import traceback
from typing import Any

import torch.distributed as dist

from support.jobs import finish, start


def run_case(script: str, argv: list[str]) -> dict[str, Any]:
    """What main(argv) of a script raised: class, message and, unless it is a UserError, the traceback."""
    from piece_ds.cli import evaluate as eval_command
    from piece_ds.cli import select as select_command
    from piece_ds.cli import train as train_command

    main = {"train": train_command.main, "select": select_command.main, "eval": eval_command.main}[script]
    try:
        main(argv)
    except Exception as error:
        return {"class": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    return {"class": None, "message": "nothing was raised", "traceback": ""}


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # looked for, not used: the group exists
    folder = start()
    cases = json.loads((folder / "cases.json").read_text())
    results = {}
    for name, (script, argv) in cases.items():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run_case(script, argv))
        results[name] = {"ranks": everyone}
        print(name, *(rank["message"] for rank in everyone), sep="\n  ", flush=True)
    finish(results)
