"""A trainer that is resumed with another number of ranks, stage or dtype is refused before an engine is made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from piece_ds.runtime.errors import UserError
from piece_ds.training.resume_check import check_when_resumed
from piece_ds.zero.written_with import written_with


def make_checkpoint(folder: Path, shards: int, has_parts: bool, prefix: str = "") -> Path:
    """The names that engine.save_checkpoint() gives."""
    checkpoint = folder / "checkpoint-3"
    inside = checkpoint / "global_step3"
    inside.mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step3")
    for rank in range(shards):
        (inside / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if has_parts:
            (inside / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if not has_parts:
        (inside / "mp_rank_00_model_states.pt").touch()
    return checkpoint


def make_trainer(output: Path, stage: int, ranks: int, is_bf16: bool = False, **config: Any) -> Any:
    """What the check looks at. Its train() returns what it was called with."""
    content = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": is_bf16}, **config}
    plugin = SimpleNamespace(zero_stage=stage, hf_ds_config=HfDeepSpeedConfig(content))
    return SimpleNamespace(
        args=SimpleNamespace(output_dir=str(output), world_size=ranks, bf16=is_bf16),
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)),
        train=lambda *args, **kwargs: (args, kwargs),
    )


# shards, parts, prefix of the checkpoint; stage, ranks, bf16 of the run; what is said of the checkpoint if refused
CASES = [
    ((2, False, ""), (2, 2, False), None),
    ((2, False, ""), (1, 2, False), None),
    ((2, False, ""), (2, 1, False), "2 ranks, ZeRO below 3, not bf16"),
    ((2, False, ""), (2, 4, False), "2 ranks, ZeRO below 3, not bf16"),
    ((2, False, ""), (3, 2, False), "2 ranks, ZeRO below 3, not bf16"),
    ((2, False, ""), (0, 2, False), "2 ranks, ZeRO below 3, not bf16"),
    ((1, False, ""), (2, 2, False), "1 rank, ZeRO below 3, not bf16"),
    ((2, True, ""), (3, 2, False), None),
    ((2, True, ""), (3, 3, False), "2 ranks, ZeRO-3, not bf16"),
    ((2, True, ""), (2, 2, False), "2 ranks, ZeRO-3, not bf16"),
    ((2, True, "bf16_"), (3, 2, True), None),
    ((2, True, "bf16_"), (3, 2, False), "2 ranks, ZeRO-3, bf16"),
    ((2, False, ""), (2, 2, True), "2 ranks, ZeRO below 3, not bf16"),
    ((2, False, "bf16_"), (0, 2, True), None),
    ((0, False, ""), (0, 1, False), None),
    ((0, False, ""), (0, 3, False), None),
    ((0, False, ""), (2, 1, False), "ZeRO-0"),
    ((0, False, ""), (3, 1, False), "ZeRO-0"),
]


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize(("written", "now", "shown"), CASES)
def test_only_a_checkpoint_that_the_engine_reads_is_resumed(
    written: tuple[int, bool, str], now: tuple[int, int, bool], shown: str | None, as_path: bool, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path, *written)
    trainer = make_trainer(tmp_path, *now)
    check_when_resumed(cast(Any, trainer))
    given = str(checkpoint) if as_path else True
    if shown is None:
        assert trainer.train(given, trial=None) == ((given,), {"trial": None})
        return
    stage, ranks, _ = now
    message = rf"checkpoint-3 was written with {shown}, and this run has {ranks} ranks?, ZeRO-{stage}, .* begun"
    with pytest.raises(UserError, match=message):
        trainer.train(resume_from_checkpoint=given)


def test_what_is_not_known_is_left_to_the_trainer(tmp_path: Path) -> None:
    """No checkpoint, a folder without DeepSpeed's part, one in its universal form, and a trainer that begins."""
    trainer = make_trainer(tmp_path, 2, 3)
    check_when_resumed(cast(Any, trainer))
    for given in (None, False, True, str(tmp_path), str(tmp_path / "missing")):
        assert trainer.train(given) == ((given,), {})
    checkpoint = make_checkpoint(tmp_path, 2, has_parts=False)
    assert trainer.train() == ((None,), {})
    universal = make_trainer(tmp_path, 2, 3, checkpoint={"load_universal": True})
    check_when_resumed(cast(Any, universal))
    assert universal.train(str(checkpoint)) == ((str(checkpoint),), {})
    (checkpoint / "latest").unlink()
    assert written_with(checkpoint) is None
