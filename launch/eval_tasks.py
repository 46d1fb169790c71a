"""Measure loss, scores and general ability of a model on tasks.

deepspeed launch/eval_tasks.py --deepspeed ds_configs/zero3.json --model_name_or_path M [flags]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from piece_ds.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
