"""The work of `piece_ds delta scale | prune | merge | diff`: compute a new delta or model from others."""

import argparse
import tempfile
from pathlib import Path

from piece_ds.cli.delta import open_model, say_size
from piece_ds.deltas.combine import LINES_DEPTH, Merge, merge_deltas
from piece_ds.deltas.delta import Delta, open_delta, open_deltas
from piece_ds.deltas.difference import diff_folders
from piece_ds.deltas.patch import patch_to, require_free
from piece_ds.deltas.scale import prune_delta, scale_delta
from piece_ds.deltas.verify import Step, verify
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.text import counted, printable


def scale_deltas(arguments: argparse.Namespace) -> None:
    """Write one delta with its changes multiplied by --alpha."""
    delta = _only(arguments, "scale")
    require_free(Path(arguments.output))
    scale_delta(delta, arguments.alpha, arguments.output, coding=arguments.coding)
    say_size(Path(arguments.output))


def prune_deltas(arguments: argparse.Namespace) -> None:
    """Write one delta without its small changes."""
    delta = _only(arguments, "prune")
    require_free(Path(arguments.output))
    if arguments.by == "loss":
        from piece_ds.cli.delta_loss import prune_by_loss  # loads transformers' models

        prune_by_loss(delta, arguments)
    else:
        alone = next((flag for flag in ("model", "train_file") if getattr(arguments, flag) is not None), None)
        if alone is not None:
            raise UserError(f"--{alone} belongs to --by loss, and --by {arguments.by} would ignore it")
        prune_delta(delta, arguments.keep, arguments.output, arguments.by, coding=arguments.coding)
    say_size(Path(arguments.output))


def diff_models(arguments: argparse.Namespace) -> None:
    """Write the delta from one model folder to another."""
    require_free(Path(arguments.output))
    before = open_model(arguments)
    after = open_model(argparse.Namespace(**{**vars(arguments), "model": arguments.other}))
    diff_folders(before, after, arguments.output, arguments.ratio, coding=arguments.coding)
    say_size(Path(arguments.output))


def merge_models(arguments: argparse.Namespace) -> None:
    """Write a plain copy of a model with deltas applied, or the one delta that leads there."""
    output = Path(arguments.output)
    require_free(output)
    deltas = open_deltas(arguments.deltas)

    # A stack: the deltas as they are, one after another.
    if arguments.how == "replace":
        _refuse_options_of_merging(arguments)
        patch_to(open_model(arguments), [Step(delta) for delta in deltas], output, with_record=False)
        print(printable(f"merged {counted(len(deltas), 'delta')} into {output}"))
        return

    # Merged changes: one new delta, for the base of the first.
    merge = Merge(
        how=arguments.how,
        weights=_numbers(arguments.weights),
        density=arguments.density,
        scale=arguments.scale,
        seed=arguments.seed,
        depth=_pair(arguments.depth),
    )
    folder = open_model(arguments)
    names = list(folder.layout.shapes())
    # The other deltas are compared with the first one by merge_deltas().
    verify(folder, [Step(deltas[0])])

    # Write the delta, or the model with it.
    if output.suffix == ".safetensors":
        merge_deltas(deltas, merge, output, names, coding=arguments.coding)
        say_size(output)
        return
    # The merged delta is only a step on the way to the model.
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged.safetensors"
        merge_deltas(deltas, merge, merged, names)
        patch_to(folder, [Step(open_delta(merged))], output, with_record=False)
    print(printable(f"merged {counted(len(deltas), 'delta')} by {arguments.how} into {output}"))


def _refuse_options_of_merging(arguments: argparse.Namespace) -> None:
    given = {"--weights": arguments.weights, "--density": arguments.density != 1, "--scale": arguments.scale != 1}
    given["--depth"] = arguments.depth is not None
    named = next((flag for flag, is_given in given.items() if is_given), None)
    if named is not None:
        raise UserError(f"{named} has no meaning with --how replace, which puts a stack of deltas on as it is")
    if Path(arguments.output).suffix == ".safetensors":
        raise UserError("--how replace writes a model folder; for the one delta of a stack use piece_ds delta compose")


def _pair(text: str | None) -> tuple[float, float]:
    if text is None:
        return LINES_DEPTH
    parts = text.split(",")
    try:
        first, last = (float(part) for part in parts)
    except ValueError:
        raise UserError(f"--depth {text[:60]!r}: expected two numbers, such as 0.2,1") from None
    return first, last


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--weights {text[:60]!r}: expected numbers with commas between, such as 0.5,0.5") from None


def _only(arguments: argparse.Namespace, what: str) -> Delta:
    deltas = open_deltas(arguments.deltas)
    if len(deltas) != 1:
        raise UserError(f"{what} takes one delta, got {len(deltas)}: make one of them with piece_ds delta compose")
    return deltas[0]
