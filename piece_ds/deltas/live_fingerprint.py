"""The fingerprint of a live model, and of what a delta would change in it. See state.weights_hash."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from piece_ds.deltas.held import Groups, groups_of, hash_held
from piece_ds.deltas.live import LiveDelta
from piece_ds.state.weights_hash import bits_of, hash_many, hexadecimal

_Part = tuple[str, torch.Tensor, torch.Tensor]  # parameter name, positions, bits


def live_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of all parameters, as delta files name it. A collective of the ranks that share the model.

    Args:
        model: whole, partitioned by ZeRO-3, or of DTensors; in the dtype that the deltas were made in.
    Cost: reads what this rank holds once; 8 bytes of communication for each way in which parameters are sharded.
    """
    return hexadecimal(_summed((groups_of(param), hash_held(name, param)) for name, param in model.named_parameters()))


def move_of(live: LiveDelta) -> int:
    """Return how writing a delta's values would move the fingerprint of what the model holds now. A collective.

    Cost: reads the elements that the delta changes.
    """
    params = dict(live.model.named_parameters())

    # What is written and what is there now, for all parameters that are sharded in one way at a time.
    sharded: dict[Groups, tuple[list[_Part], list[_Part]]] = {}
    for name, change, held in live.held:
        now = held.read()
        index, values = change.index, change.values
        if held.own.numel() < index.numel():
            index, values = index[held.own], values[held.own]
        new, old = sharded.setdefault(groups_of(params[name]), ([], []))
        new.append((name, index, bits_of(values.to(now.dtype))))
        old.append((name, index, bits_of(now)))
    return _summed((groups, hash_many(new) - hash_many(old)) for groups, (new, old) in sharded.items())


def _summed(parts: Iterable[tuple[Groups, int]]) -> int:
    """Return the sum of all ranks' parts modulo 2**64; each part is summed over its own groups."""
    sums: dict[Groups, int] = {}
    for groups, value in parts:
        sums[groups] = sums.get(groups, 0) + value
    total = 0
    # In the order in which the model names its parameters, which is the same on every rank.
    for groups, value in sums.items():
        signed = (value + 2**63) % 2**64 - 2**63
        for group in groups:
            device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
            tensor = torch.tensor([signed], device=device)
            dist.all_reduce(tensor, group=group)
            signed = int(tensor)
        total += signed
    return total % 2**64
