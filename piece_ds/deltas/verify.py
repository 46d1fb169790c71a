"""Check, in one reading pass and before a byte is written, that deltas belong on a folder's weights.

Every selected value must be what the delta says it was. The fingerprint of all weights must be that of the base on
which the delta was trained. It also exposes deltas that are missing, out of order, or applied already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from piece_ds.checkpoint.metadata import model_fingerprint
from piece_ds.deltas.delta import Delta
from piece_ds.deltas.folder import ModelFolder, map_bits
from piece_ds.deltas.record import refuse_again
from piece_ds.models.stored_names import Part
from piece_ds.runtime.errors import UserError
from piece_ds.state.weights_hash import bits_of, hash_elements, hexadecimal


@dataclass(frozen=True)
class Step:
    """One delta to apply, or to revert (undo)."""

    delta: Delta
    undo: bool = False
    # What bits() read last: a parameter may be stored in hundreds of parts, which ask for the same one after another.
    _last: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def verb(self) -> Literal["apply", "revert"]:
        return "revert" if self.undo else "apply"

    def bits(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return what the step does to one parameter.

        Returns:
            Positions, the bits expected there (None if the file does not say), and the bits to write.
        """
        if name not in self._last:
            change = self.delta.change(name)
            values = bits_of(change.values)
            previous = None if change.previous is None else bits_of(change.previous)
            self._last.clear()
            if self.undo:
                assert previous is not None
                self._last[name] = change.index, values, previous
            else:
                self._last[name] = change.index, previous, values
        return self._last[name]

    def bits_in(
        self, folder: ModelFolder, name: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return what the step does to one stored tensor, which may be a part of a parameter.

        Returns:
            Positions in the tensor, positions in its parameter, the bits expected there, and the bits to write.
        """
        index, old, new = self.bits(folder.parameter_of[name])
        places, positions = folder.locate(name, index)
        return positions, index[places], None if old is None else old[places], new[places]

    @property
    def before(self) -> str | None:
        """Fingerprint of the weights that this step starts from."""
        return self.delta.result_fingerprint if self.undo else self.delta.base_fingerprint

    @property
    def after(self) -> str | None:
        """Fingerprint of the weights that this step leaves."""
        return self.delta.base_fingerprint if self.undo else self.delta.result_fingerprint


@dataclass
class _Count:
    """What was found at the positions that one step writes."""

    change: int = 0  # of the fingerprint
    num_other: int = 0  # selected values that are not what the step expects
    num_done: int = 0  # ... that are already what it writes


@dataclass
class Verified:
    """What a pass over the folder found.

    Attributes:
        fingerprints: of all weights, before the first step and after each.
        files: file -> (fingerprint before, after), each over the file's tensors; only files that change.
    """

    fingerprints: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)


def verify(folder: ModelFolder, steps: Sequence[Step]) -> Verified:
    """Check that steps, taken in this order, fit the folder's weights.

    Raises:
        UserError: another model, another dtype, other weights, a wrong order, or a delta that cannot be reverted.
    Cost: reads all weights once. Memory: the largest tensor that changes, in its dtype.
    """
    for step in steps:
        _check_kind(folder, step)

    # Read every file once, and apply the steps to a private copy of each tensor.
    counts = [_Count() for _ in steps]
    verified = Verified()
    total, counted = 0, set[tuple[str, Part | None]]()
    for file in folder.files:
        before = after = 0
        for name in folder.in_file(file):
            held = folder.held(name)
            own, changes = _visit(folder, name, steps, counts, held not in counted)
            before, after = before + own, after + own + changes
            total += 0 if held in counted else own
            counted.add(held)
        if before != after:
            verified.files[file] = hexadecimal(before), hexadecimal(after)

    # Compare what each step found with what it expects, in order.
    for number, (step, count) in enumerate(zip(steps, counts, strict=True)):
        verified.fingerprints.append(hexadecimal(total))
        earlier = [other.delta for other in steps[:number] if other.undo == step.undo]
        _check_weights(folder, step, count, verified.fingerprints[-1], earlier)
        total += count.change
    verified.fingerprints.append(hexadecimal(total))
    return verified


def _visit(folder: ModelFolder, name: str, steps: Sequence[Step], counts: list[_Count], first: bool) -> tuple[int, int]:
    """Apply the steps to a private copy of one stored tensor, and count what each step finds.

    Args:
        folder: the model.
        name: of the tensor in the files.
        steps: in order.
        counts: one per step; they are added to.
        first: whether this is the first copy of what it holds, the one that the fingerprint counts.
    Returns:
        The tensor's hash, and what the steps add to it.
    """
    place, parameter = folder.stored[name], folder.parameter_of[name]
    # A tensor of a dtype that no delta can have is not part of the fingerprint.
    if place.dtype is None:
        return 0, 0
    flat = map_bits(folder.root / place.file, place, "c")
    # Hashes of elements add up, so a change needs only the elements it touches.
    own, changes = folder.hash_of(name, flat), 0
    for step, count in zip(steps, counts, strict=True):
        if parameter in step.delta.shapes:
            positions, index, old, new = step.bits_in(folder, name)
            current = flat[positions]
            count.num_other += 0 if old is None else int((current != old).sum())
            count.num_done += int((current == new).sum())
            change = hash_elements(parameter, index, new) - hash_elements(parameter, index, current)
            count.change += change if first else 0
            changes += change
            flat[positions] = new
    return own, changes


def file_fingerprint(folder: ModelFolder, file: str) -> str:
    """Return the sum of the hashes of one file's tensors, as in Verified.files."""
    total = 0
    for name in folder.in_file(file):
        if folder.stored[name].dtype is not None:
            bits = map_bits(folder.root / file, folder.stored[name], "c")
            total += folder.hash_of(name, bits)
    return hexadecimal(total)


def check_result(folder: ModelFolder, steps: Sequence[Step]) -> None:
    """Raise UserError unless the folder is what the steps, taken in this order, leave.

    This is for work that another call began: its note does not prove what it did.

    Cost: reads all weights once if the last step gives the fingerprint of its result, else only the selected values.
    """
    seen: set[tuple[str, Part | None]] = set()
    total, is_right = 0, True
    expected = steps[-1].after
    for name in (name for file in folder.files for name in folder.in_file(file)):
        place, held = folder.stored[name], folder.held(name)
        if place.dtype is None:
            continue
        flat = map_bits(folder.root / place.file, place, "c")
        # A tied weight may be stored twice; the fingerprint counts it once.
        if expected is not None and held not in seen:
            total += folder.hash_of(name, flat)
        seen.add(held)
        written = [step.bits_in(folder, name) for step in steps if held[0] in step.delta.shapes]
        if written:
            # Later steps overwrite earlier ones: only the last value at each position must be there.
            positions = torch.cat([found for found, _, _, _ in written]).unique()
            wanted = flat[positions]
            for found, _, _, new in written:
                wanted[torch.searchsorted(positions, found)] = new
            is_right = is_right and torch.equal(flat[positions], wanted)
    if not is_right or expected not in (None, hexadecimal(total)):
        raise UserError(
            f"{folder.root}: its weights are not those after the change that was to be finished: the note of it in "
            "piece_ds.json does not belong to them; copy the folder again"
        )


def _check_kind(folder: ModelFolder, step: Step) -> None:
    """Raise UserError for what headers and metadata show.

    That is another model, shape or dtype, or a delta that lacks what the step needs.
    """
    delta, shapes = step.delta, folder.layout.shapes()
    fingerprint = delta.metadata.get("model_fingerprint")
    if fingerprint not in (None, model_fingerprint(folder.layout)):
        raise UserError(
            f"delta {delta.path} was made for another model than {folder.root}: parameter names or shapes "
            "differ; give the model that the run began with"
        )

    # Every tensor that the delta changes must be there, in its shape and dtype.
    for name, shape in delta.shapes.items():
        if shapes.get(name) != shape:
            raise UserError(
                f"delta {delta.path} changes {name!r} of shape {list(shape)}, {folder.root} has "
                f"{list(shapes[name]) if name in shapes else 'no such parameter'}"
            )
        for stored in folder.stored_as(name):
            dtype = folder.stored[stored].dtype
            if dtype != delta.dtypes[name]:
                raise UserError(
                    f"delta {delta.path} holds {delta.dtypes[name]} values of {name!r}, {folder.root} "
                    f"stores {dtype or 'a quantized type'}: save the model in the dtype it was trained in"
                )

    # A delta must be able to do, and to prove, what is asked of it.
    if step.undo and not delta.reversible:
        raise UserError(
            f"delta {delta.path} was written without previous values and cannot be reverted: keep a copy "
            "of the base, or use a delta with them"
        )
    if not delta.reversible and step.before is None:
        raise UserError(
            f"delta {delta.path} holds neither previous values nor its base's fingerprint: nothing can "
            "show that it belongs to this model; write it again"
        )


def _check_weights(folder: ModelFolder, step: Step, count: _Count, fingerprint: str, before: Sequence[Delta]) -> None:
    """Raise UserError unless the weights that a step finds are those it expects, after the deltas before it."""
    path, verb = step.delta.path, "reverted" if step.undo else "applied"
    selected = step.delta.num_selected
    fits = step.before in (None, fingerprint)
    if not count.num_other and fits:
        return
    refuse_again(step.delta, before)
    if count.num_done >= selected and not fits:  # tied weights may be stored, and counted, twice
        raise UserError(
            f"delta {path} is {verb} already in {folder.root}, or the weights around it differ from those "
            "it was made with: leave it out"
        )
    what = (
        f"{count.num_other} of its {selected} selected values are not what it expects"
        if count.num_other
        else f"weights outside its selection differ (fingerprint {fingerprint}, expected {step.before})"
    )
    order = (
        "only the last delta of a stack can be taken off, then the one before"
        if step.undo
        else "give the base it was trained on and the deltas before it, in task order"
    )
    raise UserError(f"delta {path} cannot be {verb} on {folder.root}: {what}; {order}")
