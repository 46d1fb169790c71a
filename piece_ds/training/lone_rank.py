"""Take a trainer's loss as one rank by itself takes it: no figure of another rank in it, and no draw of its own.

TRL's trainers gather figures of the rows of all ranks within their loss: for their log, and for the loss itself, whose
KL estimate (KTO), scale of rewards or number of tokens (GRPO, RLOO, distillation) is then that of all ranks' rows. An
importance that is summed over micro-batches would depend on which of them the ranks take at the same time.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import set_seed


@contextmanager
def lone_rank(accelerator: Accelerator) -> Iterator[None]:
    """Let accelerate know of no other rank inside: what is gathered is this rank's own, and so is its place in it.

    DeepSpeed and torch.distributed know all ranks as before: ZeRO-3 goes on gathering weights.
    """
    # What gathers asks the one, an accelerator says what the other holds.
    states = vars(PartialState()), vars(accelerator.state)
    names = ("num_processes", "process_index", "distributed_type")
    kept = [{name: state[name] for name in names} for state in states]
    for state in states:
        state.update(num_processes=1, process_index=0)
    states[0]["distributed_type"] = DistributedType.NO
    try:
        yield
    finally:
        for state, values in zip(states, kept, strict=True):
            state.update(values)


@contextmanager
def own_draws(device: torch.device, *numbers: int) -> Iterator[None]:
    """Let what is drawn inside depend only on these numbers; the generators are afterwards as if nothing was drawn."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            set_seed(random.Random(repr(numbers)).getrandbits(31))
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
