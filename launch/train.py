"""Teach a model one task or a stream of tasks, training only its most important weights.

deepspeed launch/train.py --deepspeed ds_configs/zero3.json [flags]

Without --model_name_or_path it runs the embedded default: three office tasks on a small pretrained model. If no package
index has that model, it makes a smaller one and simpler tasks itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from piece_ds.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
