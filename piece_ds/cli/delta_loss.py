"""`piece_ds delta prune --by loss`: keep the changes that lower the loss most on rows of a file, and say what it is."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from piece_ds.cli.delta import open_model
from piece_ds.config.arguments import DataArguments, ModelArguments
from piece_ds.data.files import first_rows
from piece_ds.data.image_collate import make_collator
from piece_ds.data.tasks import load_task_stream
from piece_ds.deltas.delta import Delta, open_delta
from piece_ds.deltas.live import apply_delta_
from piece_ds.deltas.loss_effect import loss_effects
from piece_ds.deltas.scale import keep_largest, require_share
from piece_ds.deltas.verify import Step, verify
from piece_ds.deltas.write import require_previous
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.models.loading import load_config, load_model, load_tokenizer, reads_images
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.text import printable


def prune_by_loss(delta: Delta, arguments: argparse.Namespace) -> None:
    """Write the delta with only the changes that lower the loss most; print the loss with all of them and with those.

    Raises:
        UserError: a flag is missing, the delta is not of the model, or the file cannot be used.
    """
    for flag in ("model", "train_file"):
        if getattr(arguments, flag) is None:
            raise UserError(f"--by loss needs --{flag}: the base, and the rows that the loss is measured on")
    if arguments.rows < 1 or arguments.batch_size < 1:
        raise UserError(f"--rows and --batch_size must be positive, got {arguments.rows} and {arguments.batch_size}")
    require_share(arguments.keep)
    require_previous(delta, "pruning")
    verify(open_model(arguments), [Step(delta)])

    # Rows and model; in fp32, where half of a change is not one of its ends.
    source = ModelArguments(model_name_or_path=arguments.model, trust_remote_code=arguments.trust_remote_code)
    config = load_config(source)
    if reads_images(config):
        raise UserError("--by loss takes models of text alone: use --by change or --by relative")
    tokenizer = load_tokenizer(source, config)
    (task,) = load_task_stream(DataArguments(train_file=arguments.train_file), tokenizer)
    rows, collate = first_rows(task.train, arguments.rows), make_collator(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(source, torch.float32, whole=True).to(device)

    def batches() -> Iterator[dict[str, Tensor]]:
        for begin in range(0, len(rows), arguments.batch_size):
            batch = collate([rows[i] for i in range(begin, min(begin + arguments.batch_size, len(rows)))])
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    # Prune, and measure what is left.
    def loss(model: nn.Module) -> float:
        return evaluate_loss(model, rows, collate, arguments.batch_size, device).mean

    effects = loss_effects(model, delta, batches())
    keep_largest(delta, arguments.keep, effects, arguments.output, coding=arguments.coding)
    found = {"base": loss(model)}
    for name, path in (("whole delta", delta.path), ("pruned", Path(arguments.output))):
        live = apply_delta_(model, path)
        found[name] = loss(model)
        live.set_(0.0)
    kept = open_delta(arguments.output).num_selected
    print(printable(f"loss on {len(rows)} rows: {', '.join(f'{name} {value:.4f}' for name, value in found.items())}"))
    print(printable(f"kept {kept} of {delta.num_selected} changes, those that lower it most"))
