"""Task deltas as files that are applied to a model folder and reverted again, bit for bit."""

from piece_ds.deltas.combine import Merge, merge_deltas
from piece_ds.deltas.compose import compose
from piece_ds.deltas.delta import Delta, find_deltas, open_delta
from piece_ds.deltas.difference import diff_folders
from piece_ds.deltas.folder import ModelFolder, open_folder
from piece_ds.deltas.follow import ChainFollower
from piece_ds.deltas.live import LiveDelta, apply_delta_
from piece_ds.deltas.patch import patch_in_place, patch_to, require_free
from piece_ds.deltas.scale import prune_delta, scale_delta
from piece_ds.deltas.verify import Step, verify

__all__ = [
    "ChainFollower",
    "Delta",
    "LiveDelta",
    "Merge",
    "ModelFolder",
    "Step",
    "apply_delta_",
    "compose",
    "diff_folders",
    "find_deltas",
    "merge_deltas",
    "open_delta",
    "open_folder",
    "patch_in_place",
    "patch_to",
    "prune_delta",
    "require_free",
    "scale_delta",
    "verify",
]
