"""Estimate importance on a task and write the mask of the most important weights.

deepspeed launch/select_mask.py --deepspeed ds_configs/zero3.json --model_name_or_path M [flags]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from piece_ds.__main__ import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
