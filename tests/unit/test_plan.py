"""The planner's shapes are the published models', its arithmetic is that of hand sums, and bad settings are refused."""

import math
from pathlib import Path

import pytest
from support.models import make_model

from piece_ds.__main__ import main
from piece_ds.models.loading import empty_model
from piece_ds.plan.memory import MOMENTS, memory_terms, peak, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import KNOWN, ModelShape, known_config, shape_of
from piece_ds.plan.traffic import transfers

# Elements as the model cards' files count them.
PUBLISHED = {"1.5B": 1_543_714_304, "8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}
ROUND = ModelShape(
    total=1_000_000, eligible=900_000, largest=100_000, linear_edges=5_000, hidden=64, layers=2, vocab=100
)


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = shape_of(empty_model(known_config(name)))
    config = known_config(name)
    assert shape.total == PUBLISHED[name]
    assert shape.eligible == shape.total - config.vocab_size * config.hidden_size


def test_shape_of_a_tied_model_by_hand() -> None:
    """qwen3 of support.models: 5 query heads of 4, 1 key head, hidden 25, mlp 37, two layers, head tied."""
    edges = 2 * ((20 + 25) + 2 * (4 + 25) + (25 + 20) + 2 * (37 + 25) + (25 + 37))
    shape = shape_of(make_model("qwen3"))
    assert (shape.linear_edges, shape.hidden, shape.layers, shape.vocab) == (edges, 25, 2, 97)
    assert shape.total - shape.eligible == 97 * 25


def sizes(setting: Setting, moment: str, on_host: bool = False) -> float:
    return total(
        [t for t in memory_terms(ROUND, setting) if not t.is_estimate and t.name != "reduce buckets"], moment, on_host
    )


def test_masked_zero3_by_hand() -> None:
    """2 N + (4 + 8 + 4) T over 4 ranks, one more fp32 gradient in the step, 16 K / 4 positions; 8 E to select."""
    setting = Setting(world=4, update_mode="masked")
    assert sizes(setting, "backward") == 500_000 + 16 * 225_000 + 16 * 250
    assert sizes(setting, "step") == 500_000 + 20 * 225_000 + 16 * 250
    assert sizes(setting, "statistics") == 500_000 + 8 * 225_000 + 8 * 225_000
    assert (
        sizes(Setting(world=4, update_mode="masked", method="piece-f"), "statistics")
        == 500_000 + 8 * 225_000 + 4 * 225_000
    )


def test_compact_zero3_by_hand() -> None:
    """2 N / W + K (2 + 4 + 8 + 4) / W, K fp32 sums on every rank, and positions of the owned: int32 and int64."""
    setting = Setting(world=4, update_mode="compact")
    assert math.isclose(sizes(setting, "step"), 500_000 + 18 * 250 + 4 * 1_000 + (4 + 8) * 250)


def test_lora_has_rank_times_rows_and_columns() -> None:
    setting = Setting(world=1, zero=0, dtype="fp32", update_mode="lora", lora_rank=8)
    assert sizes(setting, "step") == 4 * (1_000_000 + 40_000) + (8 + 4) * 40_000


def test_offload_moves_masters_and_moments_to_the_cpu() -> None:
    here, there = (Setting(world=4, update_mode="masked", offload_optimizer=off) for off in (False, True))
    assert sizes(here, "backward") - sizes(there, "backward") == 16 * 225_000
    assert sizes(there, "backward", on_host=True) == 20 * 225_000 + sizes(here, "backward", on_host=True)
    both = Setting(world=4, update_mode="masked", offload_optimizer=True, offload_param=True)
    assert sizes(there, "backward") - sizes(both, "backward") == 500_000


def test_peak_is_the_largest_moment() -> None:
    terms = memory_terms(ROUND, Setting(world=4, update_mode="masked"))
    assert peak(terms) == max((total(terms, moment), moment) for moment in MOMENTS)


def test_traffic_by_hand() -> None:
    """Ring: three quarters of a gather over 4 ranks, twice that of an all-reduce."""
    masked = Setting(world=4, zero=2, update_mode="masked", accumulation=3)
    received = {t.name: t.received for t in transfers(ROUND, masked)}
    assert received["gradients"] == 3 * 2 * 0.75 * 4 * 900_000
    assert received["updated parameters"] == 0.75 * 2 * 900_000
    compact = {t.name: t.received for t in transfers(ROUND, Setting(world=4, update_mode="compact", accumulation=3))}
    assert compact["gradient of the selected"] == 2 * 0.75 * 4 * 1_000
    assert compact["parameters, forward"] == 3 * 0.75 * 2 * 1_000_000
    assert transfers(ROUND, Setting(world=1)) == []


def test_a_local_folder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    main(["plan", "--model", str(tmp_path), "--world", "2", "--update_mode", "masked"])
    printed = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters())} parameters" in printed
    assert "reduce-scatter" in printed


def test_the_table_has_every_model_at_every_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--table"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip("| "), int(row[1])) for row in rows] == [(m, w) for m in KNOWN for w in (1, 8, 64, 512)]
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "plan needs --model"),
        (["--model", "8b"], "expected a local model folder or one of 1.5B, 8B, 70B, 405B"),
        (["--model", "8B", "--world", "0"], "--world must be positive"),
        (["--model", "8B", "--ratio", "0"], "--ratio must be in (0, 1]"),
        (["--model", "8B", "--zero", "2", "--offload_param"], "--offload_param needs --zero 3"),
        (["--model", "8B", "--zero", "0", "--offload_optimizer"], "--offload_optimizer needs --zero 1, 2 or 3"),
        (["--model", "8B", "--update_mode", "none"], "invalid choice"),
        (["--zero", "4"], "invalid choice"),
    ],
)
def test_bad_settings_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
