"""The methods without a mask, by name. One line each."""

from piece_ds.baselines.baseline import Baseline
from piece_ds.baselines.ewc import EWC
from piece_ds.baselines.gem import GEM
from piece_ds.baselines.lora import LoRA, OLoRA
from piece_ds.baselines.lwf import LwF
from piece_ds.baselines.replay import Replay, ReplayOnline

BASELINES: dict[str, type[Baseline]] = {
    "seqft": Baseline,
    "ewc": EWC,
    "gem": GEM,
    "lwf": LwF,
    "replay": Replay,
    "replay-online": ReplayOnline,
    "lora": LoRA,
    "o-lora": OLoRA,
}
