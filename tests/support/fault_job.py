"""Streams that a signal stops, and streams that go on with other ranks, each compared with one left alone.

python -m support.fault_job FOLDER CASE ...: the outcome of each case goes to FOLDER/outcome.json.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.forked_runs import Kill, Life, live
from support.kill_job import RESUME, contents, differences, flags_of, prepare
from support.launches import tree, weights
from support.stream_runs import Material

# Where in the stream the signal comes: what is there by then, and how that is called when the run ends.
MOMENTS = {
    "statistics": ("00-letter/statistics.partial/*/statistics.json", "micro-batches of statistics"),
    "training": ("01-text/checkpoint-1/SHA256SUMS", "of 4 of task text"),
    "evaluation": ("predictions/01-text/letter.jsonl", "during an evaluation"),
}
SIGNALS = {"SIGTERM": (0, "statistics"), "SIGUSR1": (1, "training"), "SIGINT": (1, "evaluation")}

# Begun as kind, and gone on after step 2 of the second task with these flags on so many ranks.
OTHERS: dict[str, tuple[str, int, dict[str, str]]] = {
    "compact-3-on-1-rank-at-1": ("compact-3", 1, {"deepspeed": "zero1", "gradient_accumulation_steps": "4"}),
    "compact-1-at-3": ("compact-1", 2, {"deepspeed": "zero3"}),
    "compact-3-offloaded": ("compact-3", 2, {"deepspeed": "zero3_offload"}),
    "masked-2-on-1-rank-at-3": ("masked-2", 1, {"deepspeed": "zero3", "gradient_accumulation_steps": "4"}),
    "masked-2-at-0": ("masked-2", 2, {"deepspeed": "zero0"}),
}


def stopped_by(material: Material, name: str) -> dict[str, Any]:
    """A stream that one rank's signal stops and that is then resumed."""
    expected = contents(_whole(material, "compact-3"))
    rank, moment = SIGNALS[name]
    flags = flags_of(material, "compact-3", name)
    stopped = live(flags, Kill(rank, when=MOMENTS[moment][0]), signum=getattr(signal, name))
    resumed = live([*flags, *RESUME])
    return {
        "codes": stopped.codes,
        "log": stopped.log,
        "resumed": _shown(resumed),
        "different": differences(expected, contents(material.out(name))),
    }


def gone_on(material: Material, name: str) -> dict[str, Any]:
    """A stream that is killed after a checkpoint and goes on with another number of ranks, stage or placement."""
    kind, num_ranks, changes = OTHERS[name]
    whole = _whole(material, kind)
    flags = flags_of(material, kind, name)
    killed = live(flags, Kill(0, when="01-text/checkpoint-2/SHA256SUMS"))
    configs = Path(__file__).parents[2] / "ds_configs"
    changed = {key: str(configs / f"{value}.json") if key == "deepspeed" else value for key, value in changes.items()}
    more = [item for key, value in changed.items() for item in (f"--{key}", value)]
    resumed = live([*flags, *RESUME, *more], num_ranks=num_ranks)
    if not resumed.finished:
        return {"resumed": _shown(resumed)}
    before = weights(whole.parent.parent / "base")
    after, expected = (weights(folder / "01-text" / "model") for folder in (material.out(name), whole))
    moved = {key: (expected[key] - before[key]).abs().max() for key in expected}
    return {
        "killed": killed.codes,
        "resumed": _shown(resumed),
        "error": max(float((after[key] - expected[key]).abs().max()) for key in expected),
        "moved": float(max(moved.values())),
        "untouched": all(after[key].equal(before[key]) for key in expected if moved[key] == 0),
        "tree": sorted(tree(material.out(name)) ^ tree(whole)),
    }


def _whole(material: Material, kind: str) -> Path:
    folder = material.out(f"{kind}-whole")
    if not folder.exists():
        life = live(flags_of(material, kind, folder.name))
        assert life.finished, life.log
    return folder


def _shown(life: Life) -> dict[str, Any]:
    return {"codes": life.codes, "log": life.log[-4000:]}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    material = prepare(folder)
    cases: dict[str, Callable[[Material, str], dict[str, Any]]] = {
        **dict.fromkeys(SIGNALS, stopped_by),
        **dict.fromkeys(OTHERS, gone_on),
    }
    outcome = {name: cases[name](material, name) for name in names}
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
