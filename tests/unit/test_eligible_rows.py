"""--eligible with rows: of the embeddings only the rows of added tokens may be selected, and no other."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.models import make_model
from support.ranks import on_ranks

from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.config.arguments import ModelArguments
from piece_ds.config.settings import parse
from piece_ds.methods.estimate import select
from piece_ds.models.eligible import eligible_rows, make_eligible, names_rows
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import check_eligible
from piece_ds.preflight.checks import check_sources
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import budget_groups
from piece_ds.state.partition import Layout, ParameterInfo, owned_range
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.update.attach import prepare_compact
from piece_ds.zero.exchange import plan_buckets, slice_range

EMBEDDING = "model.embed_tokens.weight"  # [97, 35]
WIDTH = 35


def test_rows_are_counted_as_slices_count() -> None:
    for text, rows in (("[90:]", (90, 97)), ("[-3:]", (94, 97)), ("[:2]", (0, 2)), ("[5:6]", (5, 6)), ("[:]", (0, 97))):
        model = make_model("llama")
        assert make_eligible(model, [EMBEDDING + text]) == [EMBEDDING]
        assert eligible_rows(model) == {EMBEDDING: rows}
        info = next(info for info in layout_of(model).eligible() if info.name == EMBEDDING)
        assert (info.selectable.start, info.selectable.stop) == (rows[0] * WIDTH, rows[1] * WIDTH)
    assert make_eligible(model, [EMBEDDING]) == [EMBEDDING]  # a second call replaces the choice of the first
    assert eligible_rows(model) == {}
    assert names_rows("*norm*, *embed*[3:]")
    assert not names_rows("*embed*,*[ab]*")
    assert not names_rows(None)


def test_rows_that_are_not_there_are_refused_in_one_line() -> None:
    refused = {
        "*embed*[97:]": "names no row",
        "*embed*[5:5]": "names no row",
        "*embed*[9:3]": "names no row",
        "*embed*[90:98]": "has 97",
        "*embed*[-98:]": "names no row",
        "*norm*[3:]": "is already",
        "*embedding*[3:]": "no parameter has such a name",
    }
    for pattern, reason in refused.items():
        with pytest.raises(UserError, match=reason) as caught:
            make_eligible(make_model("llama"), [pattern])
        assert "\n" not in str(caught.value)
    for second in (EMBEDDING, "*[:3]"):
        with pytest.raises(UserError, match="name it once"):
            make_eligible(make_model("llama"), ["*embed*[90:]", second])


def layout_with_rows(rank: int = 0, num_ranks: int = 1) -> Layout:
    infos = (
        ParameterInfo("embedding", (11, 5), 55, True, rows=(7, 10)),
        ParameterInfo("matrix", (4, 5), 20, True),
        ParameterInfo("frozen", (3,), 3, False),
    )
    return Layout(infos, rank, num_ranks)


def scores_on(layout: Layout) -> GradientStats:
    """Squares that are the largest in the rows that may not be selected."""
    whole = {"embedding": torch.arange(55, 0, -1).float(), "matrix": torch.arange(20).float() + 0.5}
    stats = empty_stats(layout, False, "cpu")
    for info, part, offset in layout.owned():
        stats.square_sum[offset : offset + part.numel] = whole[info.name][part.start : part.stop]
    return stats


def test_every_element_of_the_rows_has_one_owner_and_no_other_has_one() -> None:
    for num_ranks in (1, 2, 3, 5, 60):
        layouts = [layout_with_rows(rank, num_ranks) for rank in range(num_ranks)]
        info = layouts[0].parameters[0]
        ranges = [owned_range(info, rank, num_ranks) for rank in range(num_ranks)]
        assert [i for part in ranges for i in range(part.start, part.stop)] == list(range(35, 50))
        assert sum(layout.num_owned for layout in layouts) == layouts[0].num_eligible == 15 + 20
        for elements in (3, 1000):
            sent = [
                (part.info.name, i)
                for bucket in plan_buckets(layouts[0], elements)
                for part in bucket
                for owner in range(num_ranks)
                for i in range(*slice_range(part, owner, num_ranks))
            ]
            assert sorted(sent) == [("embedding", i) for i in range(35, 50)] + [("matrix", i) for i in range(20)]


def selections(rank: int = 0, num_ranks: int = 1) -> dict[str, dict[str, list[int]]]:
    layout = layout_with_rows(rank, num_ranks)
    stats = scores_on(layout)
    found = {}
    for unit in ("element", "row", "column"):
        for ratio in (0.1, 0.3, 1.0):
            mask = select(layout, "piece-f", ratio, stats, unit=unit)
            found[f"{unit} {ratio}"] = {name: index.tolist() for name, index in mask.whole().items()}
    for budget in ("layer", "tensor"):
        found[budget] = {n: i.tolist() for n, i in select(layout, "piece-f", 0.3, stats, budget=budget).whole().items()}
    found["random"] = {n: i.tolist() for n, i in select(layout, "random", 0.3).whole().items()}
    return found


def test_selections_take_only_those_rows_whoever_owns_them() -> None:
    alone = selections()
    # Squares of the eligible rows are 20 down to 6, of the matrix 0.5 up to 19.5: by hand.
    assert alone["element 0.1"] == {"embedding": [35, 36, 37, 38], "matrix": [17, 18, 19]}
    assert alone["element 1.0"] == {"embedding": list(range(35, 50)), "matrix": list(range(20))}
    for name, index in alone.items():
        assert all(35 <= i < 50 for i in index.get("embedding", [])), name
    for num_ranks in (2, 3):
        for found in on_ranks(num_ranks, lambda: selections(dist.get_rank(), dist.get_world_size())):
            assert found == alone


def test_compact_mode_knows_the_rows_and_how_many_weights_there_are() -> None:
    model = make_model("llama")
    make_eligible(model, ["*embed*[95:]"])
    before = layout_of(model)
    prepare_compact(model, ratio=1.0)
    assert layout_of(model) == before
    assert model.piece_values.values.numel() == before.num_eligible == before.total - 95 * WIDTH


def test_statistics_of_other_rows_are_refused(tmp_path: Path) -> None:
    layout = layout_with_rows()
    save_statistics(tmp_path, scores_on(layout))
    assert torch.equal(load_statistics(tmp_path, layout, False).square_sum, scores_on(layout).square_sum)
    infos = (ParameterInfo("embedding", (11, 5), 55, True), *layout.parameters[1:])
    with pytest.raises(UserError, match="are of rows"):
        load_statistics(tmp_path, Layout(infos, 0, 1), False)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_the_start_says_what_was_added_and_warns_of_a_tied_head(
    family: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_model(family).config
    with caplog.at_level(logging.WARNING):
        check_eligible(ModelArguments(model_name_or_path="x", eligible="*embed*[95:]"), config)
    width = config.hidden_size
    assert f"makes {2 * width} parameters in 1 tensors eligible: {EMBEDDING}[95:97]" in caplog.text
    assert ("are the output head too" in caplog.text) == tied


def test_methods_without_a_mask_refuse_rows() -> None:
    for method in ("seqft", "ewc", "replay", "lora"):
        with pytest.raises(UserError, match="--eligible with rows needs a method with a mask"):
            check_sources(parse(["--method", method, "--eligible", "*embed*[90:]"]), 2)
    check_sources(parse(["--method", "piece-s", "--eligible", "*embed*[90:]"]), 2)


def test_a_tensor_is_given_its_share_by_the_rows_that_may_be_selected() -> None:
    """Of two tensors as large, the one of which a tenth is eligible gets a tenth of the other's share."""
    infos = (ParameterInfo("a", (100, 10), 1000, True, rows=(90, 100)), ParameterInfo("b", (100, 10), 1000, True))
    groups = budget_groups(Layout(infos, 0, 1), 0.11, "tensor")
    assert groups == [(["a"], 20), (["b"], 200)]
