"""The work of `piece_ds delta ...`: open files and folders, pass them to piece_ds.deltas, and print what was done."""

import argparse
from functools import partial
from math import prod
from pathlib import Path

from torch import Tensor, nn

from piece_ds.checkpoint.mask_statistics import mask_statistics, place_of
from piece_ds.cli.masks import layers_grid
from piece_ds.config.arguments import ModelArguments
from piece_ds.deltas import compose, verify
from piece_ds.deltas.delta import Delta, open_delta, open_deltas
from piece_ds.deltas.export import export_vllm, require_stored_names
from piece_ds.deltas.export_adapter import export_adapter
from piece_ds.deltas.export_peft import export_peft
from piece_ds.deltas.folder import ModelFolder, open_folder
from piece_ds.deltas.patch import patch_in_place, patch_to, require_free
from piece_ds.deltas.value_changes import change_sizes
from piece_ds.deltas.verify import Step
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import empty_model, load_config
from piece_ds.models.pretrained import model_source
from piece_ds.models.stored_names import stored_names
from piece_ds.report.grids import Grid
from piece_ds.report.table import print_grids
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.text import counted, printable


def list_deltas(arguments: argparse.Namespace) -> None:
    """Print one line per delta."""
    rows = []
    for delta in open_deltas(arguments.deltas):
        size = delta.path.stat().st_size
        metadata = delta.metadata
        rows.append(
            (
                str(delta.path),
                metadata.get("method") or "",
                f"{float(metadata['ratio']):.4g}" if "ratio" in metadata else "",  # of a link it has 17 digits
                delta.base_fingerprint or "",
                delta.result_fingerprint or "",
                str(delta.num_selected),
                f"{size / 1e6:.3f}",
                f"{size / delta.num_selected:.2f}",
            )
        )
    header = ("delta", "method", "ratio", "base", "result", "selected", "MB", "bytes/value")
    print_grids([Grid("deltas", header, tuple(rows), num_text_columns=5)])


def inspect_deltas(arguments: argparse.Namespace) -> None:
    """Print where each delta lies and how far it moves values."""
    for delta in open_deltas(arguments.deltas):
        numel = {name: prod(shape) for name, shape in delta.shapes.items()}
        index = {name: delta.change(name).index for name in delta.shapes}
        heading = "selected elements, and their share of the parameters that have any"
        grids = [
            Grid(str(delta.path), ("", ""), tuple(_summary(delta).items()), num_text_columns=2),
            layers_grid(heading, mask_statistics(index, numel)),
        ]
        print_grids([*grids, *([_movement_grid(delta)] if delta.reversible else [])])


def apply_deltas(arguments: argparse.Namespace) -> None:
    """Apply deltas to a model, in the order given."""
    _patch(arguments, [Step(delta) for delta in open_deltas(arguments.deltas)], "applied")


def revert_deltas(arguments: argparse.Namespace) -> None:
    """Revert deltas on a model, the last given first."""
    _patch(arguments, [Step(delta, undo=True) for delta in reversed(open_deltas(arguments.deltas))], "reverted")


def compose_deltas(arguments: argparse.Namespace) -> None:
    """Write one delta that equals a stack of deltas."""
    require_free(Path(arguments.output))
    deltas = open_deltas(arguments.deltas)
    compose(deltas, arguments.output, with_previous=not arguments.without_previous, coding=arguments.coding)
    say_size(Path(arguments.output))


def export_deltas(arguments: argparse.Namespace) -> None:
    """Write one delta in another tool's format."""

    # Check the output first: opening a model takes time.
    output = Path(arguments.output)
    require_free(output)
    deltas = open_deltas(arguments.deltas)
    if len(deltas) != 1:
        raise UserError(f"export takes one delta, got {len(deltas)}: make one of them with piece_ds delta compose")

    # With the model, verify that the delta belongs to it; without, only its names can be checked.
    folder = open_model(arguments) if arguments.model else None
    if folder is not None:
        verify(folder, [Step(deltas[0])])
    elif arguments.format == "vllm":
        require_stored_names(deltas[0])

    # Write the format that was asked for.
    if arguments.format == "vllm":
        export_vllm(deltas[0], output, folder)
        print(printable(f"wrote {output}: {output.stat().st_size} bytes"))
        return
    if arguments.format == "piece-peft":
        base = str(folder.root.absolute()) if folder else ""
        export_adapter(deltas[0], output, base)
        print(printable(f"wrote {output}: {sum(file.stat().st_size for file in output.iterdir())} bytes"))
        return
    if folder is None:
        raise UserError("--format peft needs --model: only the model says which weights are those of Linear modules")
    model = _empty_model(arguments)
    done = export_peft(deltas[0], output, model, str(folder.root.absolute()), partial(_parameter, folder))
    size = sum(file.stat().st_size for file in output.iterdir())
    held = f"{counted(len(done.whole), 'module')} held whole, in {done.whole_bytes} bytes; " if done.whole else ""
    notes = ""
    if done.num_padding > deltas[0].num_selected:
        notes = (
            f"; {done.num_padding} places are padding, since PEFT gives every module r * (rows + columns) of them, "
            f"here r = {done.rank} (--format piece-peft has none)"
        )
    if done.unmergeable:
        notes += f"; PEFT computes with {done.unmergeable}, but cannot merge it (--format piece-peft can)"
    print(
        printable(
            f"wrote {output}: {size} bytes; {held}{done.num_inexact} of {deltas[0].num_selected} values differ in the "
            f"last bits from the delta's when added to the base in fp32{notes}"
        )
    )


