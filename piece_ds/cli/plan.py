"""What `piece_ds plan` does: shapes of a model, then tables of memory and traffic."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.loading import empty_model, load_config
from piece_ds.models.pretrained import PRETRAINED, model_source
from piece_ds.plan.memory import MOMENTS, Term, memory_terms, peak, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import KNOWN, ModelShape, known_config, shape_of
from piece_ds.plan.traffic import transfers
from piece_ds.runtime.errors import UserError, nearest

TABLE_RANKS = (1, 8, 64, 512)
TABLE_MODES = ("full", "lora", "masked", "compact")
GB = 1e9


def plan(arguments: argparse.Namespace) -> None:
    """Print the plan of one setting, or the table."""
    setting = Setting(**{field.name: getattr(arguments, field.name) for field in fields(Setting)})
    if arguments.table:
        print("\n".join(markdown_table(setting, [arguments.model] if arguments.model else list(KNOWN))))
        return
    if arguments.model is None:
        raise UserError(f"plan needs --model (a local folder, or {', '.join(KNOWN)}) or --table")
    shape = _shape(arguments.model)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    terms = memory_terms(shape, setting)
    console.print(_memory_table(terms, f"{arguments.model}: {shape.total} parameters, per rank of {setting.world}"))
    console.print(_totals(terms))
    console.print(_traffic_table(shape, setting))


def markdown_table(setting: Setting, models: list[str]) -> Iterator[str]:
    """Lines of the table of models, ranks and update modes: GB per rank where most is needed, and GB received a step.

    Without estimates: activations, gathered parameters and exchange buffers come on top.
    """
    yield f"GB (1e9 bytes) of a rank, ZeRO-{setting.zero}, {setting.dtype}, ratio {setting.ratio:g}, {setting.method}:"
    yield "training / selection; traffic is what one rank receives in one optimizer step."
    yield ""
    yield f"| model | ranks | {' | '.join(TABLE_MODES)} | traffic {' | traffic '.join(TABLE_MODES[2:])} |"
    yield f"|---{'|---:' * (1 + len(TABLE_MODES) + len(TABLE_MODES[2:]))}|"
    for model in models:
        shape = _shape(model)
        for world in TABLE_RANKS:
            settings = [replace(setting, world=world, update_mode=mode) for mode in TABLE_MODES]
            memory = [_training_and_selection(memory_terms(shape, s)) for s in settings]
            traffic = [f"{_step_traffic(shape, s) / GB:.2f}" for s in settings[2:]]
            yield f"| {model} | {world} | {' | '.join([*memory, *traffic])} |"


def _training_and_selection(terms: list[Term]) -> str:
    sums = [term for term in terms if not term.is_estimate]
    training = max(total(sums, moment) for moment in MOMENTS[1:])
    selects = any(term.name == "statistics" for term in terms)
    return f"{training / GB:.2f}" + (f" / {total(sums, MOMENTS[0]) / GB:.2f}" if selects else "")


def _step_traffic(shape: ModelShape, setting: Setting) -> float:
    return sum(t.received for t in transfers(shape, setting) if t.collective != "all-to-all")


def _shape(name: str) -> ModelShape:
    if name in KNOWN:
        return shape_of(empty_model(known_config(name)))
    if not Path(model_source(name)).is_dir():
        known = [*KNOWN, *PRETRAINED]
        raise UserError(
            f"--model {name}: expected a local model folder or one of {', '.join(known)}.{nearest(name, known)}"
        )
    return shape_of(empty_model(load_config(ModelArguments(model_name_or_path=name))))


def _memory_table(terms: list[Term], title: str) -> Table:
    table = Table("what", "formula", "GB", "where", "when", title=title, title_justify="left")
    for term in terms:
        when = "always" if term.moments == MOMENTS else ", ".join(term.moments)
        table.add_row(
            term.name + (" (estimate)" if term.is_estimate else ""),
            term.formula,
            f"{term.size / GB:.3f}",
            "CPU" if term.on_host else "device",
            when,
        )
    table.columns[2].justify = "right"
    return table


def _totals(terms: list[Term]) -> Table:
    table = Table("GB", *MOMENTS, "most", title="sums", title_justify="left")
    sums = [term for term in terms if not term.is_estimate]
    rows = (("device, without estimates", sums, False), ("device", terms, False), ("CPU", terms, True))
    for name, chosen, on_host in rows:
        sizes = [f"{total(chosen, moment, on_host) / GB:.3f}" for moment in MOMENTS]
        table.add_row(name, *sizes, f"{peak(chosen, on_host)[0] / GB:.3f}")
    return table


def _traffic_table(shape: ModelShape, setting: Setting) -> Table:
    table = Table(
        "what",
        "collective",
        "elements",
        "GB received",
        title="traffic per optimizer step and rank",
        title_justify="left",
    )
    for transfer in transfers(shape, setting):
        table.add_row(transfer.name, transfer.collective, f"{transfer.elements:.4g}", f"{transfer.received / GB:.3f}")
    return table
