"""Write a chain of deltas while a mask trains: every N steps, what has changed since the last link.

A resumed run reads the links that are there and continues from what the last of them says, whatever step it resumes at.
So a link is never written twice, and readers that had already applied it can go on, also if the repeated steps give
other bits.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.checkpoint.delta_file import chain_metadata
from piece_ds.checkpoint.delta_parts import write_parts
from piece_ds.checkpoint.metadata import describe
from piece_ds.deltas.chain import Link, open_chain, open_link
from piece_ds.deltas.chain_files import link_file, link_files
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask, gather_fragments
from piece_ds.state.weights_hash import bits_of, hash_elements, hash_many, hexadecimal
from piece_ds.zero.weights import read_selected, weights_fingerprint


class ChainWriter:
    """The chain of one task. Every method is a collective; rank 0 reads and writes the files.

    Attributes:
        folder: of the links.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        mask: Mask,
        previous: dict[str, Tensor],
        *,
        before: Path | None = None,
    ) -> None:
        """Begin a chain, or continue the one that is in the folder.

        Args:
            folder: of the links; it need not exist.
            model: trained, with the engine made.
            mask: of what is trained.
            previous: read_selected(model, mask) at the task's start.
            before: folder of the links of the task before; None, or no links in it, for the first of a chain.
        Raises:
            UserError: a link in the folder is damaged, missing, or of another run.
        Cost: reads this rank's part of the weights once. Memory: on rank 0, the selected weights.
        """
        self.folder = folder
        self._model, self._mask = model, mask
        self._dtype_of = {name: param.dtype for name, param in model.named_parameters()}
        self._whole = mask.whole()
        # A copy: links that are there are laid over it, and previous is the caller's.
        whole = gather_fragments(mask.layout, previous, self._dtype_of)
        self._values = {name: values.clone() for name, values in whole.items()}
        self._fingerprint = int(weights_fingerprint(model, mask)) + self._hash(self._values)
        self._number, self._parent = 0, ""

        # One rank reads what is there; a problem ends all.
        problem, self._step = broadcast_object(self._continued(before) if is_main() else None)
        if problem:
            raise UserError(problem)

    def write(self, step: int, *, is_last: bool = False) -> None:
        """Write what has changed since the last link, if anything has.

        Args:
            step: optimizer steps of the task so far. A step that had its link before the run was resumed writes none.
            is_last: the weights are final: the link is written whatever the step is.
        Cost: reads and gathers the selected weights.
        """
        if step <= self._step and not is_last:
            return
        values = gather_fragments(self._mask.layout, read_selected(self._model, self._mask), self._dtype_of)
        if is_main():
            parts, new_bits, old_bits = {}, [], []
            for name, index in self._whole.items():
                places = (bits_of(values[name]) != bits_of(self._values[name])).nonzero().view(-1)
                if places.numel():
                    positions, new, old = index[places], values[name][places], self._values[name][places]
                    parts[name] = {"indices": positions, "values": new}
                    new_bits.append((name, positions, bits_of(new)))
                    old_bits.append((name, positions, bits_of(old)))
            if parts:
                self._write(parts, hash_many(new_bits) - hash_many(old_bits), step)
                self._values = values
        barrier()

    def _write(self, parts: dict[str, dict[str, Tensor]], moved: int, step: int) -> None:
        """Write a link, and make it the last one."""
        selected = sum(own["indices"].numel() for own in parts.values())
        metadata = describe(self._mask, parts) | chain_metadata(self._parent, step, self._number)
        metadata |= {
            "selected": str(selected),
            "ratio": repr(selected / self._mask.layout.total),
            "base_fingerprint": hexadecimal(self._fingerprint),
            "result_fingerprint": hexadecimal(self._fingerprint + moved),
        }
        path = link_file(self.folder, self._number)
        numel = {info.name: info.numel for info in self._mask.layout.parameters}
        self._parent = write_parts(path, parts, numel, metadata, "gaps")
        self._fingerprint += moved
        self._number += 1

    def _continued(self, before: Path | None) -> tuple[str, int]:
        """Overlay the links that are there; return what is wrong with them, or '', and the last one's step, or 0."""
        step = 0
        try:
            last = _last_link(before)
            if last is not None:
                self._parent = last.checksum
            for link in open_chain(self.folder, last):
                self._overlay(link)
                step = link.step
        except UserError as error:
            return str(error), step
        return "", step

    def _overlay(self, link: Link) -> None:
        """Take a link's values as the chain's own."""
        if link.base != hexadecimal(self._fingerprint):
            raise UserError(
                f"{link.path} is of another run than this one: remove {self.folder} to begin its chain anew"
            )
        moved = 0
        for name, change in link.delta.changes():
            index, values = self._whole.get(name), self._values.get(name)
            # The fingerprint does not say which elements a mask selects.
            if index is None or values is None or not bool(torch.isin(change.index, index, assume_unique=True).all()):
                raise UserError(f"{link.path} changes weights that this task's mask leaves alone: remove {self.folder}")
            places = torch.searchsorted(index, change.index)
            moved += hash_elements(name, change.index, bits_of(change.values))
            moved -= hash_elements(name, change.index, bits_of(values[places]))
            values[places] = change.values
        self._fingerprint += moved
        self._number, self._parent = link.number + 1, link.checksum

    def _hash(self, values: dict[str, Tensor]) -> int:
        return sum(hash_elements(name, index, bits_of(values[name])) for name, index in self._whole.items())


class ChainCallback(TrainerCallback):
    """Writes a link after every N optimizer steps. The last link is the caller's, when the weights are final.

    Attributes:
        every: N.
        writer: of the chain; until there is one, nothing is written.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.writer: ChainWriter | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a link if one is due."""
        if self.writer is not None and state.global_step % self.every == 0:
            self.writer.write(state.global_step)


def _last_link(folder: Path | None) -> Link | None:
    """Return the last link of a folder; None without one."""
    paths = link_files(folder) if folder is not None else []
    return open_link(paths[-1]) if paths else None
