"""Tell from the names of a checkpoint's files how many ranks and which ZeRO stage DeepSpeed wrote it with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WrittenWith:
    """The sharding of a checkpoint, as far as names tell it.

    Attributes:
        shards: of the optimizer's state, one for each rank; 0 if every rank has the whole.
        has_parts: whether the weights are in parts too, as at ZeRO-3.
        is_bf16: whether training was in bf16; None if there are no shards, whose names say so.
    """

    shards: int
    has_parts: bool
    is_bf16: bool | None

    def __str__(self) -> str:
        if not self.shards:
            return "ZeRO-3" if self.has_parts else "ZeRO-0"
        ranks = f"{self.shards} rank{'s' * (self.shards > 1)}"
        return f"{ranks}, {'ZeRO-3' if self.has_parts else 'ZeRO below 3'}, {'bf16' if self.is_bf16 else 'not bf16'}"

    def fits(self, stage: int, num_ranks: int, is_bf16: bool) -> bool:
        """Return whether an engine of this stage, number of ranks and dtype reads these files."""
        if self.has_parts != (stage == 3):
            return False
        if not self.shards:
            return stage == 0
        # In bf16 an optimizer at ZeRO-0 may have shards too.
        return self.shards == num_ranks and self.is_bf16 == is_bf16 and (stage > 0 or is_bf16)


def written_with(checkpoint: Path) -> WrittenWith | None:
    """Return the sharding of a folder that engine.save_checkpoint() has written; None if it is not recognised."""
    latest = checkpoint / "latest"
    folder = checkpoint / latest.read_text(errors="replace").strip() if latest.is_file() else None
    if folder is None or not folder.is_dir():
        return None
    shards = {path.name for path in folder.glob("*zero_pp_rank_*_optim_states.pt")}
    has_parts = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    if not shards and not has_parts and not any(folder.glob("mp_rank_*_model_states.pt")):
        return None
    return WrittenWith(len(shards), has_parts, any(name.startswith("bf16_") for name in shards) if shards else None)
