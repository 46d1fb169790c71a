"""Runs many command lines of launch/train.py one after another in one process group.

Importing costs more than such a run does; what is tested is files, and they are the same.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from piece_ds.runtime.signals import Preempted
from support.jobs import collect_case, finish, start
from support.stream_runs import NUM_STEPS

RECORD_NAME = "recorded.jsonl"


class Recorder(TrainerCallback):
    """A reporter: what it is told goes to recorded.jsonl in the run's folder, a row an event."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state, "begin", {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._write(args, state, "log", logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state, "end", {})

    def _write(self, args: Any, state: Any, event: str, values: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / RECORD_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": state.global_step, **values}) + "\n")


class Stopper(TrainerCallback):
    """A reporter that asks the run to end at its second step, as a signal would, once a task and folder."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mark = Path(args.output_dir) / f"stopped-{state.global_step // NUM_STEPS}"
        if state.global_step % NUM_STEPS == 1 and state.is_world_process_zero and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)


def run_case(argv: list[str]) -> dict[str, Any]:
    from piece_ds.cli.train import main

    try:
        main(argv)
    except Preempted:
        return {"stopped": True}
    return {}


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # looked for, not used: the group exists
    folder = start()
    INTEGRATION_TO_CALLBACK["recorder"] = Recorder  # so that --report_to recorder is one
    INTEGRATION_TO_CALLBACK["stopper"] = Stopper
    results: dict[str, dict[str, Any]] = {}
    for name, argv in json.loads((folder / "runs.json").read_text()).items():
        collect_case(results, name, lambda argv=argv: run_case(argv))
        print(f"== {name} done", flush=True)
    finish(results)
