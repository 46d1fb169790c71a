"""Puts tests/ on the path (for tests/support) and keeps torch to one thread: sums then have one order."""

import torch

torch.set_num_threads(1)
