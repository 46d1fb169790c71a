"""Starts that fail in different places, in one process group, each followed by the mended command in the same folder.

python -m support.failed_starts_job FOLDER: FOLDER holds model/ and rows.json.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from support.jobs import Results, collect_case, finish, start
from support.launches import CONFIGS, tree


class Unreachable(TrainerCallback):
    """A reporter whose server does not answer."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the tracking server does not answer")


@contextmanager
def damaged_model(folder: Path) -> Iterator[dict[str, object]]:
    shutil.copytree(folder / "model", folder / "damaged", dirs_exist_ok=True)
    (folder / "damaged" / "model.safetensors").write_bytes(b"damaged")
    yield {"model_name_or_path": folder / "damaged"}


@contextmanager
def unreachable_reporter(folder: Path) -> Iterator[dict[str, object]]:
    with mock.patch.object(integration_utils, "get_reporting_integration_callbacks", return_value=[Unreachable]):
        yield {}


@contextmanager
def no_engine(folder: Path) -> Iterator[dict[str, object]]:
    with mock.patch.object(deepspeed, "initialize", side_effect=RuntimeError("no room for the engine")):
        yield {}


@contextmanager
def no_statistics(folder: Path) -> Iterator[dict[str, object]]:
    from piece_ds.methods import estimate

    with mock.patch.object(estimate, "collect_statistics", side_effect=RuntimeError("no room for a micro-batch")):
        yield {"importance_batch_size": 64}


@contextmanager
def no_room_for_statistics_file(folder: Path) -> Iterator[dict[str, object]]:
    """Statistics of other data: refused only when they are looked at, once the engine is there."""
    from piece_ds.runtime.errors import UserError
    from piece_ds.training import mask_source

    with mock.patch.object(mask_source, "estimate_mask", side_effect=UserError("of another model")):
        yield {}


FAILURES = {
    "damaged-model": damaged_model,
    "reporter": unreachable_reporter,
    "engine": no_engine,
    "statistics": no_statistics,
    "user-error-in-selection": no_room_for_statistics_file,
}


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # looked for, not used: the group exists
    folder = start()
    results: Results = {}
    for name in FAILURES:
        collect_case(results, name, lambda name=name: fail_then_mend(folder, name))  # type: ignore[misc]
    finish(results)


def fail_then_mend(folder: Path, name: str) -> dict[str, Any]:
    from piece_ds.cli.train import main as train

    output = folder / "out" / name
    flags = {
        "deepspeed": CONFIGS / "zero2.json",
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.json",
        "max_steps": 1,
        "max_eval_samples": 2,
        "mask_ratio": 0.05,
        "save_model": "never",
        "output_dir": output,
    }

    # The failure, and what it leaves.
    message = "nothing was raised"
    with FAILURES[name](folder) as wrong:
        try:
            train(as_argv({**flags, **wrong}))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
    dist.barrier()
    left = sorted(tree(output)) if output.exists() else None

    # The mended command, with other settings than the failed one.
    train(as_argv({**flags, "mask_ratio": 0.1}))
    return {"message": message, "left": left, "mended": sorted(tree(output))}


def as_argv(flags: dict[str, object]) -> list[str]:
    return [text for key, value in flags.items() for text in (f"--{key}", str(value))]


if __name__ == "__main__":
    main()
