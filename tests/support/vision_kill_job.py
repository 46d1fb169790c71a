"""A stream about images that is killed inside its second task and goes on, compared with one left alone.

python -m support.vision_kill_job FOLDER: the outcome goes to FOLDER/outcome.json.
"""

import json
import os
import sys
from pathlib import Path

from piece_ds.demo.vision.models import write_model
from piece_ds.demo.vision.tasks import TASKS, write_task
from support.forked_runs import Kill, live
from support.kill_job import RESUME, contents, differences, prepare
from support.launches import CONFIGS
from support.stream_runs import as_flags


def flags(folder: Path, name: str) -> list[str]:
    """Compact mode at ZeRO-3, a checkpoint a step."""
    return as_flags(
        {
            "deepspeed": CONFIGS / "zero3.json",
            "model_name_or_path": folder / "model",
            "task_dir": folder / "drawings",
            "tasks": ",".join(TASKS),
            "mask_ratio": 0.05,
            "max_steps": 3,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "importance_batch_size": 2,
            "max_eval_samples": 2,
            "max_new_tokens": 2,
            "dataloader_num_workers": 1,
            "save_model": "last",
            "output_dir": folder / name,
        }
    )


def main() -> None:
    folder = Path(sys.argv[1])
    prepare(folder)
    write_model("qwen3-vl", folder / "model", seed=3)
    for name, question in TASKS.items():
        write_task({name: question}, folder / "drawings" / name, {"train": 16, "test": 2}, name)
    whole = live(flags(folder, "whole"))
    killed = live(flags(folder, "killed"), Kill(0, when="01-number/checkpoint-2/SHA256SUMS"))
    resumed = live([*flags(folder, "killed"), *RESUME])
    outcome = {
        "codes": {"whole": whole.codes, "killed": killed.codes, "resumed": resumed.codes},
        "log": (whole.log + resumed.log)[-6000:],
    }
    if whole.finished and resumed.finished:
        outcome["different"] = differences(contents(folder / "whole"), contents(folder / "killed"))
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
