"""Runs many command lines of launch/train.py one after another in one process group.

Importing costs more than such a run does; what is tested is files, and they are the same.
"""

import json
import os
from typing import Any

from support.jobs import collect_case, finish, start


def run_case(argv: list[str]) -> dict[str, Any]:
    from piece_ds.train_command import main

    main(argv)
    return {}


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # looked for, not used: the group exists
    folder = start()
    results: dict[str, dict[str, Any]] = {}
    for name, argv in json.loads((folder / "runs.json").read_text()).items():
        collect_case(results, name, lambda argv=argv: run_case(argv))
        print(f"== {name} done", flush=True)
    finish(results)