def _patch(arguments: argparse.Namespace, steps: list[Step], what: str) -> None:
    if not arguments.in_place:
        require_free(Path(arguments.output))
    # A fetched model is in the user's cache, where other runs read it.
    if arguments.in_place and arguments.model != model_source(arguments.model):
        raise UserError(f"{arguments.model} is shared by every run of this user: give --output instead of --in_place")
    folder = open_model(arguments)
    if arguments.in_place:
        patch_in_place(folder, steps)
    else:
        patch_to(folder, steps, arguments.output)
    where = folder.root if arguments.in_place else arguments.output
    print(printable(f"{what} {counted(len(steps), 'delta')}: {where}"))


def open_model(arguments: argparse.Namespace) -> ModelFolder:
    """Return the model folder, with the parameters that its configuration describes."""
    model = _empty_model(arguments)
    return open_folder(model_source(arguments.model), layout_of(model), stored_names(model))


def _empty_model(arguments: argparse.Namespace) -> nn.Module:
    if not Path(model_source(arguments.model)).is_dir():
        # A Hub id is not enough: the folder's files are read and written.
        what = "a file" if Path(arguments.model).exists() else "nothing there"
        raise UserError(f"{arguments.model}: expected a transformers model folder, found {what}")
    source = ModelArguments(model_name_or_path=arguments.model, trust_remote_code=arguments.trust_remote_code)
    return empty_model(load_config(source), arguments.trust_remote_code)


def _parameter(folder: ModelFolder, name: str) -> Tensor:
    """Return a parameter of the folder, whole; put together in memory if the files hold it in parts."""
    place = folder.stored[folder.stored_as(name)[0]]
    assert place.dtype is not None
    return folder.bits_of(name).view(place.dtype).view(folder.layout.shapes()[name])


def _summary(delta: Delta) -> dict[str, str]:
    metadata, size = delta.metadata, delta.path.stat().st_size
    return {
        "method": metadata.get("method", "unknown"),
        "ratio": metadata.get("ratio", "unknown"),
        "selected": f"{delta.num_selected} of {metadata.get('total', 'unknown')}",
        "file": f"{size} bytes, {size / delta.num_selected:.2f} a selected value",
        "scaled by": f"{delta.scale:g}",
        "previous values": "yes" if delta.reversible else "no: cannot be reverted",
        "model (names and shapes)": metadata.get("model_fingerprint", "unknown"),
        "weights before": delta.base_fingerprint or "unknown",
        "weights after": delta.result_fingerprint or "unknown",
        "checksum": metadata.get("checksum", "none"),
    }


def _movement_grid(delta: Delta) -> Grid:
    header = ("module", "values", "changed", "mean |change|", "max |change|", "mean |change| / mean |value|")
    whole = change_sizes(("all", delta.change(name)) for name in delta.shapes)
    parts = change_sizes((place_of(name).module, delta.change(name)) for name in delta.shapes)
    rows = [
        (
            module,
            str(moved.num_values),
            f"{moved.num_changed / moved.num_values:.1%}",
            f"{moved.mean_distance:.3g}",
            f"{moved.max_distance:.3g}",
            f"{moved.relative:.3g}",
        )
        for module, moved in (*sorted(parts.items()), *whole.items())
    ]
    return Grid("how far values moved", header, tuple(rows))


def say_size(path: Path) -> None:
    delta = open_delta(path)
    size = path.stat().st_size
    print(
        printable(f"wrote {path}: {delta.num_selected} values, {size} bytes, {size / delta.num_selected:.2f} a value")
    )
