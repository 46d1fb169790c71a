"""Runs in which one rank of two does not come, or fails; who says what, and when it is over.

python -m support.hang_job FOLDER CASE ...: the outcome of each case goes to FOLDER/outcome.json.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from piece_ds.training.trainer import TaskTrainer
from support.forked_runs import live
from support.kill_job import prepare
from support.launches import free_port

TIMEOUT_SECONDS = 40  # a busy machine must not look like a hang
WRONG_RANK, WRONG_STEP = 1, 3


def never_comes() -> None:
    time.sleep(600)


def fails() -> None:
    raise KeyError("a defect in this rank")


CASES: dict[str, Callable[[], None]] = {"sleeps": never_comes, "raises": fails}


def run(folder: Path, name: str) -> dict[str, Any]:
    """One run; its wrong rank does what the case says in the middle of a step."""
    material, moment = prepare(folder / name), folder / f"{name}.time"
    noted = TaskTrainer._noted

    def wrong(self: TaskTrainer, loss: torch.Tensor, training: bool) -> torch.Tensor:
        if training and self.state.global_step == WRONG_STEP - 1 and int(os.environ["RANK"]) == WRONG_RANK:
            moment.write_text(str(time.time()))
            CASES[name]()
        return noted(self, loss, training)

    TaskTrainer._noted = wrong  # type: ignore[method-assign]
    life = live(material.short_flags(name, max_steps=4, ddp_timeout=TIMEOUT_SECONDS, mask_ratio=0.05), port=free_port())
    TaskTrainer._noted = noted  # type: ignore[method-assign]
    return {"codes": life.codes, "log": life.log, "seconds": time.time() - float(moment.read_text())}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    (folder / "outcome.json").write_text(json.dumps({name: run(folder, name) for name in names}))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
