"""Kills short streams at random moments, resumes each until it ends, and compares it with one that was left alone.

python -m support.kill_job FOLDER KILLS SEED: the outcome goes to FOLDER/outcome.json.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from piece_ds.checkpoint.manifest import SUMS_NAME, read_sums
from piece_ds.runtime.errors import UserError
from support.forked_runs import NUM_RANKS, live, random_kill
from support.garbage import freeze_imports
from support.launches import make_model_folder, make_tasks, same_bits, tree
from support.stream_runs import Material

RESUME = ["--resume_from_checkpoint", "True"]

# A stream per kind of state: DeepSpeed's own of compact mode at stage 3, of masked mode at stage 2, and of no mask.
KINDS: dict[str, dict[str, object]] = {
    "compact-3": {"update_mode": "compact", "save_model": "last"},
    "masked-2": {"update_mode": "masked", "save_model": "each", "zero": 2},
    "compact-1": {"update_mode": "compact", "save_model": "last", "zero": 1, "save_total_limit": 1},
}


def flags_of(material: Material, kind: str, name: str) -> list[str]:
    """A stream of two tasks with shuffled data and a falling rate: 4 steps and 16 micro-batches of statistics each."""
    changes = dict(KINDS[kind])
    zero = changes.pop("zero", 3)
    changes |= {"deepspeed": Path(__file__).parents[2] / "ds_configs" / f"zero{zero}.json"}
    changes |= {
        "max_steps": 4,
        "save_steps": 1,
        "statistics_save_steps": 2,
        "importance_batch_size": 1,
        "train_sampling_strategy": None,
        "lr_scheduler_type": "linear",
        "max_eval_samples": 2,
        "max_new_tokens": 2,
        "max_new_tokens_text": 2,
    }
    return material.stream_flags(name, **changes)


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind and that must not depend on interruptions."""
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results[key] for key in ("matrix", "masks", "overlaps", "measures", "notes", "finished")}
    texts = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*.jsonl")
        if path.parent.parent.name == "predictions"
    }
    tensors = {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}
    rows = {
        str(path.relative_to(folder)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*/metrics.jsonl")
    }
    logged = {
        name: [(row["step"], row["loss"], row["grad_norm"]) for row in of_task if "loss" in row]
        for name, of_task in rows.items()
    }
    return {"results": kept, "logged": logged, "texts": texts, "tensors": tensors, "tree": tree(folder)}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    different = [key for key in ("results", "logged", "texts", "tree") if expected[key] != found[key]]
    files = expected["tensors"].keys() | found["tensors"].keys()
    return different + [
        name for name in sorted(files) if not _same(expected["tensors"].get(name), found["tensors"].get(name))
    ]


def _same(first: dict[str, torch.Tensor] | None, second: dict[str, torch.Tensor] | None) -> bool:
    if first is None or second is None or first.keys() != second.keys():
        return False
    floats = {name for name, tensor in first.items() if tensor.is_floating_point()}
    return all(torch.equal(first[n], second[n]) for n in first.keys() - floats) and same_bits(
        {n: first[n] for n in floats}, {n: second[n] for n in floats}
    )


def damaged(folder: Path) -> list[str]:
    """Files under their own names that cannot be read; what a seal is missing for does not count as a file yet."""
    bad = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside) or not path.is_file():
            continue
        checkpoint = next((p for p in path.parents if p.name.startswith("checkpoint-")), None)
        if checkpoint is not None and not (checkpoint / SUMS_NAME).exists():
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == SUMS_NAME:
                read_sums(path.parent)
        except (Exception, UserError) as error:
            bad.append(f"{path}: {error}")
    return bad


def prepare(folder: Path) -> Material:
    """A model and two tasks below folder, and every import that a run makes, paid for once, before any fork."""
    os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import deepspeed  # noqa: F401
    import transformers.trainer  # noqa: F401

    import piece_ds.cli.train  # noqa: F401

    torch.set_num_threads(1)
    freeze_imports()
    make_model_folder(folder / "base")
    make_tasks(folder / "tasks")
    return Material(folder)


def main() -> None:
    folder, num_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    material, rng = prepare(folder), random.Random(seed)
    outcome: dict[str, Any] = {"kills": 0, "lives": 0, "runs": 0, "different": [], "damaged": [], "failed": []}
    expected, whole = {}, {}
    begin = time.monotonic()
    deadline = begin + float(os.environ.get("PIECE_DS_KILL_SECONDS", "inf"))
    while outcome["kills"] < num_kills and time.monotonic() < deadline:
        kind = list(KINDS)[outcome["runs"] % len(KINDS)]
        if kind not in expected:
            whole[kind] = live(flags_of(material, kind, f"{kind}-whole"))
            assert whole[kind].finished, whole[kind].log
            expected[kind] = contents(material.out(f"{kind}-whole"))
        name = f"{kind}-{outcome['runs']}"
        _one_run(flags_of(material, kind, name), material.out(name), whole[kind], rng, num_kills, outcome)
        if material.out(name).exists() and not outcome["failed"]:
            found = differences(expected[kind], contents(material.out(name)))
            outcome["different"] += [f"{name}: {', '.join(found)}"] if found else []
        outcome["runs"] += 1
        outcome["seconds"] = time.monotonic() - begin
        (folder / "outcome.json").write_text(json.dumps(outcome))
        print(name, outcome["kills"], "kills", outcome["different"], outcome["damaged"], outcome["failed"], flush=True)
        if outcome["failed"]:
            break


def _one_run(
    flags: list[str], folder: Path, whole: Any, rng: random.Random, num_kills: int, outcome: dict[str, Any]
) -> None:
    """Start, kill, look, start again, until a life ends by itself."""
    resume: list[str] = []
    while True:
        enough = outcome["kills"] >= num_kills
        kill = None if enough else random_kill(rng, NUM_RANKS, 1.1 * whole.seconds, whole.changes)
        life = live([*flags, *resume], kill)
        outcome["lives"] += 1
        if life.finished:
            return
        if -9 not in life.codes or kill is None:
            outcome["failed"].append(f"{folder.name} {kill} {life.codes}: {life.log[-4000:]}")
            return
        outcome["kills"] += 1
        outcome["damaged"] += damaged(folder) if folder.exists() else []
        resume = RESUME


if __name__ == "__main__":
    main()
