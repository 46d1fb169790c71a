"""Train two small vision-language models, made by the project itself, on two tasks about its own drawings.

deepspeed launch/vqa_demo.py --deepspeed ds_configs/zero2.json [flags]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from piece_ds.cli.vision_demo import main
from piece_ds.runtime.process import run_command

if __name__ == "__main__":
    run_command(main)
