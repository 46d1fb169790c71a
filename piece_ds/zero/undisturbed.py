"""Run a pass over data that leaves a training run as if it had not happened."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

# Attributes from which NEFTune, and the routers of Mixtral and PhiMoE, read how much noise they add in training.
_NOISE = ("neftune_noise_alpha", "jitter_noise", "input_jitter_noise")

# Modules with one of these route tokens to experts. PhiMoE's draw an expert in training mode, and take the best one
# else. Their own mode is that of evaluation then, not that of the modules inside them.
_OF_ROUTERS = ("jitter_noise", "input_jitter_noise", "router_jitter_noise")


@contextmanager
def undisturbed(engine: Any) -> Iterator[None]:
    """Enter training mode without dropout and noise, and restore everything on exit.

    Training mode keeps gradient checkpointing working. Without dropout, and without the noise that NEFTune adds to
    embeddings and some routers to their input or their choice, nothing is random. random_draws.py looks whether a model
    draws numbers elsewhere.

    Restored: every module's mode, dropout rates and noise, and the states of Python's, NumPy's and torch's generators.
    """
    module = engine.module
    was_training = {m: m.training for m in module.modules()}
    # Functional dropout reads its rate from attributes such as attention_dropout, layer dropout from layerdrop.
    rates = {
        (m, name): value
        for m in module.modules()
        for name, value in vars(m).items()
        if (isinstance(value, float) and "drop" in name)
        # A script may give these as whole numbers: neftune_noise_alpha=5.
        or (isinstance(value, int | float) and (name in _NOISE or (isinstance(m, nn.Dropout) and name == "p")))
    }

    # Random states. fork_rng() below restores torch's.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = torch.device(engine.device)
    accelerators = [device] if device.type == "cuda" else []  # not all that this process can see
    with torch.random.fork_rng(accelerators), torch.enable_grad():
        try:
            engine.train()
            for m, name in rates:
                setattr(m, name, 0.0)
            for m in module.modules():
                if any(name in vars(m) for name in _OF_ROUTERS):
                    m.training = False
            yield
        finally:
            for (m, name), value in rates.items():
                setattr(m, name, value)
            for m, mode in was_training.items():
                m.training = mode
            random.setstate(python_state)
            np.random.set_state(numpy_state)
