"""Rank arithmetic, the same with and without a process group. One process is world size 1, not a special case."""

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Return whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks in the default process group; 1 without one."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Return this process's rank in the default process group; 0 without one."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """Return whether this is the rank that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum tensor over all ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace each element of tensor by the largest of all ranks' values, in place; return tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def collective_device() -> torch.device:
    """Return where tensors must live for the default group's collectives: the accelerator under NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather_objects(value: object) -> list[object]:
    """Return every rank's picklable value, in rank order. Use it for small values: they go through pickle."""
    if world_size() == 1:
        return [value]
    gathered: list[object] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
