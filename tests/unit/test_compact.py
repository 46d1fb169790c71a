"""What compact mode adds to a model is invisible to its user, and a checkpoint knows which weights it belongs to."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_model
from torch import nn

from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import num_selected
from piece_ds.state.mask import Mask
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values
from piece_ds.training.compact_trainer import prepare_trainer
from piece_ds.update.attach import prepare_compact
from piece_ds.update.compact import CompactUpdate
from piece_ds.zero.weights import SelectedWeights, weights_fingerprint
from piece_ds.zero.whole_state import whole_state

RATIO = 0.05


@pytest.fixture(params=["llama", "qwen3"])  # qwen3 has tied embeddings
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make_model(request.param)


def test_layout_is_that_of_the_model_as_its_user_sees_it(model: nn.Module) -> None:
    before = layout_of(model)
    values = prepare_compact(model, RATIO)
    assert layout_of(model) == before
    assert values.values.shape == (num_selected(before, RATIO),) == (int(RATIO * before.total),)
    assert [name for name, param in model.named_parameters() if param.requires_grad] == [PARAMETER_NAME]


def test_state_dict_is_the_users_and_loads_strictly(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_compact(model, RATIO)
    assert model.state_dict().keys() == before.keys()
    assert model.load_state_dict(before).missing_keys == []
    before.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(before)


@pytest.mark.parametrize("whole", [True, False])
def test_checkpoint_has_the_values_and_only_if_whole_the_model(model: nn.Module, whole: bool) -> None:
    own = model.state_dict().keys()
    values = prepare_compact(model, RATIO)
    values.values.data.fill_(2.0)
    with values.in_checkpoint({"whole": torch.tensor(whole), "positions": torch.arange(3)}):
        state = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in model.state_dict().items()
        }
    assert state.keys() == {PARAMETER_NAME, "piece_values._extra_state"} | (own if whole else set())
    values.values.data.zero_()
    model.load_state_dict(state)
    assert bool((values.values == 2.0).all())
    assert values.checkpoint is not None
    assert torch.equal(values.checkpoint["positions"], torch.arange(3))


def test_leaving_undoes_joining(model: nn.Module) -> None:
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    prepare_compact(model, RATIO).leave(model)
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before
    assert selected_values(model) is None
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_only_the_trainers_own_checkpoints_are_without_the_model(model: nn.Module, tmp_path: Path) -> None:
    saved = []

    def save(output_dir: str | None = None, _internal_call: bool = False) -> None:
        saved.append((output_dir, _internal_call))

    def trainer() -> Any:
        names = ["model.norm.weight"]
        return SimpleNamespace(
            model=model,
            optimizer=None,
            save_model=save,
            get_decay_parameter_names=lambda model: names,
            args=SimpleNamespace(save_only_model=False),
        )

    # What could not be joined is left as it was.
    for refused in ({"optimizer": object()}, {"model": None}):
        with pytest.raises(UserError, match="give Trainer a model and no optimizer"):
            prepare_trainer(SimpleNamespace(**{**vars(trainer()), **refused}), lambda model: 7, save_full=False)
    assert selected_values(model) is None

    compact = trainer()
    whole_again = prepare_trainer(compact, lambda model: 7, save_full=False)
    assert selected_values(model).values.shape == (7,)  # type: ignore[union-attr]
    checkpoint = str(tmp_path / "checkpoint-5")
    for folder, internal in ((None, False), (None, True), (checkpoint, False), (str(tmp_path / "model"), True)):
        compact.save_model(folder, _internal_call=internal)
    assert saved == [(None, False), (None, True), (checkpoint, False), (str(tmp_path / "model"), True)]
    assert not Path(checkpoint).exists()
    compact.save_model(checkpoint, _internal_call=True)
    assert len(saved) == 4
    assert Path(checkpoint).is_dir()
    whole_again()
    assert compact.save_model is save

    # Asked for, the model is in them.
    selected_values(model).leave(model)  # type: ignore[union-attr]
    full = trainer()
    prepare_trainer(full, lambda model: 7, save_full=True)
    assert full.save_model is save


def test_a_mask_must_fit_what_was_prepared(model: nn.Module) -> None:
    """Rows or columns may be fewer than the room, elements may not; more never fit. The weights train, in one dtype."""
    for unit, counts in (("element", {4: False, 5: True, 6: False}), ("column", {4: True, 5: True, 6: False})):
        values = prepare_compact(model, num_selected=5, unit=unit)
        for count, fits in counts.items():
            with nullcontext() if fits else pytest.raises(UserError, match=f"the mask selects {count} elements"):
                CompactUpdate._check(fitting(model, values, count))
        values.leave(model)

    values = prepare_compact(model, num_selected=5)
    for changes, message in (
        ({"optimised": "model.norm.weight"}, "this one also has 'model.norm.weight'"),
        ({"selected": "model.norm.other"}, "'model.norm.other', which is frozen"),
    ):
        with pytest.raises(UserError, match=message):
            CompactUpdate._check(fitting(model, values, 5, **changes))
    model.get_parameter("model.norm.weight").data = torch.zeros(32, dtype=torch.float16)
    with pytest.raises(UserError, match=r"torch.float32, but 'model.norm.weight' is torch.float16"):
        CompactUpdate._check(fitting(model, values, 5))


def fitting(
    model: nn.Module, values: Any, count: int, optimised: str = PARAMETER_NAME, selected: str = "model.norm.weight"
) -> Any:
    """A CompactUpdate as it is when it checks itself."""
    masters = [(None, [SimpleNamespace(name=PARAMETER_NAME), SimpleNamespace(name=optimised)])]
    return SimpleNamespace(
        _values=values,
        mask=SimpleNamespace(num_selected=count),
        _adapter=SimpleNamespace(masters=lambda: masters),
        _engine=SimpleNamespace(module=model),
        _index={selected: torch.arange(3)},
    )


def test_preparing_twice_is_refused(model: nn.Module) -> None:
    prepare_compact(model, RATIO)
    with pytest.raises(UserError, match="prepared for compact mode already"):
        prepare_compact(model, RATIO)


def test_a_checkpoint_of_another_number_of_values_is_refused(model: nn.Module) -> None:
    """Torch would end in a mismatch of sizes; the values stay as they were."""
    values = prepare_compact(model, num_selected=5)
    with values.in_checkpoint({"whole": True}):
        state = model.state_dict()
    state["piece_values.values"] = torch.ones(7)
    with pytest.raises(UserError, match="holds 7 selected values and this run selects 5: resume with the ratio"):
        model.load_state_dict(state)
    assert values.values.tolist() == [0.0] * 5


def shares(model: nn.Module, num_ranks: int) -> list[Mask]:
    """One random selection, as the ranks of a group of num_ranks hold it."""
    mask = select(layout_of(model), "random", RATIO)
    found = []
    for owner in range(num_ranks):
        layout = replace(mask.layout, rank=owner, num_ranks=num_ranks)
        index = {}
        for info in layout.parameters:
            part, whole = layout.partition(info), mask.index.get(info.name, torch.zeros(0).long())
            index[info.name] = whole[(whole >= part.start) & (whole < part.stop)]
        found.append(replace(mask, layout=layout, index=index))
    return found


def fingerprint(model: nn.Module, num_ranks: int = 1) -> int:
    """What the ranks of a group would agree on."""
    total = sum((weights_fingerprint(model, share) for share in shares(model, num_ranks)), torch.zeros(1).long())
    return int(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_the_same_for_any_number_of_ranks(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    assert fingerprint(model) == fingerprint(model, 2) == fingerprint(model, 3)


def test_fingerprint_sees_one_bit_of_any_unselected_weight_and_no_selected_one(model: nn.Module) -> None:
    before = fingerprint(model)
    selected = shares(model, 1)[0].index["model.layers.1.mlp.up_proj.weight"]
    flat = model.get_parameter("model.layers.1.mlp.up_proj.weight").data.view(-1)
    flat[selected] = 7.0
    assert fingerprint(model) == before
    taken = set(selected.tolist())
    one, other = [i for i in range(flat.numel()) if i not in taken][:2]
    flat.view(torch.int32)[one] ^= 1
    assert fingerprint(model) != before
    flat.view(torch.int32)[one] ^= 1
    assert fingerprint(model) == before
    flat[[one, other]] = flat[[other, one]]  # the same bits elsewhere
    assert fingerprint(model) != before


def test_fingerprint_does_not_depend_on_how_much_is_hashed_at_a_time(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(model)
    monkeypatch.setattr("piece_ds.state.weights_hash.CPU_CHUNK", 13)
    assert fingerprint(model) == before


def test_selected_weights_are_read_and_written_in_order() -> None:
    param = nn.Parameter(torch.arange(12.0).view(3, 4))
    selected = SelectedWeights(param, torch.tensor([1, 6, 11]))
    assert selected.read(param.detach() * 2).tolist() == [2.0, 12.0, 22.0]
    selected.write_(torch.tensor([-1.0, -2.0, -3.0]))
    assert param.flatten().tolist() == [0.0, -1.0, 2.0, 3.0, 4.0, 5.0, -2.0, 7.0, 8.0, 9.0, 10.0, -3.0]


def test_the_whole_state_has_each_weight_once_under_its_own_name(model: nn.Module) -> None:
    """A tied head is stored as the embedding, as transformers' own files do."""
    state = whole_state(SimpleNamespace(module=model, device=torch.device("cpu")))
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(state[name], param) for name, param in model.named_parameters())
    assert ("lm_head.weight" in state) == (not model.config.tie_word_embeddings)


def test_a_checkpoint_knows_which_parameters_its_positions_are_of() -> None:
    """The same places in other parameters are another mask."""
    layout = layout_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    found = []
    for name in ("0.weight", "1.weight", "1.bias"):
        index = {name: torch.tensor([0, 3])}
        update: Any = SimpleNamespace(mask=Mask(layout, index, 2), _index=index)
        found.append(CompactUpdate._positions(update).tolist())
    assert found == [[0, 3], [20, 23], [36, 39]]
