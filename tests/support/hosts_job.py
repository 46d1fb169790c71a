"""The same run with its ranks on one host and on a host each.

python -m support.hosts_job FOLDER NUM ...: the outcome for each number of ranks goes to FOLDER/outcome.json.
"""

import json
import os
import sys
from pathlib import Path

from support.forked_runs import live
from support.hosts import hosts
from support.kill_job import contents, differences, prepare
from support.launches import free_port
from support.stream_runs import Material


def flags_of(material: Material, name: str) -> list[str]:
    return material.short_flags(name, max_steps=2, importance_batch_size=1, max_new_tokens=2, max_new_tokens_text=2)


def main() -> None:
    folder, numbers = Path(sys.argv[1]), sys.argv[2:]
    material, outcome = prepare(folder), {}
    for number in map(int, numbers):
        together = live(flags_of(material, f"together-{number}"), num_ranks=number)
        with hosts(number) as of_ranks:
            apart = live(flags_of(material, f"apart-{number}"), num_ranks=number, port=free_port(), hosts=of_ranks)
        outcome[number] = {"together": together.codes, "apart": apart.codes, "log": together.log + apart.log}
        if together.finished and apart.finished:
            found = [contents(material.out(f"{kind}-{number}")) for kind in ("together", "apart")]
            outcome[number]["different"] = differences(*found)
            outcome[number]["compared"] = len(found[0]["tensors"])
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
