"""Runs streams of every method in one process group; some are stopped after the first task and then resumed.

runs.json in the job's folder: name -> {"flags": [...], "stop": whether to stop it before its second task and go on}.
"""

import json
import os
from typing import Any
from unittest import mock

from support.jobs import collect_case, finish, start


class Stopped(Exception):
    """Instead of the second task."""


def run_case(flags: list[str], stop: bool) -> dict[str, Any]:
    from piece_ds.cli.train import main
    from piece_ds.training import stream as engine

    if stop:
        with mock.patch.object(engine, "train_task", _once(engine.train_task)):
            try:
                main(flags)
            except Stopped:
                main_flags = [*flags, "--resume_from_checkpoint", "True"]
            else:
                raise AssertionError("the second task was never begun")
        flags = main_flags
    main(flags)
    return {}


def _once(function: Any) -> Any:
    calls: list[None] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            raise Stopped
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # looked for, not used: the group exists
    folder = start()
    results: dict[str, dict[str, Any]] = {}
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        collect_case(results, name, lambda run=run: run_case(run["flags"], run["stop"]))
        print(f"== {name} done", flush=True)
    finish(results)
