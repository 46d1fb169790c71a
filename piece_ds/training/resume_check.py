"""Refuse to resume a trainer from a checkpoint that its engine cannot read, before anything is made or loaded."""

from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.overriding import override
from piece_ds.zero.written_with import written_with


def check_when_resumed(trainer: Trainer) -> None:
    """Let trainer.train(resume_from_checkpoint=...) check first that the checkpoint fits the ranks, stage and dtype.

    DeepSpeed would end in an exception of its own, an empty assertion or a missing file, on every rank.
    """
    train = trainer.train

    @wraps(train)
    def checked(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            _check(trainer, resume_from_checkpoint)
        return train(resume_from_checkpoint, *args, **kwargs)

    override(trainer, "train", checked)


def _check(trainer: Trainer, given: str | bool) -> None:
    """Raise UserError if the engine that will be made cannot read the checkpoint. What else is wrong, others say."""
    output = Path(str(trainer.args.output_dir))
    if isinstance(given, bool):
        found = get_last_checkpoint(str(output)) if output.is_dir() else None
    else:
        found = given
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    was = None if found is None else written_with(Path(found))
    if was is None or plugin is None:
        return
    config = plugin.hf_ds_config
    if config.get_value("checkpoint.load_universal"):
        return
    stage, ranks = int(plugin.zero_stage), trainer.args.world_size
    told = config.get_value("bf16.enabled")
    is_bf16 = told if isinstance(told, bool) else bool(trainer.args.bf16)
    if not was.fits(stage, ranks, is_bf16):
        raise UserError(
            f"checkpoint {found} was written with {was}, and this run has {ranks} rank{'s' * (ranks > 1)}, "
            f"ZeRO-{stage}, {'bf16' if is_bf16 else 'not bf16'}: DeepSpeed resumes a trainer only as it was begun; "
            "start it so again, or train by piece_ds train, which resumes a mask on other ranks and stages too"
        )
