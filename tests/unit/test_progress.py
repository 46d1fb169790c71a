"""The lines that a run says as it goes."""

from types import SimpleNamespace

import pytest
import torch
from support.models import make_model
from support.ranks import on_ranks

from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.runtime import progress
from piece_ds.state.mask import Mask
from piece_ds.training.progress import counts_by_module, duration, scores_line, selection_line, time_left


def test_selection_says_how_many_where_and_how_long() -> None:
    layout = layout_of(make_model("llama"))
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    index = {name: torch.arange(count) for name, count in zip(names, (5, 3, 2), strict=True)}
    mask = Mask(layout, index, 10, "piece-s", 0.1)
    assert counts_by_module(mask) == {"model.layers.*.mlp.up_proj": 8, "model.norm": 2}
    line = selection_line(mask, 4.25)
    assert line.startswith(f"10 of {layout.total:,} weights selected (")
    assert line.endswith("%, piece-s) in 4.2 s: model.layers.*.mlp.up_proj 80 %, model.norm 20 %")
    assert "from a file" in selection_line(mask, None)


def test_counts_are_those_of_all_ranks() -> None:
    """The second rank holds nothing of one of the tensors."""

    def counts() -> dict[str, int]:
        layout = layout_of(make_model("llama"))
        names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
        owned = names[: 2 - layout.rank]
        return counts_by_module(Mask(layout, {name: torch.arange(3 + layout.rank) for name in owned}, 10))

    wanted = {"model.layers.*.mlp.up_proj": 7, "model.layers.*.mlp.down_proj": 3}
    assert on_ranks(2, counts) == [wanted, wanted]


def test_only_the_first_kinds_are_named() -> None:
    line = selection_line(select(layout_of(make_model("llama")), "random", 0.5), 1.0)
    assert " others" in line
    assert line.count(" %,") <= 5


def test_lines_of_a_log_count_in_the_plural(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    for unit, several in {"batch": "batches", "round": "rounds", "program": "programs", "task": "tasks"}.items():
        caplog.clear()
        assert list(progress.progress_bar(range(3), "law", unit=unit)) == [0, 1, 2]
        assert caplog.messages[0].startswith(f"law: 1 of 3 {several}, about ")


def test_a_line_foretells_in_minutes_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ninety seconds an item: with one of five done, four are left."""
    clock = iter(range(0, 900, 90))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock) + 0.0))
    assert len(list(progress.progress_bar(range(5), "law", unit="batch"))) == 5
    # The clock is read once before the first item, which is no measure.
    assert caplog.messages[0] == "law: 1 of 5 batches, about 12.0 min left"
    assert caplog.messages[-1] == "law: 4 of 5 batches, about 1.9 min left"


def test_scores_stand_for_losses_and_general_text_comes_last() -> None:
    line = scores_line({"a": 0.5, "b": None, "c": None}, {"a": 9.0, "b": 1.25, "c": None}, 1.5)
    assert line == "a 0.500, b loss 1.2500, general text loss 1.5000"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.21, "4.2 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_have_the_unit_that_suits_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_time_left_is_the_mean_of_what_is_done() -> None:
    assert time_left([60.0, 120.0], 2) == ", about 3 min 0 s left"
    assert time_left([60.0], 0) == ""
