"""Where masks lie and what they share, by hand."""

from pathlib import Path

import pytest
import torch
from support.models import make_model

from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.checkpoint.mask_statistics import Place, mask_statistics, overlap, place_of, read_index
from piece_ds.cli.masks import print_masks
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("3", "self_attn.q_proj")),
        ("model.layers.11.mlp.up_proj.bias", Place("11", "mlp.up_proj.bias")),
        ("gpt_neox.layers.0.attention.dense.weight", Place("0", "attention.dense")),
        ("model.layers.2.mlp.experts.5.up_proj.weight", Place("2", "mlp.experts.5.up_proj")),
        ("model.layers.2.mlp.shared.0.weight", Place("2", "mlp.shared.0")),
        ("model.norm.weight", Place("other", "model.norm")),
        ("lm_head.weight", Place("other", "lm_head")),
    ],
)
def test_place_is_layer_and_module_type(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_counts_are_per_layer_and_module_type() -> None:
    numel = {"m.0.a.weight": 10, "m.1.a.weight": 10, "m.1.b.weight": 6, "head.weight": 4}
    index = {"m.1.a.weight": torch.tensor([0, 9]), "head.weight": torch.tensor([3])}
    assert mask_statistics(index, numel) == {
        "0": {"a": {"selected": 0, "total": 10}},
        "1": {"a": {"selected": 2, "total": 10}, "b": {"selected": 0, "total": 6}},
        "other": {"head": {"selected": 1, "total": 4}},
    }


def test_overlap_is_shared_over_united() -> None:
    first = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([5])}
    second = {"a": torch.tensor([1, 2, 3]), "c": torch.tensor([5])}
    assert overlap(first, second) == overlap(second, first) == 2 / 6
    assert overlap(first, first) == 1.0
    assert overlap(first, {"c": torch.tensor([0])}) == 0.0
    assert overlap({}, {}) == 0.0


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    layout = layout_of(make_model("llama"))
    index = {info.name: torch.arange(0, info.numel, 5) for info in layout.parameters[2:4]}
    mask = Mask(layout, index, sum(positions.numel() for positions in index.values()), "random", 0.1)
    save_mask(tmp_path / "mask.safetensors", mask)
    return tmp_path / "mask.safetensors"


def test_index_is_read_back_as_it_was_written(mask_file: Path) -> None:
    index, numel, metadata = read_index(mask_file)
    assert all(positions.tolist() == list(range(0, numel[name], 5)) for name, positions in index.items())
    assert metadata["method"] == "random"


def test_masks_are_printed_with_their_overlap(mask_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_masks([str(mask_file), str(mask_file)])
    printed = capsys.readouterr().out
    assert "overlap (Jaccard)" in printed
    assert "1.0000" in printed


def test_missing_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        print_masks([str(tmp_path / "none")])
