"""Teach a model one task or a stream of tasks, training only its most important weights.

deepspeed launch/train.py --deepspeed ds_configs/zero3.json [flags]

Without a model it makes a small one and a small stream of tasks itself, and ends with the result table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from piece_ds.cli.commands import run_launched

if __name__ == "__main__":
    run_launched("train", ["train", *sys.argv[1:]])
