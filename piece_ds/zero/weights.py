"""Reading this rank's part of a parameter, wherever ZeRO keeps it."""

import torch
from torch import Tensor, nn


def read_weight(param: nn.Parameter, start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) of a parameter, in its dtype; a view or a copy, not to be written.

    Args:
        param: whole, or partitioned by ZeRO-3.
        start, numel: flat range; under ZeRO-3 it must lie in the range this rank owns.
    Raises:
        RuntimeError: under ZeRO-3, the range is not held here.
    """
    if not hasattr(param, "ds_id"):
        return param.detach().reshape(-1)[start : start + numel]
    shard, chunk = param.ds_tensor, param.partition_numel()
    offset = start - chunk * torch.distributed.get_rank(group=param.ds_process_group)
    if offset < 0 or offset + numel > shard.numel():
        raise RuntimeError(f"elements [{start}, {start + numel}) of a parameter of {param.ds_numel} elements are not "
                           f"in this rank's shard of {shard.numel()}: read them on their owner")  # fmt: skip
    return shard.detach().reshape(-1)[offset : offset + numel]
