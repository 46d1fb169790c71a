"""Read the optimizer's state of the selected weights off one engine, and write it into another.

A checkpoint of DeepSpeed is sharded for one number of ranks, one ZeRO stage and one placement. Selected values, their
moments and a few counters are the same for all of them, because no other weight has changed since the task began.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from piece_ds.runtime.distributed import all_reduce_max_, all_reduce_sum_, collective_device
from piece_ds.runtime.errors import UserError
from piece_ds.zero.adapter import Adapter, Piece

MOMENTS = ("exp_avg", "exp_avg_sq")

# Attributes of DeepSpeed's dynamic loss scaler that decide the scales to come.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass
class SelectedState:
    """The optimizer's state of K selected elements, in the order of (parameter, flat index), on the CPU.

    Attributes:
        tensors: 'values' (fp32 masters), 'exp_avg' and 'exp_avg_sq', fp32, K elements each.
        step: number of optimizer steps in the moments.
        counters: of the engine, and of its loss scaler if it has one.
    """

    tensors: dict[str, Tensor]
    step: int
    counters: dict[str, float] = field(default_factory=dict)


def read_selected_state(adapter: Adapter, index: dict[str, Tensor]) -> SelectedState:
    """Return the state of all selected elements on every rank. A collective.

    Args:
        adapter: of the engine.
        index: name of a parameter that DeepSpeed optimises -> ascending flat positions (int64, CPU), in order.
    Cost: four all-reduces of K numbers.
    """
    # Each rank fills in what its masters hold.
    starts, num_selected = _starts(index)
    found = {name: torch.zeros(num_selected) for name in ("values", *MOMENTS)}
    holders = torch.zeros(num_selected)
    step = 0
    for master, pieces in adapter.masters():
        state = adapter.engine.basic_optimizer.state.get(master, {})
        step = max(step, int(state.get("step", _group_step(adapter, master))))
        for where, place in _places(pieces, index, starts):
            where = where.to(master.device)
            holders[place] += 1
            found["values"][place] += master.detach().view(-1)[where].float().cpu()
            for name in MOMENTS:
                if name in state:
                    found[name][place] += state[name].view(-1)[where].float().cpu()

    # Several ranks may hold an element (stage 0), so sums are divided by the number of holders.
    device = collective_device()
    num_holders = all_reduce_sum_(holders.to(device))
    tensors = {name: (all_reduce_sum_(part.to(device)) / num_holders).cpu() for name, part in found.items()}
    step = int(all_reduce_max_(torch.tensor([step], device=device)))
    return SelectedState(tensors, step, _counters(adapter.engine))


def count_moments_elsewhere(adapter: Adapter, index: dict[str, Tensor]) -> int:
    """Return how many elements outside a selection have moments, so that AdamW moves them without a gradient.

    A collective. At stage 0 every rank counts all of them.

    Args:
        adapter, index: as in read_selected_state().
    Cost: one pass over the moments of this rank.
    """
    starts, _ = _starts(index)
    found = 0
    for master, pieces in adapter.masters():
        moment = adapter.engine.basic_optimizer.state.get(master, {}).get(MOMENTS[0])
        if moment is not None:
            flat = moment.view(-1)
            selected = sum(
                int(flat[place.to(flat.device)].count_nonzero()) for place, _ in _places(pieces, index, starts)
            )
            found += int(flat.count_nonzero()) - selected
    return int(all_reduce_sum_(torch.tensor([found], device=collective_device())))


def write_selected_state_(adapter: Adapter, index: dict[str, Tensor], state: SelectedState) -> None:
    """Set masters, moments and counters of this rank. The model's weights are not written.

    Args:
        adapter: of the engine.
        index: as in read_selected_state().
        state: what read_selected_state() returned, perhaps on another number of ranks or at another stage.
    Raises:
        UserError: the DeepSpeed configuration has a scheduler. Its state is not part of SelectedState.
    """
    if adapter.engine.lr_scheduler is not None:
        raise UserError(
            "a checkpoint can go on with another number of ranks, ZeRO stage or offload only where "
            "--lr_scheduler_type makes the schedule: take 'scheduler' out of the DeepSpeed configuration, "
            "or go on as it was begun"
        )

    # Masters and moments. Unselected elements have moments of zero.
    starts, _ = _starts(index)
    for master, pieces in adapter.masters():
        moments = {name: torch.zeros_like(master, dtype=torch.float32) for name in MOMENTS}
        for where, place in _places(pieces, index, starts):
            where = where.to(master.device)
            master.data.view(-1)[where] = state.tensors["values"][place].to(master)
            for name in MOMENTS:
                moments[name].view(-1)[where] = state.tensors[name][place].to(master.device)
        adapter.engine.basic_optimizer.state[master] = {"step": _step_as_kept(adapter, state.step), **moments}

    # Some of DeepSpeed's optimizers count steps in the group, not in an element's state.
    for group in adapter.engine.basic_optimizer.param_groups:
        if "step" in group:
            group["step"] = state.step
    _set_counters(adapter.engine, state.counters)


def _starts(index: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return where every parameter's elements begin among all selected ones, and how many there are."""
    starts, total = {}, 0
    for name, positions in index.items():
        starts[name] = total
        total += positions.numel()
    return starts, total


def _places(pieces: list[Piece], index: dict[str, Tensor], starts: dict[str, int]) -> list[tuple[Tensor, slice]]:
    """Return (positions in the master, range among all selected elements) for every piece that has any."""
    places = []
    for piece in pieces:
        if piece.name in index:
            whole = index[piece.name]
            low, high = torch.searchsorted(whole, torch.tensor([piece.start, piece.start + piece.numel])).tolist()
            if low < high:
                first = starts[piece.name]
                places.append((whole[low:high] - piece.start + piece.offset, slice(first + low, first + high)))
    return places


def _group_step(adapter: Adapter, master: Tensor) -> int:
    groups = adapter.engine.basic_optimizer.param_groups
    return max((int(group.get("step", 0)) for group in groups), default=0)


def _step_as_kept(adapter: Adapter, step: int) -> Any:
    """Return step as the optimizer stores it: torch's optimizers keep a tensor, DeepSpeed's a number."""
    optimizer = adapter.engine.basic_optimizer
    return torch.tensor(float(step)) if type(optimizer).__module__.startswith("torch.optim") else step


def _counters(engine: Any) -> dict[str, float]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    counters = {name: int(getattr(engine, name)) for name in _COUNTERS}
    return counters | {name: float(getattr(scaler, name)) for name in _SCALER if hasattr(scaler, name)}


def _set_counters(engine: Any, counters: dict[str, float]) -> None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name in _COUNTERS:
        setattr(engine, name, int(counters[name]))
    for name in _SCALER:
        if hasattr(scaler, name) and name in counters:
            kind = float if name == "cur_scale" else int
            setattr(scaler, name, kind(counters[name]))
