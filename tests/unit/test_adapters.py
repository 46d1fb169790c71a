"""Adapters of several optimizer groups mask and read each group by its own pieces; a skipped step lowers the scale."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piece_ds.update import step_scale
from piece_ds.zero import stage1_bf16, stage12
from piece_ds.zero.adapter import Adapter, Piece
from piece_ds.zero.scaled_update import scale_selected
from piece_ds.zero.stage1_bf16 import Stage1BF16
from piece_ds.zero.stage3 import Stage3
from piece_ds.zero.stage12 import Stage12

NAMES, SIZES = ("a", "b", "c", "d"), (4, 3, 5, 3)  # the first two are one group, the others another
PARAMS = [nn.Parameter(torch.zeros(size)) for size in SIZES]
GROUPS = [PARAMS[:2], PARAMS[2:]]
INDEX = {"a": torch.tensor([1]), "b": torch.tensor([0, 2]), "c": torch.tensor([4]), "d": torch.tensor([2])}


def adapter_of(kind: type[Any], rank: int, monkeypatch: pytest.MonkeyPatch, **optimizer: Any) -> Any:
    """An adapter of two groups on one of two ranks."""
    monkeypatch.setattr(stage12, "dist", SimpleNamespace(get_rank=lambda group: rank))
    monkeypatch.setattr(stage1_bf16, "dist", SimpleNamespace(get_rank=lambda group: rank))
    adapter = object.__new__(kind)
    adapter.name_of = {id(param): name for param, name in zip(PARAMS, NAMES, strict=True)}
    adapter.optimizer = SimpleNamespace(real_dp_process_group=[None, None], **optimizer)
    return adapter


@pytest.mark.parametrize(
    ("rank", "kept", "masters"),
    [
        (0, [[1], []], [[Piece("a", 0, 4, 0)], [Piece("c", 0, 4, 0)]]),
        (1, [[0, 2], [0, 3]], [[Piece("b", 0, 3, 0)], [Piece("c", 4, 1, 0), Piece("d", 0, 3, 1)]]),
    ],
)
def test_each_group_of_stage_2_is_masked_by_its_own_pieces(
    rank: int, kept: list[list[int]], masters: list[list[Piece]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[2, 2], [4]] if rank == 0 else [[3, 1], [1, 3]]  # of b's group, the last element is padding
    grads = {group: [torch.ones(size) for size in sizes] for group, sizes in enumerate(parts)}
    adapter = adapter_of(
        Stage12,
        rank,
        monkeypatch,
        round_robin_bit16_groups=GROUPS,
        round_robin_bit16_offsets=[[0, 4], [0, 5]],
        partition_size=[4, 4],
        single_partition_of_fp32_groups=[torch.zeros(4), torch.zeros(4)],
        averaged_gradients=grads,
        cpu_offload=False,
    )
    assert [pieces for _, pieces in adapter.masters()] == masters
    read = adapter.gradients()
    assert [grad.numel() for grad, _ in read] == [size for sizes in parts for size in sizes]
    owned = [(piece.name, piece.start + i) for _, pieces in read for piece in pieces for i in range(piece.numel)]
    assert owned == [(p.name, p.start + i) for pieces in masters for p in pieces for i in range(p.numel)]
    adapter.bind(INDEX)
    adapter.mask_gradients_()
    assert [torch.cat(grads[group]).nonzero().view(-1).tolist() for group in range(2)] == kept


@pytest.mark.parametrize("rank", [0, 1])
def test_each_group_of_bf16_is_masked_whole_on_every_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flats = [torch.ones(8), torch.ones(8)]
    adapter = adapter_of(
        Stage1BF16,
        rank,
        monkeypatch,
        bf16_groups=GROUPS,
        fp32_groups_gradients_flat=flats,
        fp32_groups_flat_partition=[torch.zeros(4), torch.zeros(4)],
    )
    names = [[piece.name for piece in pieces] for _, pieces in adapter.masters()]
    assert names == ([["a"], ["c"]] if rank == 0 else [["b"], ["c", "d"]])
    adapter.bind(INDEX)
    adapter.mask_gradients_()
    assert [flat.nonzero().view(-1).tolist() for flat in flats] == [[1, 4, 6], [4, 7]]


def test_a_skipped_step_is_noted_and_still_lowers_the_loss_scale() -> None:
    told: list[Any] = []
    optimizer = SimpleNamespace(_update_scale=lambda overflow=False: told.append(overflow))
    undo = Adapter.skip_nonfinite(SimpleNamespace(optimizer=optimizer), lambda: told.append("note"))  # type: ignore[arg-type]
    optimizer._update_scale(True)
    optimizer._update_scale(False)
    optimizer._update_scale()
    assert told == ["note", True, False, False]
    undo()
    optimizer._update_scale(True)
    assert told[4:] == [True]


def test_factors_are_those_of_the_selected_elements_in_each_masters_part() -> None:
    """The second master begins in the middle of b and holds padding."""
    first, second = torch.zeros(6), torch.zeros(8)
    pieces = [[Piece("a", 0, 4, 0), Piece("b", 0, 2, 4)], [Piece("b", 2, 1, 0), Piece("c", 0, 5, 1)]]
    adapter: Any = SimpleNamespace(masters=lambda: list(zip((first, second), pieces, strict=True)))
    factor: dict[str, Tensor] = {"a": torch.tensor([0.1]), "b": torch.tensor([0.2, 0.3]), "c": torch.tensor([0.4])}
    update = scale_selected(adapter, {name: INDEX[name] for name in factor}, factor)
    found = [update._elements[id(master)] for master in (first, second)]
    assert [scaled.positions.tolist() for scaled in found] == [[1, 4], [0, 5]]  # type: ignore[union-attr]
    torch.testing.assert_close(found[0].factor, torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(found[1].factor, torch.tensor([0.3, 0.4]))


def test_weight_decay_of_every_weight_comes_before_the_scaled_step_and_is_not_scaled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A huge decay, and a factor of 0: what is left is the decay alone. A factor of 1 leaves AdamW's own step."""
    start, grad, factor = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, 0.5])
    master, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adapter: Any = SimpleNamespace(masters=lambda: [(master, [Piece("a", 0, 3, 0)])])
    monkeypatch.setattr(step_scale, "adapter_for", lambda engine: adapter)
    monkeypatch.setattr(
        step_scale,
        "scale_all",
        lambda adapter, layout, factor_N: scale_selected(adapter, {"a": torch.arange(3)}, {"a": factor_N}),
    )
    optimizer, other = (torch.optim.AdamW([param], lr=0.5, weight_decay=0.4) for param in (master, plain))
    scale: Any = SimpleNamespace(layout=None, factor_N=factor)
    steps = step_scale.ScaledSteps(SimpleNamespace(basic_optimizer=optimizer), scale)
    master.grad, plain.grad = grad.clone(), grad.clone()
    optimizer.step()
    other.step()
    decayed = start * (1 - 0.5 * 0.4)
    torch.testing.assert_close(master.data, decayed + factor * (plain.data - decayed))
    assert optimizer.param_groups[0]["weight_decay"] == 0.4
    steps.detach()
    master.data.copy_(plain.data)
    optimizer.step()
    other.step()
    assert torch.equal(master, plain)


@pytest.mark.parametrize("is_invalid", [False, True])
def test_what_breaks_off_leaves_no_trace_in_stage_3(is_invalid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would raise at a trace that is invalid already."""
    done: list[str] = []
    coordinator = SimpleNamespace(
        is_invalid_trace=lambda: is_invalid,
        _invalidate_trace=lambda: done.append("trace"),
        reset_step=lambda: done.append("step"),
    )
    adapter = object.__new__(Stage3)
    adapter.engine = SimpleNamespace(empty_partition_cache=lambda: done.append("gathered"))
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    adapter.optimizer = SimpleNamespace(parameter_offload=offload)
    monkeypatch.setattr(Stage3, "forget_backward", lambda self: done.append("gradients"))
    adapter.abandon_backward()
    assert done == ["gathered", *([] if is_invalid else ["trace"]), "step", "gradients"]
