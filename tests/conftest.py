"""Keeps torch to one thread: sums then have one order."""

import os
import sys
from pathlib import Path

import torch

# The environment's own ninja, also where it is not activated: versions of ninja undo each other's builds.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
torch.set_num_threads(1)
