"""Runs whose numbers go wrong, and ranks that were not started alike.

python -m support.soundness_job FOLDER CASE ...: the outcome of each case goes to FOLDER/outcome.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from piece_ds.runtime import process as command
from piece_ds.training.trainer import TaskTrainer
from support.forked_runs import Life, live
from support.kill_job import RESUME, prepare
from support.launches import changed, make_model_folder, make_rows, weights, write_rows
from support.stream_runs import Material, as_flags

# Another file or setting on rank 1, and how the refusal calls it.
OTHERS = {
    "rows": "the train rows of task train",
    "weights": "the weights in model.safetensors",
    "rate": "TrainingArguments",
    "ratio": "--mask_ratio",
    "accumulation": "the DeepSpeed configuration",
}
NAN_STEP, NAN_RANK, NAN_MICRO_BATCH = 3, 1, 2


def flags_of(material: Material, name: str, **changes: object) -> list[str]:
    return material.short_flags(name, max_steps=4, save_steps=1, save_strategy="steps", mask_ratio=0.05, **changes)


def stopped(material: Material, compare: bool) -> dict[str, Any]:
    """NaN on one rank in step 3: a run that stops and goes on without the step; compare: one that skips it at once."""
    _poison_losses()
    stop = live(flags_of(material, "stop"))
    found = {"stop": _shown(stop), "files": sorted(path.name for path in _task(material, "stop").iterdir())}
    resumed = live([*flags_of(material, "stop"), *RESUME, "--nonfinite", "skip"])
    found["resumed"] = _shown(resumed)
    if resumed.finished:
        after = weights(_task(material, "stop") / "model")
        found["finite"] = all(bool(values.isfinite().all()) for values in after.values())
        found["cost"] = json.loads((material.out("stop") / "results.json").read_text())["cost"]["train"]
    if compare:
        found["skip"] = _shown(live(flags_of(material, "skip", nonfinite="skip")))
        found["different"] = sorted(changed(*(weights(_task(material, name) / "model") for name in ("stop", "skip"))))
    return found


def disagreeing(material: Material, name: str) -> dict[str, Any]:
    other: dict[str, object] = {}
    if name == "rows":
        other["train_file"] = write_rows(material.root / "other" / "train.json", make_rows(7, 32, ("A", "B")))
    if name == "weights":
        torch.manual_seed(1)
        folder = make_model_folder(material.root / "other-model")
        tensors = weights(folder)
        tensors["model.norm.weight"][3] += 1.0
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        other["model_name_or_path"] = folder
    other |= {"rate": {"learning_rate": 0.5}, "ratio": {"mask_ratio": 0.5}}.get(name, {})
    if name == "accumulation":
        config = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
        config["zero_optimization"]["sub_group_size"] = 12345
        other["deepspeed"] = json.dumps(config)
    life = live(flags_of(material, name), of_rank={1: as_flags(other)})
    return {**_shown(life), "written": material.out(name).exists()}


def _poison_losses() -> None:
    """From now on, also in forked ranks: NaN in one micro-batch."""
    compute = TaskTrainer._noted

    def poisoned(self: TaskTrainer, loss: torch.Tensor, training: bool) -> torch.Tensor:
        is_it = (
            self.state.global_step == NAN_STEP - 1
            and int(os.environ["RANK"]) == NAN_RANK
            and len(self.losses) == NAN_MICRO_BATCH - 1
        )
        return compute(self, loss * torch.nan if training and is_it else loss, training)

    TaskTrainer._noted = poisoned  # type: ignore[method-assign]


def _task(material: Material, name: str) -> Path:
    return material.out(name) / "00-train"


def _shown(life: Life) -> dict[str, Any]:
    return {"codes": life.codes, "log": life.log[-4000:]}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    command.OTHER_RANKS_WAIT_SECONDS = 1.0
    material = prepare(folder)
    kinds = {"nan": False, "nan-compared": True}
    outcome = {n: stopped(material, kinds[n]) if n in kinds else disagreeing(material, n) for n in names}
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
